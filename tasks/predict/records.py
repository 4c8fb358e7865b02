"""What earlier builds measured: read before a prediction, written after a build, kept in the store's records.

A build leaves its cycle, its speed and the seconds of each stage that it built, each beside what the arithmetic said.
They join the rows of `published.yaml` and `native.yaml`. Refuses to use a row that was modelled with other constants,
and to use a CPU's rows on another CPU. Look at them: `.kilotok/store/records/calibration/`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from specs.errors import StoreError
from tasks.edges import machine
from tasks.predict.calibrate import CYCLE, SECONDS, Measured, native, published
from tasks.predict.hardware import Gpu
from tasks.store import Store

MODEL = 1  # raise when cost.py or stages.py changes what it counts: older rows are then of no use
KEEP = 200  # newest rows
NAME = "calibration/rows"


def model_of(gpu: Gpu) -> str:
    """What a modelled figure was made with: a row is comparable only under the same arithmetic and constants."""
    return f"{MODEL}-{hashlib.sha256(repr(gpu).encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Records:
    """Everything a prediction may know from before. Empty is a fresh checkout."""

    learned: tuple[dict[str, Any], ...] = ()
    last_build: Mapping[str, Any] = field(default_factory=dict)
    download: Path | None = None

    @classmethod
    def read(cls, store: Store, spec: str) -> Records:
        """Three small files; raises nothing for what is not there."""
        learned = [row for row in store.read_json(NAME) or [] if "model" in row]
        last = store.read_json(f"last_good/{spec}") or {}
        found = store.history("download", spec)
        manifest = store.inspect("download", found["key"]).manifest if found else None
        path = store.local.folder(manifest) if manifest else None
        return cls(tuple(learned), last, path if path and path.is_dir() else None)

    def rows(self, gpu: Gpu) -> tuple[Measured, ...]:
        """Published rows, the native engine's, and those of this store; on another CPU only what it measured itself."""
        own = self._own(gpu)
        foreign = bool(gpu.machine) and gpu.machine != self._cpu
        if foreign and (mine := tuple(row for row in own if row.stack == "native")):
            return (*published(), *mine)
        return (*published(), *native(), *own)

    @cached_property
    def _cpu(self) -> str:
        return machine.cpu()

    def _own(self, gpu: Gpu) -> tuple[Measured, ...]:
        return tuple(
            Measured(row["build"], row["quantity"], row["stack"], row["spec"], row["measured"], row["modelled"])
            for row in self.learned
            if row["model"] == model_of(gpu) and (row["stack"] != "native" or row["machine"] == self._cpu)
        )

    def machine_notes(self, gpu: Gpu) -> list[str]:
        """Says so when the constants of a CPU were measured on another one."""
        if not gpu.machine or gpu.machine == self._cpu:
            return []
        known = "its own builds set the factor" if self._own(gpu) else "the first build here will set the factor"
        return [f"constants were measured on {gpu.machine}, this is {self._cpu}: {known}"]

    def last_metrics(self) -> tuple[Mapping[str, float], str]:
        """Metrics and id of the last build that passed."""
        return self.last_build.get("metrics") or {}, str(self.last_build.get("build") or "")


def learn(store: Store, record: Mapping[str, Any], forecast: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Add what a finished build measured; returns the new rows. `forecast` is what was said before it."""
    base = {
        "model": forecast.get("model"), "build": record["build"], "spec": record["spec"], "machine": machine.cpu(),
        "stack": forecast.get("stack"),
    }  # fmt: skip
    rows = []
    cycle_us, modelled = record["metrics"].get("cycle.us"), forecast.get("modelled", {})
    fresh = {stage["stage"]: stage["seconds"] for stage in record["stages"] if stage["state"] == "built"}
    if cycle_us and modelled.get(CYCLE) and "validate" in fresh:
        rows.append({**base, "quantity": CYCLE, "measured": cycle_us, "modelled": modelled[CYCLE]})
    for stage, seconds in fresh.items():
        said = modelled.get(f"{SECONDS}.{stage}")
        if said and seconds > 0:
            rows.append({**base, "quantity": f"{SECONDS}.{stage}", "measured": seconds, "modelled": said})
    if rows and base["stack"]:
        try:
            store.write_json(NAME, [*(store.read_json(NAME) or []), *rows][-KEEP:])
        except StoreError:  # a store that can only be read still predicts
            return []
    return rows
