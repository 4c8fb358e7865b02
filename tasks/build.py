"""One build: a spec, a store, the receipts so far, and the record of how it ended.

The record is what `kilotok run --json` prints and what the report and the next build read; it is written to the store's
records whatever the outcome. Refuses to run stages side by side: that is `flows/rebuild.py`.
Run it without Prefect, up to one stage: `python -m tasks.build SPEC STORE STAGE [KEY=VALUE...]`.
"""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from specs.errors import KilotokError
from specs.load import load_spec
from specs.lock import check_lock, read_lock
from specs.receipts import Receipt
from specs.schema import Spec
from tasks.predict.forecast import forecast
from tasks.predict.records import learn
from tasks.runner import StageEvent, run_stage
from tasks.stages import REGISTRY
from tasks.store import Store, open_store
from tasks.store.keys import Known

DEFAULT_STORE = ".kilotok/store"
Listener = Callable[[StageEvent], None]


class Build:
    """Runs stages one by one and remembers; the only mutable thing on the main path."""

    def __init__(self, spec: Spec, store: Store, listen: Listener, build_id: str = "") -> None:
        self.spec, self.store, self.listen = spec, store, listen
        self.id = build_id or new_build_id()
        self.started, self._began = datetime.datetime.now(datetime.timezone.utc), time.monotonic()
        self.receipts: dict[str, Receipt] = {}
        self.last_good: dict[str, Any] | None = store.read_json(f"last_good/{spec.name}")
        self.forecast = forecast(spec, store)

    @classmethod
    def open(cls, spec_path: str, overrides: list[str], store_uri: str, listen: Listener, build_id: str = "") -> Build:
        """Load and check the spec, open the store; raises InputError before anything is spent."""
        spec = load_spec(Path(spec_path), overrides)
        return cls(spec, open_store(store_uri or DEFAULT_STORE), listen, build_id)

    def run(self, stage: str) -> Receipt:
        """Build or reuse one stage. A failure is recorded, then raised."""
        started = time.monotonic()
        extra = {
            "receipts": [receipt.to_json() for receipt in self.receipts.values()],
            "last_good": self.last_good,
            "build": self.id,
            "prediction": self.forecast,
        }
        try:
            receipt = run_stage(stage, self.spec, self.receipts, self.store, self.listen, extra=extra)
        except KilotokError as error:
            receipt = Receipt(stage, key="", state="failed", seconds=time.monotonic() - started, reason=str(error))
            self.receipts[stage] = receipt
            self.listen(StageEvent(stage, "finished", receipt=receipt))
            self.write_record(verdict="FAILED", error=error)
            raise
        self.receipts[stage] = receipt
        return receipt

    def discard_candidate(self) -> None:
        """What failed its gates is stopped; what was live stays live."""
        from tasks.deployment import discard

        discard(self.store, self.spec.name)

    def outcome(self) -> Mapping[str, Any]:
        """validate's verdict.json: {"verdict": ..., "gates": [...]}."""
        import json

        return json.loads((self.store.path(self.receipts["validate"]) / "verdict.json").read_text())

    def write_record(self, verdict: str, error: KilotokError | None = None) -> dict[str, Any]:
        """Write the build's record, and move `last_good` when it passed."""
        metrics: dict[str, float] = {}
        for receipt in self.receipts.values():
            metrics.update(receipt.metrics)
        report = self.receipts.get("report")
        record = {
            "build": self.id,
            "spec": self.spec.name,
            "since": self.since(),
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._began, 3),
            "stages": [_stage_row(receipt) for receipt in self.receipts.values()],
            "metrics": metrics,
            "gates": self.outcome().get("gates", []) if "validate" in self.receipts and error is None else [],
            "verdict": verdict,
            "error": error.to_dict() if error else None,
            "report": str(self.store.path(report) / "index.html") if report and report.state != "failed" else None,
            "endpoint": self.endpoint(),
            "prediction": {name: self.forecast.get(name) for name in ("metrics", "stages", "unknown")},
        }
        learn(self.store, record, self.forecast)
        self.store.write_json(f"builds/{self.spec.name}/{self.id}", record)
        if verdict == "PASS":
            self.store.write_json(f"last_good/{self.spec.name}", record)
        return record

    def since(self) -> str:
        """The last good build that differs from this one, which is what the report compares with; "" for none."""
        keys = {name: receipt.key for name, receipt in self.receipts.items() if not REGISTRY[name].tells}
        return Known({}, keys, self.last_good).since

    def endpoint(self) -> str | None:
        """The public URL of the live deployment, when there is one."""
        from tasks.deployment import live_url

        return live_url(self.store, self.spec.name)


def _stage_row(receipt: Receipt) -> dict[str, Any]:
    row = receipt.to_json()
    return {name: row[name] for name in ("stage", "key", "state", "seconds", "uri", "reason", "size_bytes")}


def new_build_id() -> str:
    """Sorts by time, unique per process: 20261123-020000-4711."""
    return f"{datetime.datetime.now(datetime.timezone.utc):%Y%m%d-%H%M%S}-{os.getpid()}"


def main(arguments: list[str]) -> int:
    """Build one stage and what comes before it; `--set`'s KEY=VALUE last."""
    spec, store, last, *overrides = arguments
    try:
        build = Build.open(spec, overrides, store, lambda event: print(event.stage, event.kind, event.text, flush=True))
        check_lock(build.spec, read_lock(build.spec))
        for name in list(REGISTRY)[: list(REGISTRY).index(last) + 1]:
            build.run(name)
    except KilotokError as error:
        print(f"kilotok: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
