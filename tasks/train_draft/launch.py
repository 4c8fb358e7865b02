"""Several processes train one head: torchrun on this node, or on every node of a Slurm allocation.

`train_draft` starts them, waits, and goes on from their last checkpoint as if it had trained alone. One process needs
none of this. The plan is the argv; `kilotok plan --json` shows it. Refuses to place nodes itself: that is Slurm's work.
Run one by hand: `torchrun --standalone --nproc-per-node 2 -m tasks.train_draft.launch .scratch/launch/job.json`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specs.errors import InputError, KilotokError, StageFailed, from_dict
from tasks.edges.process import die_with_parent, exit_words, last_lines, spawn, stop
from tasks.job import Job, Progress

POLL_S = 0.3
# torchrun's own summary of who failed first.
ROOT_CAUSE = re.compile(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", re.DOTALL)


def processes(draft: Mapping[str, Any]) -> int:
    """How many train together."""
    launch = draft.get("launch") or {}
    return int(launch.get("nodes", 1)) * int(launch.get("processes_per_node", 1))


def argv(draft: Mapping[str, Any], job: str) -> list[str]:
    """The command; `{python}` and `{host}` are filled in where it starts. Empty for one process."""
    if processes(draft) == 1:
        return []
    nodes, per_node = (str(draft["launch"][name]) for name in ("nodes", "processes_per_node"))
    torchrun = ["{python}", "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", per_node]
    worker = ["-m", "tasks.train_draft.launch", job]
    if nodes == "1":
        return [*torchrun, "--standalone", *worker]
    each = [
        "srun",
        "--nodes",
        nodes,
        "--ntasks",
        nodes,
        "--ntasks-per-node",
        "1",
        "--kill-on-bad-exit",
        "--cpu-bind=none",
    ]
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "{host}", "--rdzv-id", "train_draft"]
    return [*each, *torchrun, *meet, *worker]


def train(job: Job, progress: Progress) -> None:
    """Run them to the end of the training. Raises what stopped one of them, or StageFailed with its rank."""
    folder = job.scratch / "launch"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(job.to_dict()))
    values = {"{python}": sys.executable, "{host}": socket.gethostname()}
    command = [values.get(part, part) for part in argv(job.spec["draft"], str(folder / "job.json"))]
    if not shutil.which(command[0]):
        raise InputError(
            f"{command[0]} is not on this machine", "draft.launch.nodes", "submit infra/slurm/train_draft.sbatch"
        )
    log, told = folder / "workers.log", ""
    process = spawn(command, log)
    try:
        while process.poll() is None:
            time.sleep(POLL_S)
            told = _pass_on(folder, told, progress)
    finally:
        stop(process, 1.0)
    if process.returncode:
        raise _failure(folder, log, process.returncode, processes(job.spec["draft"]))


def _pass_on(folder: Path, told: str, progress: Progress) -> str:
    """The first worker's latest progress to the stage's own."""
    path = folder / "progress.json"
    text = path.read_text() if path.exists() else ""
    if text and text != told:
        progress(*json.loads(text))
    return text


def _failure(folder: Path, log: Path, status: int, count: int) -> KilotokError:
    if (error := folder / "error.json").exists():
        return from_dict(json.loads(error.read_text()))
    found = ROOT_CAUSE.search(log.read_text(errors="replace"))
    who = f"process {found[1]} of {count} ended first: {exit_words(int(found[2]))}" if found else exit_words(status)
    fix = f"run again: it goes on from the last checkpoint; the log ends with:\n{last_lines(log)}"
    return StageFailed(f"training on {count} processes stopped, {who}", str(log), fix, log_path=str(log))


def main(arguments: list[str]) -> int:
    """One worker: torchrun starts it."""
    die_with_parent(os.getppid())
    job = Job.from_dict(json.loads(Path(arguments[0]).read_text()))
    folder = job.scratch / "launch"
    from tasks.train_draft import place, stage

    try:
        where = place.join(int(job.spec["draft"]["launch"]["processes_per_node"]))
        run, _ = stage.ready(job, *stage.read(job), where)
        run.run(Progress(_Told(folder)) if where.writes else Progress())
    except KilotokError as error:
        traceback.print_exc()
        _replace(folder / "error.json", error.to_dict())
        return 1
    return 0


class _Told:
    """Progress to a file that the stage reads, at most a few times per second."""

    def __init__(self, folder: Path) -> None:
        self._path, self._last = folder / "progress.json", 0.0

    def __call__(self, done: float, total: float, note: str) -> None:
        now = time.monotonic()
        if now - self._last >= POLL_S:
            self._last = now
            _replace(self._path, [done, total, note])


def _replace(path: Path, value: Any) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
