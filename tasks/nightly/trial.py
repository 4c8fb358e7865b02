"""One trial of a bisection, in a process of its own that runs the code of the checkout it stands in.

Builds up to a candidate (through the store, so mostly hits), measures one figure, stops the candidate. Refuses to
promote, and to leave a record: it is an experiment, not a build.
Run it: `python -m tasks.nightly.trial SPEC STORE METRIC RUNS ANSWER_JSON`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from specs.errors import StageFailed
from specs.load import load_spec
from specs.receipts import Receipt
from specs.schema import Spec
from tasks.runner import StageEvent, run_stage
from tasks.stages import STAGES
from tasks.store import Store, open_store

MEASURED_LIVE = ("latency.", "cycle.", "acceptance.")


def trial(spec: Spec, store: Store, metric: str, runs: int) -> dict[str, float]:
    """{metric: value}: the mean of fresh runs for what the probe measures, else validate's."""
    from tasks.deployment import discard, ensure_running
    from tasks.validate.live import measure_live

    receipts: dict[str, Receipt] = {}
    live = metric.startswith(MEASURED_LIVE)
    try:
        for stage in STAGES:
            receipts[stage.name] = run_stage(stage.name, spec, receipts, store, _say)
            if stage.name == ("deploy" if live else "validate"):
                break
        if not live:
            return {metric: receipts["validate"].metrics[metric]}
        url = ensure_running(store.path(receipts["deploy"]) / "deployment.json")
        with tempfile.TemporaryDirectory() as folder:
            measured = measure_live(spec, store.path(receipts["download"]), url, runs, Path(folder))
        if not measured:
            raise StageFailed("the machine is busy with other work", metric, "bisect when nothing else runs")
        return {metric: sum(run[metric] for run in measured) / len(measured)}
    finally:
        discard(store, spec.name)


def _say(event: StageEvent) -> None:
    if event.kind == "finished":
        print(event.stage, event.text, flush=True)


def main() -> int:
    spec, store, metric, runs, answer = sys.argv[1:]
    found = trial(load_spec(Path(spec), []), open_store(store), metric, int(runs))
    Path(answer).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
