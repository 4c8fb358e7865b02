"""What a stage function gets and how it reports: plain data that crosses a process border as JSON.

Refuses to be a context object: no store, no receipts, no Prefect, no environment. A stage is
`build(job, progress) -> metrics`.
Run one by hand: `python -m tasks.child JOB.json` (the runner leaves JOB.json beside each log in the store's `logs/`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRATCH = ".scratch"  # inside job.out: survives a crash like the rest, but is never published


@dataclass(frozen=True)
class Job:
    """One stage's work: its slice of the spec, its input directories (read-only) and its work directory."""

    stage: str
    spec: dict[str, Any]  # only what the stage reads, plus "name"
    root: Path  # `file:` paths in the spec are relative to it
    inputs: dict[str, Path]
    out: Path  # survives a crash: what is finished in it need not be done again
    lock: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # what a report tells about the run; shapes no key

    @property
    def scratch(self) -> Path:
        """A directory for what a resume needs and nobody else does (checkpoints, half downloads)."""
        path = self.out / SCRATCH
        path.mkdir(parents=True, exist_ok=True)
        return path

    def to_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "spec": self.spec,
            "root": str(self.root),
            "inputs": {name: str(path) for name, path in self.inputs.items()},
            "out": str(self.out),
            "lock": self.lock,
            "extra": self.extra,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Job:
        inputs = {name: Path(path) for name, path in data["inputs"].items()}
        root, out = Path(data["root"]), Path(data["out"])
        return cls(data["stage"], data["spec"], root, inputs, out, data.get("lock"), data.get("extra") or {})


class Progress:
    """`progress(done, total, note)` and `progress.note(text)`; cheap to call often, the runner's sink throttles."""

    def __init__(self, sink: Callable[[float, float, str], None] | None = None) -> None:
        self._sink = sink or (lambda done, total, note: None)
        self._done, self._total = 0.0, 0.0

    def __call__(self, done: float, total: float, note: str = "") -> None:
        self._done, self._total = float(done), float(total)
        self._sink(self._done, self._total, note)

    def note(self, text: str) -> None:
        self._sink(self._done, self._total, text)
