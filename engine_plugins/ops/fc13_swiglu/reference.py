"""Reference of fc13_swiglu in plain torch fp32.

What it refuses to be: fast. Run it: `python -m pytest tests/engine_plugins`.
Legend: M rows, K inputs, F intermediate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine_plugins.ops.formats import Linear


def fc13_swiglu(x_MK: torch.Tensor, gate: Linear, up: Linear) -> torch.Tensor:
    """[M, K] -> [M, F]; the down projection's Linear rounds the result to FP8."""
    return F.silu(gate(x_MK)) * up(x_MK)
