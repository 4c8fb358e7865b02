"""Reference of moe_top1 in plain torch fp32.

What it refuses to be: fast. Run it: `python -m pytest tests/engine_plugins`.
Legend: M rows, K hidden, E experts. An expert is (gate, up, down).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine_plugins.ops.fc13_swiglu.reference import fc13_swiglu
from engine_plugins.ops.formats import Linear
from engine_plugins.ops.router.reference import router

Expert = tuple[Linear, Linear, Linear]


def moe_top1(x_MK: torch.Tensor, router_EK: torch.Tensor, experts: Sequence[Expert], shared: Expert) -> torch.Tensor:
    """[M, K] -> [M, K]: shared(x) + expert(score * x)."""
    expert_M, score_M = router(x_MK, router_EK)
    out_MK = shared[2](fc13_swiglu(x_MK, shared[0], shared[1]))
    for index, (gate, up, down) in enumerate(experts):
        rows = (expert_M == index).nonzero().squeeze(1)
        if rows.numel():
            out_MK[rows] += down(fc13_swiglu(x_MK[rows] * score_M[rows, None], gate, up))
    return out_MK
