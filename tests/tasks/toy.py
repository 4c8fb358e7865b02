"""A toy pipeline for the store's and runner's tests: two stages whose functions live in a module the test writes.

Refuses to be clever: `make` copies text into files, `join` reads them. Used by the test modules beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from specs.receipts import Receipt
from tasks.runner import StageEvent, run_stage
from tasks.stages import Stage
from tasks.store import LocalStore
from tasks.store.keys import SpecView

SOURCE = """
import json, os, signal, sys, time
from pathlib import Path
from specs.errors import InputError

def make(job, progress):
    toy = job.spec["toy"]
    done = job.out / "a.txt"
    (job.out / ".scratch").mkdir(exist_ok=True)
    with open(job.root / "calls.txt", "a") as calls:
        calls.write(f"{os.getpid()} {'resumed' if done.exists() else 'fresh'}\\n")
    done.write_text(toy["text"] * 1000)
    progress(1, 2, "half")
    act = toy.get("act", "")
    if act == "bad input":
        raise InputError("no such prompts", "toy.text", "write some")
    if act == "bug":
        print("about to divide")
        1 / 0
    if act == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "full":
        raise OSError(28, "No space left on device")
    if act == "wait":
        while not (job.root / "go").exists():
            time.sleep(0.02)
    if act == "fail verdict":
        (job.out / "verdict.json").write_text(json.dumps({"verdict": "FAIL"}))
    (job.out / "sub").mkdir(exist_ok=True)
    (job.out / "sub" / "b.txt").write_text("b")
    (job.out / ".scratch" / "half.bin").write_text("not published")
    return {"toy.length": len(toy["text"])}

def alive(folder):
    return "the endpoint is gone" if (folder.parents[3] / "gone").exists() else ""

def revive(folder):
    return "started again"

def join(job, progress):
    (job.out / "joined.txt").write_text((job.inputs["make"] / "a.txt").read_text() + job.spec["join"]["tail"])
    return {}
"""


class Toy:
    """A spec, a registry, a store and a place for code; `run()` runs a stage and keeps its receipt."""

    def __init__(self, tmp_path: Path, isolated: bool = False) -> None:
        self.root = tmp_path
        self.module = tmp_path / "toystages.py"
        self.module.write_text(SOURCE)
        self.store = LocalStore(tmp_path / "store")
        self.tree: dict[str, Any] = {"toy": {"text": "hello", "act": ""}, "join": {"tail": "!"}}
        self.registry = {
            "make": Stage("make", reads=("toy",), packages=("pyyaml",), entry="toystages:make", isolated=isolated),
            "join": Stage("join", inputs=("make",), reads=("join",), entry="toystages:join"),
        }
        self.receipts: dict[str, Receipt] = {}
        self.events: list[StageEvent] = []
        self.listen: Callable[[StageEvent], None] = self.events.append

    @property
    def view(self) -> SpecView:
        return SpecView("toy", self.tree, self.root)

    def run(self, name: str = "make", **extra: Any) -> Receipt:
        receipt = run_stage(
            name, self.view, self.receipts, self.store, self.listen,
            registry=self.registry, code_root=self.root, extra=extra,
        )  # fmt: skip
        self.receipts[name] = receipt
        return receipt

    @property
    def num_calls(self) -> int:
        calls = self.root / "calls.txt"
        return len(calls.read_text().splitlines()) if calls.exists() else 0
