"""Reference of gemm_low_latency in plain torch fp32.

What it refuses to be: fast. Run it: `python -m pytest tests/engine_plugins`.
Legend: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import torch

from engine_plugins.ops.formats import Linear


def gemm_low_latency(x_MK: torch.Tensor, linear: Linear) -> torch.Tensor:
    """[M, K] fp32 -> [M, N] fp32."""
    return linear(x_MK)
