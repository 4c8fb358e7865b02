"""Reference of moe_top1 in plain torch fp32.

What it refuses to be: fast. Run it: `python -m pytest tests/engine_plugins`.
Legend: M rows, K hidden, E experts. An expert is (gate, up, down).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from engine_plugins.ops.fc13_swiglu.reference import fc13_swiglu
from engine_plugins.ops.formats import Linear
from engine_plugins.ops.router.reference import router

Expert = tuple[Linear, Linear, Linear]


def moe_top1(x_MK: torch.Tensor, router_EK: torch.Tensor, experts: Sequence[Expert], shared: Expert) -> torch.Tensor:
    """[M, K] -> [M, K]: shared(x) + expert(score * x)."""
    gate, up, down = shared
    return down(fc13_swiglu(x_MK, gate, up)) + routed(x_MK, *router(x_MK, router_EK), experts)


def routed(
    x_MK: torch.Tensor, expert_M: torch.Tensor, score_M: torch.Tensor, experts: Sequence[Expert] | Mapping[int, Expert]
) -> torch.Tensor:
    """[M, K] -> [M, K]: each row's expert on score * x; only the chosen experts are looked up."""
    out_MK = torch.zeros_like(x_MK)
    for index in expert_M.unique().tolist():
        gate, up, down = experts[index]
        rows = (expert_M == index).nonzero().squeeze(1)
        out_MK[rows] = down(fc13_swiglu(x_MK[rows] * score_M[rows, None], gate, up))
    return out_MK
