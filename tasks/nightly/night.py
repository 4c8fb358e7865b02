"""One night of one spec: its record in the store, from "running" to how it ended, whatever ends it.

    state        means
    unchanged    nothing was built: what is live is what the spec says
    promoted     something was built, passed its gates and is live
    kept         something was built and failed a gate; what was live before still is
    failed       the spec, a stage or the store is in error; what was live before still is
    cancelled    somebody stopped it
    interrupted  its process or machine died; written by the next night, which holds the lease that the dead one lost

Refuses to overlap: a second night of a spec waits for the first. Refuses to know the order of a build's stages.
Run it: `prefect deployment run nightly/NAME`; records are `nights/SPEC/NIGHT` in the store.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specs.errors import GateFailed, KilotokError
from specs.load import load_spec
from specs.lock import check_lock, read_lock
from specs.schema import Spec
from tasks.build import DEFAULT_STORE, new_build_id
from tasks.edges.machine import FACTS
from tasks.nightly import attribution, drift, judge, probe, refresh
from tasks.nightly.history import RUNNING, history
from tasks.plan import CACHED, plan
from tasks.provenance import git_state
from tasks.store import Store, open_store

Say = Callable[[str], None]


class Night:
    """See the module. The steps, in order: `look`, then the build, `built` or `refused`, `measure`, `conclude`."""

    def __init__(self, spec: Spec, store: Store, night: str) -> None:
        self.spec, self.store, self.id = spec, store, night
        self._began = time.monotonic()  # the clock may be set while we work
        self.build: dict[str, Any] = {}
        self.record = new_record(spec.name, night)
        self.record |= {"git": git_state(spec.root), "spec_tree": spec.to_dict()}

    @property
    def overrides(self) -> list[str]:
        """What tonight changes of the spec: a new seed where the refresh policy asks for a new draft."""
        return list(self.record["overrides"])

    def look(self) -> dict[str, Any]:
        """Lock drift, draft refresh and plan, before anything is spent. Raises LockError for a spec without a lock."""
        check_lock(self.spec, read_lock(self.spec))
        self.record["drift"] = drift.lock_drift(self.spec, self.store)
        self.record["refresh"] = refresh.tonight(self.spec, self.store, self.id)
        seed = self.record["refresh"]["seed"]
        self.record["overrides"] = [] if seed is None else [f"draft.training.seed={seed}"]
        planned = plan(load_spec(self.spec.path, self.overrides), self.store)
        self.record["plan"] = [
            {"stage": row.stage, "state": row.state, "reason": row.reason}
            for row in planned.rows
            if row.state != CACHED
        ]
        return {name: self.record[name] for name in ("drift", "refresh", "plan")}

    def built(self, build: dict[str, Any]) -> None:
        """The build passed: what it promoted, or that there was nothing to do."""
        promoted = any(row["stage"] == "promote" and row["state"] == "built" for row in build["stages"])
        self._ended(build, "promoted" if promoted else "unchanged")

    def refused(self, error: GateFailed) -> None:
        """A gate failed: nothing was promoted, and that is an outcome, not a fault."""
        self._ended(self.store.read_json(f"builds/{self.spec.name}/{self.id}") or {}, "kept")
        self.record["error"] = error.to_dict()

    def _ended(self, build: dict[str, Any], outcome: str) -> None:
        self.build = build
        self.record |= {"outcome": outcome, "build": build.get("build"), "verdict": build.get("verdict")}
        self.record["report"] = build.get("report")
        refresh.settle(self.spec, self.store, self.record["refresh"], passed=outcome != "kept")

    def measure(self) -> int:
        """The A/A runs on what is live now; returns how many there are: none beside other work on the machine."""
        runs = self.spec.nightly.probes if self.spec.nightly else 0
        self.record["probes"], self.record["unmeasured"] = probe.probe(self.spec, self.store, runs)
        return len(self.record["probes"])

    def conclude(self) -> list[dict[str, Any]]:
        """What got worse, since when and why; the history is brought up to date with tonight first."""
        inputs = attribution.inputs_of(self.store, self.build)
        self.record["inputs"] = {**inputs, attribution.ENVIRONMENT: attribution.environment()}
        self.write()  # still running: the history reads it now, and once more when it has ended
        with history(self.store) as table:
            self.record["findings"] = judge.judge(table, self.spec, self.record, self.build)
        return list(self.record["findings"])

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """The findings that are news and bad."""
        return [finding for finding in self.record["findings"] if finding["alarm"]]

    def fail(self, error: BaseException) -> None:
        """Put down what ended the night before its time."""
        cancelled = not isinstance(error, Exception)
        told = (
            error.to_dict() if isinstance(error, KilotokError) else {"class": type(error).__name__, "what": str(error)}
        )
        self.record |= {"outcome": "cancelled" if cancelled else "failed", "error": told}
        if not cancelled:
            self.record["findings"] = [judge.of_error(told, self.record)]

    def end(self) -> dict[str, Any]:
        """Close the record."""
        self.record["seconds"] = round(time.monotonic() - self._began, 3)
        self.record["state"] = self.record["outcome"] or "failed"
        self.record["summary"] = judge.summary(self.record)
        self.write()
        return self.record

    def write(self) -> None:
        self.store.write_json(f"nights/{self.record['spec']}/{self.id}", self.record)


def new_record(name: str, night: str) -> dict[str, Any]:
    """Every field, so that a reader never has to ask whether it is there."""
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    empty: dict[str, Any] = {name: None for name in ("build", "verdict", "report", "error", "seconds", "outcome")}
    texts = {"unmeasured": "", "summary": ""}
    lists: dict[str, Any] = {name: [] for name in ("overrides", "plan", "probes", "findings")}
    given = {"night": night, "spec": name, "state": RUNNING, "started": started, "host": FACTS["host"]()}
    return {**given, **empty, **lists, **texts, "git": {}, "drift": {}, "refresh": {}, "inputs": {}}


Publish = Callable[[Night], None]


def unheard(_night: Night) -> None:
    """Nobody is told."""


@contextmanager
def opened(spec_path: str, store_uri: str, night: str, say: Say, publish: Publish = unheard) -> Iterator[Night]:
    """Tonight, held against any other night of the spec; `publish` is called when its record is closed.

    Raises what ended it, after writing it down.
    """
    store = open_store(store_uri or DEFAULT_STORE)
    try:
        spec = load_spec(Path(spec_path), [])
    except KilotokError as error:
        name = Path(spec_path).stem
        _never_began(store, name, night or next_id(store, name), error)
        raise
    with store.lease(f"night-{spec.name}", say):
        recover(store, spec.name)
        tonight = Night(spec, store, night or next_id(store, spec.name))
        tonight.write()
        try:
            yield tonight
        except BaseException as error:
            tonight.fail(error)
            tonight.end()
            if isinstance(error, Exception):  # who is being cancelled has no time to talk
                publish(tonight)
            raise
        tonight.end()
        publish(tonight)


def next_id(store: Store, name: str) -> str:
    """An id that sorts after every night before it, also when the clock was set back since."""
    mine, nights = new_build_id(), store.list_json(f"nights/{name}")
    newest = nights[-1].rpartition("/")[2] if nights else ""
    return mine if mine > newest else f"{newest}-1"


def recover(store: Store, name: str) -> list[str]:
    """Nights that still say "running" while we hold their lease are over: their process or machine died."""
    dead = []
    for entry in store.list_json(f"nights/{name}"):
        record = store.read_json(entry)
        if record and record["state"] == RUNNING:
            what = f"the process on {record['host']} died before the night ended"
            record |= {
                "state": "interrupted",
                "outcome": "interrupted",
                "error": {"class": "Interrupted", "what": what},
            }
            record["summary"] = f"interrupted: {what}"
            store.write_json(entry, record)
            dead.append(str(record["night"]))
    return dead


def _never_began(store: Store, name: str, night: str, error: KilotokError) -> None:
    record = new_record(name, night)
    record |= {"state": "failed", "outcome": "failed", "error": error.to_dict(), "seconds": 0.0}
    record["findings"] = [judge.of_error(record["error"], record)]
    record["summary"] = judge.summary(record)
    store.write_json(f"nights/{name}/{night}", record)
