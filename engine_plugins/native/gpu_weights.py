"""A bundle's weights as the GPU ops take them: row-major [N, K], one combined scale per row.

What it is: one matrix after the other goes to the device packed and is put in order there; E4M3 stays E4M3, BF16 stays
BF16, nothing becomes fp32. E4M3 weights without an input scale become BF16, exactly, and keep their row scales.
What it refuses to be: a second format on disk; one bundle serves the CPU and the GPU.
Run it: `python -m pytest tests/engine_plugins/test_gpu_backend.py`.
Legend: N outputs, K inputs, E experts, F intermediate (padded to 16, as in the bundle).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine_plugins.native.bundle import Bundle
from engine_plugins.native.checkpoint import Tensors
from specs.errors import InputError

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Matrix:
    """A linear layer. `scale` [N] holds the input's scale too; `inv_scale` [1] is 1 / that, None for BF16 inputs."""

    weight: Tensor  # [N, K] or [E, N, K]
    scale: Tensor | None
    inv_scale: Tensor | None

    @property
    def fp8(self) -> bool:
        """Takes E4M3 inputs."""
        return self.inv_scale is not None


def in_order(packed: Tensor, n: int, k: int) -> Tensor:
    """[.., N/16, K/2, 16, 2] -> [.., N, K]; the inverse of layout.pack."""
    groups, pairs = packed.shape[-4:-2]
    rows = packed.transpose(-3, -2).reshape(*packed.shape[:-4], groups * 16, pairs * 2)
    return rows[..., :n, :k].contiguous()


def gate_then_up(both: Tensor) -> Tensor:
    """[.., 2F, K] in alternating groups of 16 rows -> gate rows, then up rows; the inverse of layout.alternate."""
    lead, (rows, k) = both.shape[:-2], both.shape[-2:]
    return both.reshape(*lead, rows // 32, 2, 16, k).transpose(-4, -3).reshape(*lead, rows, k)


class WeightFile:
    """One of a bundle's safetensors files."""

    def __init__(self, bundle: Bundle, file: str, device: torch.device) -> None:
        self._file, self._device = Tensors(bundle.path / file), device
        self._shapes: dict[str, list[int]] = bundle.record["matrices"]

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def names(self) -> list[str]:
        """Sorted tensor names."""
        return self._file.names()

    def vector(self, name: str) -> Tensor:
        """fp32."""
        return torch.from_numpy(np.array(self._file.float32(name), np.float32)).to(self._device)

    def number(self, name: str, default: float) -> float:
        """One float, or the default."""
        return float(self._file.scalar(name, default) or default)

    def rows(self, name: str) -> Tensor:
        """A row-major BF16 or int32 tensor."""
        return self._to_device(name)

    def matrix(self, name: str, *, gated: bool = False) -> Matrix:
        """A linear layer, or a stack of experts'."""
        n, k = self._shapes[name][-2:]
        order: Any = gate_then_up if gated else lambda rows: rows
        weight = order(in_order(self._to_device(name), n, k))
        if weight.dtype != torch.uint8:
            return Matrix(weight, None, None)
        weight = weight.view(E4M3)
        scale = order(self.vector(f"{name}.weight_scale")[..., :n, None].contiguous())[..., 0].contiguous()
        given = self._file.scalar(f"{name}.input_scale")
        if given is None:
            return Matrix(weight.bfloat16(), scale, None)
        inverse = torch.full((1,), 1.0 / given, dtype=torch.float32, device=self._device)
        return Matrix(weight, scale * given, inverse)

    def _to_device(self, name: str) -> Tensor:
        raw = np.array(self._file.raw(name))  # one matrix, out of the memory map
        if raw.dtype == np.uint16:
            return torch.from_numpy(raw.view(np.int16)).to(self._device).view(torch.bfloat16)
        return torch.from_numpy(raw).to(self._device)


def one_scale(matrix: Matrix, name: str) -> Tensor:
    """The scale that all rows of a down projection share: [1], or [E] of a stack."""
    assert matrix.scale is not None
    first = matrix.scale[..., :1]
    if not bool((matrix.scale == first).all()):
        raise InputError(f"{name} has one scale per row", "moe_top1", "quantize with one weight scale per expert")
    return first.reshape(-1).contiguous()
