"""The toy repository: the tracked files of ours with toy stages, as a Git repository of its own, and nights in it.

A night is a process that runs the real flow on a real Prefect server; the test says which night it is, so it drives the
clock. Used by test_twenty_nights.py and test_worker.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from specs.load import load_spec
from specs.lock import write_lock
from tasks.edges.hub import make_lock
from tasks.job import Progress
from tests.flows.toy import stages

ROOT = Path(__file__).resolve().parents[3]
COPIED = (
    "specs/*.py",
    "specs/hardware",
    "tasks",
    "flows",
    "engine_plugins/*.py",
    "pyproject.toml",
    "prefect.toml",
    "infra/prefect",
)
NIGHT = "import sys; from flows.nightly import nightly; print(nightly(*sys.argv[1:], return_state=True))"


class Repository:
    """A Git repository, its store, and a way to run one night."""

    def __init__(self, path: Path, noise: list[list[float]]) -> None:
        self.path, self.store = path, path.parent / "store"
        listed = subprocess.run(
            ["git", "ls-files", "-z", *COPIED], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in filter(None, listed.stdout.split("\0")):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, path / name)
        for name, text in stages.FILES.items():
            self.write(name, text)
        self.write("specs/toy.yaml", stages.SPEC)
        self.write("prompts.jsonl", '{"id": "1", "domain": "code", "prompt": "hello", "answer": "hello"}\n')
        self.write("model/config.json", json.dumps(stages.CONFIG))
        self.write("model/tokenizer.json", '"hello world"')
        self.write("model/model.safetensors", "weights")
        self.write(".gitignore", "__pycache__\n.kilotok\n")
        self.write("noise.json", json.dumps(noise))
        self.lock()
        self.git("init", "-q", "-b", "main")
        self.commit("the first night's state")

    @property
    def spec(self) -> Path:
        return self.path / "specs" / "toy.yaml"

    def write(self, name: str, text: str) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(text)

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace text that must be there."""
        text = (self.path / name).read_text()
        assert old in text, f"{name} has no {old!r}"
        self.write(name, text.replace(old, new))

    def lock(self) -> None:
        """As `kilotok lock` does."""
        spec = load_spec(self.spec, [])
        write_lock(spec, make_lock(spec, Progress()))

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=toy", "-c", "user.email=toy@localhost"]
        done = subprocess.run(["git", *identity, *arguments], cwd=self.path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit(self, message: str) -> str:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", message)
        return self.git("rev-parse", "HEAD")

    def start(self, number: int, **env: str) -> subprocess.Popen[bytes]:
        """Night `number` as a process."""
        argv = [sys.executable, "-c", NIGHT, "specs/toy.yaml", str(self.store), night_id(number)]
        log = open(self.path.parent / f"night-{number:02d}.log", "wb")  # noqa: SIM115  the child's, for as long as it runs
        return subprocess.Popen(argv, cwd=self.path, env=self.environment(number, **env), stdout=log, stderr=log)

    def environment(self, number: int, **env: str) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.path), "TOY_NIGHT": str(number), **env}

    def night(self, number: int, **env: str) -> dict[str, Any]:
        """Run night `number` to its end; its record, or {} when there is none."""
        self.start(number, **env).wait(300)
        return self.record(number)

    def record(self, number: int) -> dict[str, Any]:
        path = self.store / "records" / "nights" / "toy" / f"{night_id(number)}.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def promoted(self) -> list[dict[str, Any]]:
        """Every bundle that ever was live, in order."""
        return [json.loads(line) for line in (self.store / "live" / "toy.log").read_text().splitlines()]


def night_id(number: int) -> str:
    return f"202612{number:02d}-020000-1"
