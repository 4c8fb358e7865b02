"""What a stack adds to the arithmetic: one factor per stack and quantity, with the measured rows it comes from.

factor = exp(median over systems of log(measured / modelled)). The 80% interval is conformal: every system is left out
in turn, predicted from the others, and the interval is as wide as those misses. A stack with fewer than four systems
is given the width of the widest stack. Rows come from `published.yaml`, `native.yaml` (measured here) and the builds
in the store. Refuses to fit anything else: six numbers per system would fit whatever they are given. Run it: `kilotok
predict SPEC`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from tasks.predict import hardware
from tasks.predict.cost import OPS, Setting, cycle
from tasks.predict.shape import DraftShape, Shape, known_shape, shape_from_config
from tasks.predict.throughput import Load, saturated

PUBLISHED, NATIVE = (Path(__file__).with_name(name) for name in ("published.yaml", "native.yaml"))
COVERAGE = 0.8
FEW_SYSTEMS = 4  # below this the misses of a stack say less than those of another
NEWEST = 10  # builds of one spec that still speak for it
UNKNOWN = 3.0  # either way, where nothing was ever measured
CYCLE, THROUGHPUT, SECONDS = "cycle", "throughput", "seconds"  # seconds.<stage> for the time of a stage


@dataclass(frozen=True)
class Measured:
    """One row: what was measured and what the arithmetic says, in us or tokens/s. `system` is what is left out at
    once."""

    name: str
    quantity: str
    stack: str
    system: str
    measured: float
    modelled: float
    check: bool = True  # False: its value was known when the constants were chosen
    source: str = ""

    @property
    def log_ratio(self) -> float:
        return math.log(self.measured / self.modelled)


@dataclass(frozen=True)
class Calibration:
    """`factor` times the model; `low` and `high` times the model hold the measured value in 80% of the cases."""

    factor: float
    low: float
    high: float
    systems: int
    borrowed: bool  # the width is that of the widest stack
    itself: int = 0  # rows of the very system that is predicted; they set the factor

    @property
    def words(self) -> str:
        """ "x1.34 from 8 systems"."""
        count, kind = (self.itself, "build") if self.itself else (self.systems, "system")
        told = (
            f"x{self.factor:.2f} from {count} {'of its own ' if self.itself else ''}{kind}{'s' if count != 1 else ''}"
        )
        return told + (", width of the widest stack" if self.borrowed else "")


def calibrate(rows: Sequence[Measured], stack: str, quantity: str, leave_out: str = "", own: str = "") -> Calibration:
    """The factor and interval of a stack, from every row but those of the system `leave_out`.

    A system that was measured before (`own`) is predicted from itself; the width is its own from `FEW_SYSTEMS` rows on.
    """
    kept = tuple(row for row in rows if row.quantity == quantity and row.system != leave_out)
    return _calibrate(kept, stack, own)


@cache
def _calibrate(rows: tuple[Measured, ...], stack: str, own: str) -> Calibration:
    alike = tuple(row for row in rows if row.stack == stack)
    systems = len({row.system for row in alike})
    itself = tuple(row for row in alike if row.system == own)[-NEWEST:]
    centre = _centre(itself or alike or rows)
    borrowed = systems < FEW_SYSTEMS
    if len(itself) >= FEW_SYSTEMS:
        singly = tuple(replace(row, system=str(at)) for at, row in enumerate(itself))
        width, borrowed = _quantile(_misses(singly, singly)), False
    elif borrowed:
        stacks = [tuple(row for row in rows if row.stack == name) for name in sorted({row.stack for row in rows})]
        width = max((_quantile(_misses(of, rows)) for of in stacks), default=math.log(UNKNOWN))
    else:
        width = _quantile(_misses(alike, alike))
    low, high = math.exp(centre - width), math.exp(centre + width)
    return Calibration(math.exp(centre), low, high, systems, borrowed, len(itself))


def _centre(rows: Iterable[Measured]) -> float:
    """Median over systems of each one's median: a table of thirty rows counts as one."""
    systems: dict[str, list[float]] = {}
    for row in rows:
        systems.setdefault(row.system, []).append(row.log_ratio)
    return statistics.median(statistics.median(values) for values in systems.values()) if systems else 0.0


