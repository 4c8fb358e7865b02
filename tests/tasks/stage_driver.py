"""Real stages in processes that can be killed, without paying for torch's import each time: a fork server keeps it.

Refuses to be a runner: `tasks.runner` runs the stages, in the forked process itself, so that one kill -9 takes both.
Used by `test_stage_crash.py`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from specs.errors import KilotokError
from specs.load import load_spec
from specs.receipts import Receipt
from tasks.stages import REGISTRY
from tasks.store import Manifest, open_store

ROOT = Path(__file__).resolve().parents[2]
HERE = {name: replace(stage, isolated=False) for name, stage in REGISTRY.items()}
_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(["torch", "transformers", "modelopt.torch.quantization", "pandas", "tasks.runner"])
# The smallest real build: every stage does its work, none for long, and nothing depends on how good the model is.
SMALL = (
    "quantize.calibration.samples=48",
    "draft.data.samples=192",
    "draft.training.epochs=2",
    "draft.training.ttt_steps=2",
    "draft.training.sequence_length=192",
    "validate.accuracy.samples=8",
    "validate.accuracy.margin=0.9",
    "validate.accuracy.underpowered=warn",
    "validate.latency.requests=6",
    "validate.gates=[]",
)


class Chain:
    """The stages of the tiny spec in one store, each run in a process of its own."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.overrides = [*SMALL, f"deploy.port={port}"]
        self.store = open_store(folder / "store")
        self.receipts: dict[str, Receipt] = {}

    def up_to(self, stage: str) -> None:
        """Build what the stage needs."""
        for name in list(REGISTRY)[: list(REGISTRY).index(stage)]:
            if name not in self.receipts:
                self.run(name)

    def run(self, stage: str) -> tuple[float, list[tuple[float, str]]]:
        """To the end; returns the seconds it took and the progress events (done, note)."""
        process, channel = self._start(stage)
        events: list[tuple[float, str]] = []
        while "receipt" not in (message := channel.recv()):
            assert "error" not in message, message["error"]
            events.append((message["done"], message["note"]))
        process.join()
        self.receipts[stage] = Receipt.from_json(message["receipt"])
        return self.receipts[stage].seconds, events

    def kill(self, stage: str, after_s: float) -> None:
        """Start the stage and kill -9 it that long after it began to build."""
        process, channel = self._start(stage)
        channel.recv()
        time.sleep(after_s)
        process.kill()  # SIGKILL
        process.join()

    def manifest(self, stage: str) -> Manifest:
        return self.store.load(self.receipts[stage].uri)

    def work(self, stage: str) -> Path:
        """Where a killed build left its parts."""
        return self.store.local.root / "work" / f"{stage}-{self.receipts[stage].key[:16]}"

    def _start(self, stage: str) -> tuple[Any, Connection]:
        ours, theirs = _fork.Pipe(duplex=False)
        receipts = {name: receipt.to_json() for name, receipt in self.receipts.items() if name != stage}
        process = _fork.Process(target=_run, args=(stage, self.overrides, receipts, self.folder / "store", theirs))
        process.start()
        theirs.close()
        return process, ours


def _run(stage: str, overrides: list[str], receipts: dict[str, Any], store: Path, channel: Connection) -> None:
    from tasks.runner import StageEvent, run_stage

    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    os.chdir(store.parent)

    def tell(event: StageEvent) -> None:
        if event.kind in ("progress", "note"):
            channel.send({"done": event.done, "note": event.text})

    spec = load_spec(ROOT / "specs/tiny-llama4-cpu.yaml", overrides)
    given = {name: Receipt.from_json(record) for name, record in receipts.items()}
    extra = {"receipts": list(receipts.values()), "last_good": None, "build": "crash-test"}
    try:
        receipt = run_stage(stage, spec, given, open_store(store), tell, registry=HERE, extra=extra)
        channel.send({"receipt": json.loads(json.dumps(receipt.to_json()))})
    except KilotokError as error:
        channel.send({"error": str(error)})
