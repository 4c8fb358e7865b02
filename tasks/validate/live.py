"""Measure what is live, again and again: the same prompts, one user, nothing built and nothing changed between runs.

Two runs of the same thing that differ show the noise (an A/A test); a night that differs from the nights before shows
that the machine changed under a build that did not. Refuses to judge, to count a run beside which the machine did other
work, and to measure accuracy: greedy answers of an unchanged build do not change.
Run it: by the nightly flow (`nightly.probes` in the spec), or `python -m tasks.validate.live SPEC RUNS`.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.edges.machine import busy_share
from tasks.job import Job, Progress

if TYPE_CHECKING:
    from specs.schema import Spec


LOOK_S = 0.2  # before and after each run
BUSY_SHARE = 0.1  # of all cores; an idle server waits and uses none
RETRIES = 6  # looks and runs that may be lost to other work


def measure_live(spec: Spec, checkpoint: Path, base_url: str, runs: int, workdir: Path) -> list[dict[str, float]]:
    """Metrics of each run: `latency.*`, `cycle.*` and `acceptance.*` of one user, as in validate.

    `checkpoint` has the tokenizer. Fewer runs than asked for, down to none, when the machine is busy with other work.
    Raises NetworkError when the endpoint does not answer.
    """
    from specs.lock import read_lock
    from tasks.validate import _Validation, speed

    lock = read_lock(spec)
    tree: dict[str, Any] = spec.to_dict()
    inputs = {"download": checkpoint}
    job = Job("validate", tree, spec.root, inputs, workdir, lock.to_dict() if lock else None)
    workdir.mkdir(parents=True, exist_ok=True)
    measuring = _Validation(job, Progress())
    endpoint = speed.connect(base_url, measuring.count)
    speed.warm_up(endpoint, measuring.warm_up_asks())
    measured: list[dict[str, float]] = []
    for _ in range(runs + RETRIES):
        if len(measured) < runs and _is_quiet():
            found = _once(measuring, endpoint)
            measured += [found] if _is_quiet() else []
    return measured


def _is_quiet() -> bool:
    return busy_share(LOOK_S) <= BUSY_SHARE


def _once(measuring: Any, endpoint: Any) -> dict[str, float]:
    from tasks.acceptance import acceptance_frame, acceptance_metrics
    from tasks.validate import speed

    rows, made = speed.alone(endpoint, measuring.asks)
    usages = [(row["domain"], row) for row in rows if row["ok"]]
    found = speed.one_user(rows, made) | acceptance_metrics(acceptance_frame(usages, measuring.draft_tokens))
    return {name: value for name, value in found.items() if math.isfinite(value)}


def main() -> int:
    """Print one JSON line per run of the live deployment of a spec in the default store."""
    from specs.load import load_spec
    from tasks.nightly.probe import probe
    from tasks.store import open_store

    measured, why = probe(load_spec(Path(sys.argv[1]), []), open_store(), int(sys.argv[2]))
    for metrics in measured:
        print(json.dumps(metrics))
    print(why, file=sys.stderr, end="\n" if why else "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