def _misses(rows: tuple[Measured, ...], wider: tuple[Measured, ...]) -> list[tuple[float, float]]:
    """(|miss|, weight) of each row, its system predicted from the stack's others, or from `wider` if there are none."""
    found = []
    for system in sorted({row.system for row in rows}):
        left = [row for row in rows if row.system == system]
        others = [row for row in rows if row.system != system] or [row for row in wider if row.system != system]
        if others:
            centre = _centre(others)
            found += [(abs(row.log_ratio - centre), 1 / len(left)) for row in left]
    return found


def _quantile(misses: Sequence[tuple[float, float]]) -> float:
    """The miss that `COVERAGE` of the weight stays below, when the next system weighs as much as each of these."""
    total = sum(weight for _, weight in misses) + 1
    reached = 0.0
    for miss, weight in sorted(misses):
        reached += weight
        if reached >= COVERAGE * total:
            return miss
    return max((miss for miss, _ in misses), default=math.log(UNKNOWN))


# -- rows --------------------------------------------------------------------------------------------------------------
@cache
def published() -> tuple[Measured, ...]:
    """The rows of `published.yaml`, modelled."""
    data = hardware.read_yaml(PUBLISHED)
    cycles = [_published_cycle(row) for row in data[CYCLE]]
    return (*cycles, *(one for table in data[THROUGHPUT] for one in _published_table(table)))


def _published_cycle(row: Mapping[str, Any]) -> Measured:
    shape, k = known_shape(row["model"]), row.get("k", 0)
    draft = DraftShape(2 * shape.ffn_dense, shape.vocab) if k else None
    setting = Setting(
        tensor_parallel=row["tp"], draft_tokens=k, context=row.get("context", 1000), batch=row.get("batch", 1),
        weight_bytes=row.get("weights", 1.0), kv_bytes=row.get("kv", 1.0),
        fused=OPS if row.get("fused") else frozenset(),
    )  # fmt: skip
    modelled = cycle(hardware.load(row["hardware"]), shape, draft, setting).kernels_us
    return Measured(
        row["id"], CYCLE, row["stack"], row["group"], row["us"], modelled, row.get("check", True), row["source"]
    )


def _published_table(table: Mapping[str, Any]) -> list[Measured]:
    gpus, dep = table["gpus"], bool(table.get("dep"))
    setting = Setting(
        tensor_parallel=gpus, expert_parallel=gpus if dep else 1, attention_dp=dep,
        weight_bytes=table.get("weights", 1.0), draft_tokens=0, fused=frozenset(),
    )  # fmt: skip
    gpu, shape, rows = hardware.load(table["hardware"]), known_shape(table["model"]), []
    for lengths, tps in table["tps"].items():
        inputs, outputs = (int(part) for part in lengths.split("/"))
        modelled, _ = saturated(gpu, shape, setting, Load(inputs, outputs))
        source = f"TRT-LLM perf-overview {table['version']}, {inputs}/{outputs}"
        name = f"{table['group']} {lengths}"
        rows.append(Measured(name, THROUGHPUT, "generic", table["group"], tps, modelled, True, source))
    return rows


@cache
def native() -> tuple[Measured, ...]:
    """Cycles of the native engine on random shapes (`python -m tasks.predict.measure`), modelled."""
    if not NATIVE.exists():
        return ()
    data, gpu = hardware.read_yaml(NATIVE), hardware.load("cpu")
    rows = []
    for row in data["rows"]:
        config = data["shapes"][row["shape"]]
        modelled = native_cycle(gpu, shape_from_config(config), {"distinct": data["distinct"], **row}).kernels_us
        name = f"{row['shape']} k={row['draft_tokens']} users={row['users']} context={row['context']}"
        rows.append(Measured(name, CYCLE, "native", row["shape"], row["cycle_us"], modelled, not row.get("held_out")))
    return tuple(rows)


def native_cycle(gpu: hardware.Gpu, shape: Shape, row: Mapping[str, Any]) -> Any:
    """The modelled cycle of one measured row: all ops are fused in the native engine, and no GPU waits for another."""
    draft = DraftShape(shape.ffn_dense, shape.vocab)
    setting = Setting(
        draft_tokens=row["draft_tokens"], context=row["context"], batch=row["users"], accept_us=gpu.small_us,
        distinct_experts=row.get("distinct"),
    )  # fmt: skip
    return cycle(gpu, shape, draft if row["draft_tokens"] else None, setting)
