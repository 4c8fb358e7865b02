"""What an operator promises: its axes, their limits, its formats and how far it may be from the reference.

What it is: one frozen record per op, with a check that names the axis, its value and the limit.
What it refuses to be: a registry with side effects; ops are plain folders, found by their name.
Run it: `python -m pytest tests/engine_plugins/test_contract.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from specs.errors import InputError


@dataclass(frozen=True)
class Axis:
    """Allowed sizes of one axis: low..high in steps of `multiple`."""

    low: int = 1
    high: int = 1 << 31
    multiple: int = 1

    def admits(self, size: int) -> bool:
        """True when the size is inside the contract."""
        return self.low <= size <= self.high and size % self.multiple == 0


@dataclass(frozen=True)
class OpContract:
    """`tolerance` counts steps of the output format around the fp32 reference (1 = the neighbouring value is fine).

    `axes` are the CPU's limits; `gpu_axes` those of the CUDA and Triton versions, which take 16-byte loads.
    """

    name: str
    does: str
    axes: Mapping[str, Axis]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    tolerance: float = 1.0
    notes: str = ""
    gpu_axes: Mapping[str, Axis] = field(default_factory=dict)

    def check(self, device: str = "cpu", **sizes: int) -> None:
        """Raise InputError for the first axis outside the device's limits, or one the contract does not know."""
        limits = self.axes if device == "cpu" else {**self.axes, **self.gpu_axes}
        for axis, size in sizes.items():
            if axis not in limits:
                raise InputError(f"unknown axis {axis!r}", self.name, f"axes: {', '.join(limits)}")
            limit = limits[axis]
            if not limit.admits(size):
                raise InputError(
                    f"{axis}={size} is outside the contract",
                    self.name,
                    f"{limit.low} <= {axis} <= {limit.high}, a multiple of {limit.multiple}",
                )
