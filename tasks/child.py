"""One stage in its own process: reads JOB.json, calls the entry, sends progress and the result up a pipe as JSON lines.

Refuses to outlive its parent and to print to it: stdout and stderr are the log file.
Run a failed stage again by hand: `python -m tasks.child JOB.json` (the path is in the log's folder).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from specs.errors import KilotokError, StageFailed
from tasks.edges.process import die_with_parent
from tasks.job import Job, Progress
from tasks.store.local import as_store_error

_EVERY_S = 0.2  # of progress; the last value before a note or the end is never lost


class _Pipe:
    """Progress as JSON lines, at most a few per second."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = 0.0

    def send(self, **message: Any) -> None:
        self._stream.write(json.dumps(message) + "\n")
        self._stream.flush()

    def progress(self, done: float, total: float, note: str) -> None:
        now = time.monotonic()
        if note or done >= total or now - self._last >= _EVERY_S:
            self._last = now
            self.send(kind="progress", done=done, total=total, note=note)


def call_entry(entry: str, job: Job, progress: Progress) -> dict[str, float]:
    """Import "module:function" and run it; metrics are plain numbers by name: they end up in JSON and in gates."""
    module, _, function = entry.partition(":")
    metrics = getattr(importlib.import_module(module), function)(job, progress)
    return {str(name): float(value) for name, value in (metrics or {}).items()}


def as_error(error: Exception, job: Job) -> KilotokError:
    """What crosses the border: our own errors as they are, a full disk as such, anything else by its name."""
    if isinstance(error, KilotokError):
        return error
    if isinstance(error, OSError) and str(error.filename or job.out).startswith(str(job.out)):
        known = as_store_error(error, error.filename or job.out)
        if known:
            return known
    return StageFailed(f"{job.stage} failed: {type(error).__name__}: {error}", job.stage)


def main(argv: list[str]) -> int:
    task = json.loads(Path(argv[0]).read_text())
    if len(argv) > 1:  # started by the runner: JOB.json PIPE_FD PARENT_PID
        die_with_parent(int(argv[2]))
        os.set_inheritable(int(argv[1]), False)
        pipe = _Pipe(os.fdopen(int(argv[1]), "w", encoding="utf-8"))
    else:  # by hand: show what the runner would have heard
        pipe = _Pipe(sys.stdout)
    job = Job.from_dict(task["job"])
    try:
        metrics = call_entry(task["entry"], job, Progress(pipe.progress))
    except Exception as error:  # noqa: BLE001  process boundary: the parent must hear of every failure
        pipe.send(kind="error", error=as_error(error, job).to_dict())
        with suppress(OSError):  # the log may be on the disk that is full
            traceback.print_exc()
        return 1
    pipe.send(kind="result", metrics=metrics)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
