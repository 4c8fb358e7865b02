"""What quantization does to numbers that set no scale: signal, noise and clipping at every quantizer.

Refuses to judge: `detectors.py` has the limits, `table.py` the columns.
Run it: nothing to run; `python -m pytest tests/tasks/test_quantize.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from tasks.quantize.coverage import quantizer_target
from tasks.quantize.detectors import TensorRow

SLICE = 1 << 26  # elements at a time: in FP32, a weight of packed experts would not fit beside its model


class NoiseMeter:
    """Signal, noise and clipping at each of these quantizers while it is open."""

    def __init__(self, quantizers: Mapping[str, Any]) -> None:
        self._sums: dict[str, list[float]] = {}
        self._quantizers = quantizers
        self._handles = [q.register_forward_hook(self._hook(name)) for name, q in self._quantizers.items()]

    def _hook(self, name: str) -> Any:
        def measure(quantizer: Any, args: Any, output: torch.Tensor) -> None:
            if name.endswith("weight_quantizer") and name in self._sums:
                return  # the same weight at every call
            sums = self._sums.setdefault(name, [0.0, 0.0, 0.0, 0.0])
            limit = math.inf if quantizer.amax is None else float(quantizer.amax.float().max()) * (1 + 1e-6)
            for given, taken in zip(args[0].reshape(-1).split(SLICE), output.reshape(-1).split(SLICE), strict=True):
                x = given.float()
                sums[0] += float(x.square().sum())
                sums[1] += float((x - taken.float()).square().sum())
                sums[2] += float((x.abs() > limit).sum())
                sums[3] += float((x != 0).sum())  # experts are fed zeros for tokens that were not routed to them

        return measure

    def close(self) -> list[TensorRow]:
        """The table's rows; a quantizer that was never called has no row, which `check_quantizers` notices."""
        for handle in self._handles:
            handle.remove()
        rows = []
        for name, (signal, noise, clipped, total) in self._sums.items():
            quantizer = self._quantizers[name]
            amax = float(quantizer.amax.float().max()) if quantizer.amax is not None else math.nan
            sqnr = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else (199.0 if signal > 0 else 0.0)
            rows.append(
                TensorRow(
                    *quantizer_target(name), amax / float(quantizer.maxbound), amax, sqnr, clipped / max(total, 1.0)
                )
            )
        return rows
