"""A GPU or CPU as a page of constants, each with where it comes from: `specs/hardware/NAME.yaml`.

Refuses a constant without a source, a bandwidth that is not above zero, a price without a currency.
Run it: `kilotok predict SPEC --set hardware=h200`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from specs.errors import InputError

FOLDER = Path(__file__).resolve().parents[2] / "specs" / "hardware"
CONSTANTS = (
    "hbm_tbs",
    "memory_gb",
    "hbm_eff",
    "t0_us",
    "small_us",
    "attn_us",
    "ar_us",
    "ar_unfused_us",
    "ar_floor_us",
    "fp8_tflops",
)
# name -> value when the file does not say: no cache worth counting, reading hidden behind arithmetic or the reverse,
# weights multiplied as they are stored.
OPTIONAL = {
    "bf16_tflops": 0.0,
    "fp4_tflops": 0.0,
    "attn_tflops": 0.0,
    "flop_eff": 1.0,
    "link_gbs": 0.0,
    "overlap": 1.0,
    "cache_mb": 0.0,
    "cache_tbs": 0.0,
    "unpack_rows": 0.0,
    "unpack_bf16_rows": 0.0,
    "row_us": 0.0,
    "host_us": 0.0,
}


@dataclass(frozen=True)
class Gpu:
    """Per device. `t0_us`: from launch to data flowing; `ar_us`: fused all-reduce + RMSNorm of a decode-sized message;
    `overlap`: share of the shorter of reading and computing that the longer hides; `unpack_rows`: a weight takes at
    least as long as so many rows of multiply-adds; `row_us`: per row, layer and 1,000 hidden elements; `host_us`: per
    cycle."""

    name: str
    devices: int
    hbm_tbs: float
    memory_gb: float
    hbm_eff: float
    t0_us: float
    small_us: float
    attn_us: float
    ar_us: float
    ar_unfused_us: float
    ar_floor_us: float
    fp8_tflops: float
    bf16_tflops: float = 0.0
    fp4_tflops: float = 0.0
    attn_tflops: float = 0.0
    flop_eff: float = 1.0
    link_gbs: float = 0.0
    overlap: float = 1.0
    cache_mb: float = 0.0
    cache_tbs: float = 0.0
    unpack_rows: float = 0.0
    unpack_bf16_rows: float = 0.0
    row_us: float = 0.0
    host_us: float = 0.0
    price_per_device_hour: float | None = None
    currency: str | None = None
    machine: str = (
        ""  # a CPU's, as `tasks.edges.machine` names it: constants belong to the machine they were measured on
    )

    @property
    def bytes_per_us(self) -> float:
        return self.hbm_tbs * 1e6

    @property
    def memory_gib(self) -> float:
        return self.memory_gb * 1e9 / 2**30

    def flops_per_us(self, weight_bytes: float) -> float:
        """Sustained floating-point operations per us for weights of this width (0.5625: NVFP4 with its scales)."""
        if weight_bytes >= 2:
            peak = self.bf16_tflops or self.fp8_tflops / 2
        else:
            peak = self.fp8_tflops if weight_bytes >= 1 else self.fp4_tflops or self.fp8_tflops
        return peak * 1e6 * self.flop_eff

    def message_us(self, bytes_: float) -> float:
        """Wire time of an all-reduced message, once out and once back; nothing where the link is not described."""
        return 2 * bytes_ / (self.link_gbs * 1e3) if self.link_gbs else 0.0


def read_yaml(path: Path) -> Any:
    """With libyaml where it is built in: `kilotok plan` counts milliseconds."""
    with path.open(encoding="utf-8") as stream:
        return yaml.load(stream, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def known() -> list[str]:
    """Names that `load` takes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@cache
def load(name: str, where: str = "hardware") -> Gpu:
    """The hardware of `specs/hardware/NAME.yaml`. `where` is what named it, for the error."""
    path = FOLDER / f"{name}.yaml"
    if not path.exists():
        near = difflib.get_close_matches(name.lower(), known(), n=1, cutoff=0.3)
        nearest = f"nearest: {near[0]}; " if near else ""
        raise InputError(f"unknown hardware {name!r}", where, f"{nearest}known: {', '.join(known())}")
    return parse(read_yaml(path), path)


def parse(data: dict[str, Any], path: Path) -> Gpu:
    """Check every constant for a value above zero and a source."""
    values: dict[str, float] = {}
    known_names = {*CONSTANTS, *OPTIONAL, "name", "devices", "machine", "price_per_device_hour"}
    for constant in sorted(set(data) - known_names):
        near = difflib.get_close_matches(constant, known_names, n=1)
        raise InputError(f"unknown constant {constant!r}", str(path), f"did you mean {near[0]}?" if near else "drop it")
    for constant in (*CONSTANTS, *(name for name in OPTIONAL if name in data)):
        values[constant] = _constant(constant, data.get(constant), path)
    price = data.get("price_per_device_hour")
    if price and not price.get("currency"):
        raise InputError(
            "price_per_device_hour has no currency",
            str(path),
            f"write price_per_device_hour: {{value: {price.get('value', 3.5)}, currency: USD, source: ...}}",
        )
    if price:
        _constant("price_per_device_hour", price, path)
    return Gpu(
        data["name"],
        int(data["devices"]),
        price_per_device_hour=float(price["value"]) if price else None,
        currency=price["currency"] if price else None,
        machine=str(data.get("machine", "")),
        **values,
    )


def _constant(name: str, entry: Any, path: Path) -> float:
    if not isinstance(entry, dict) or "value" not in entry or not entry.get("source"):
        given = entry.get("value", "...") if isinstance(entry, dict) else entry if entry is not None else "..."
        raise InputError(f"{name} has no source", str(path), f"write {name}: {{value: {given}, source: ...}}")
    value = entry["value"]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{name} is {value!r}", str(path), "give a number in the unit of its name")
    if name == "overlap" and 0 <= value <= 1:
        return float(value)
    if not value > 0 or value == float("inf"):
        nearest = f"; did you mean {-value}?" if value < 0 else ""
        raise InputError(f"{name} is {value}", str(path), f"give a value above 0 in the unit of its name{nearest}")
    return float(value)
