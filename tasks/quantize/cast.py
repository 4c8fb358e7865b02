"""Words of a weight to E4M3 with one scale, exactly, in one pass that also says what the rounding cost.

BF16 goes through `cast.cpp` (5 GB/s on one core here, where torch's own cast of the quotient takes ten times as long);
without a compiler, and for FP16 and FP32 sources, torch writes the same bytes. Refuses to know files or tensors.
Run it: nothing to run; `python -m pytest tests/tasks/test_quantize_convert.py`.
"""

from __future__ import annotations

import ctypes
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine_plugins.compiler import compile_source

E4M3_MAX = 448.0
SOURCE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Loss(ctypes.Structure):
    """Sums over elements: w^2, (w - scale * e4m3(w / scale))^2, and how many lie beyond 448 * scale."""

    _fields_ = [("signal", ctypes.c_double), ("noise", ctypes.c_double), ("clipped", ctypes.c_uint64)]

    def add(self, other: Loss) -> None:
        self.signal += other.signal
        self.noise += other.noise
        self.clipped += other.clipped


@dataclass(frozen=True)
class Caster:
    """The two kernels over a chunk's raw bytes. Thread safe, and the interpreter is free while they run."""

    library: Any = None

    def amax(self, raw: np.ndarray, dtype: str) -> float:
        """Largest magnitude among the elements; inf or NaN if one of them is."""
        if dtype == "F8_E4M3":
            return float("nan") if ((raw & 0x7F) == 0x7F).any() else E4M3_MAX
        if dtype not in SOURCE_DTYPES or raw.size == 0:
            return 0.0  # integers are always finite
        if self.library is None or dtype != "BF16":
            return float(torch.from_numpy(raw).view(SOURCE_DTYPES[dtype]).float().abs().max())
        bits = self.library.kilotok_amax(raw.ctypes.data, raw.size // 2)
        return float(np.array([bits << 16], dtype=np.uint32).view(np.float32)[0])

    def cast(self, raw: np.ndarray, dtype: str, scale: float, out: np.ndarray) -> Loss:
        """Fill `out` (uint8) with E4M3 of element / scale: nearest, ties to even, saturating."""
        loss = Loss()
        if self.library is not None and dtype == "BF16":
            self.library.kilotok_cast(raw.ctypes.data, out.ctypes.data, out.size, scale, ctypes.byref(loss))
            return loss
        weight = torch.from_numpy(raw).view(SOURCE_DTYPES[dtype]).float()
        quotient = weight / torch.tensor(scale)
        quantized = quotient.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        torch.from_numpy(out).copy_(quantized.view(torch.uint8))
        loss.signal = float(weight.square().sum(dtype=torch.float64))
        loss.noise = float((weight - quantized.float() * scale).square().sum(dtype=torch.float64))
        loss.clipped = int((quotient.abs() > E4M3_MAX).sum())
        return loss


@functools.cache
def caster() -> Caster:
    """The C++ kernels, compiled once per process in a second; torch when this machine has no compiler."""
    with tempfile.TemporaryDirectory() as scratch:
        path = compile_source(Path(__file__).with_name("cast.cpp"), Path(scratch))
        if path is None:
            return Caster()
        library = ctypes.CDLL(str(path))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.kilotok_amax.argtypes, library.kilotok_amax.restype = [pointer, size], ctypes.c_uint32
    library.kilotok_cast.argtypes = [pointer, pointer, size, ctypes.c_float, pointer]
    library.kilotok_cast.restype = None
    return Caster(library)
