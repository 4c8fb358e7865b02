"""A GPU or CPU as six constants, each with where it comes from: `specs/hardware/NAME.yaml`.

Refuses a constant without a source, a negative bandwidth, a price without a currency. Run it: `kilotok predict SPEC`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Gpu:
    """Per device. `t0_us`: from launch to data flowing; `ar_us`: fused all-reduce + RMSNorm of a decode-sized
    message."""

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
    price_per_device_hour: float | None = None
    currency: str | None = None

    @property
    def bytes_per_us(self) -> float:
        return self.hbm_tbs * 1e6


def known() -> list[str]:
    """Names that `load` takes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str, folder: Path = FOLDER) -> Gpu:
    """The hardware of `specs/hardware/NAME.yaml`."""
    path = folder / f"{name}.yaml"
    if not path.exists():
        near = difflib.get_close_matches(name, known(), n=1) or known()
        raise InputError(f"unknown hardware {name!r}", str(folder), f"nearest: {near[0]}; known: {', '.join(known())}")
    return parse(yaml.safe_load(path.read_text()), path)


def parse(data: dict[str, Any], path: Path) -> Gpu:
    """Check every constant for a value above zero and a source."""
    values: dict[str, float] = {}
    for constant in CONSTANTS:
        entry = data.get(constant)
        if not isinstance(entry, dict) or not entry.get("source"):
            raise InputError(f"{constant} has no source", str(path), f"write {constant}: {{value: ..., source: ...}}")
        if not entry["value"] > 0:
            raise InputError(
                f"{constant} is {entry['value']}", str(path), "give a value above 0 in the unit of its name"
            )
        values[constant] = float(entry["value"])
    price = data.get("price_per_device_hour")
    if price and not price.get("currency"):
        raise InputError(
            "price_per_device_hour has no currency",
            str(path),
            "write price_per_device_hour: {value: 3.5, currency: USD, source: ...}",
        )
    return Gpu(
        data["name"],
        int(data["devices"]),
        price_per_device_hour=price["value"] if price else None,
        currency=price["currency"] if price else None,
        **values,
    )
