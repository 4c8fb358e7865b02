"""Reference of allreduce_rmsnorm in plain torch fp32, on one process with every part or on one process per part.

What it refuses to be: fast. Run it: `python -m pytest tests/engine_plugins`.
Legend: M rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed

from engine_plugins.ops.formats import fake_quantize_e4m3


def rmsnorm(x_MH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return x_MH * torch.rsqrt(x_MH.pow(2).mean(-1, keepdim=True) + eps) * weight_H


def allreduce_rmsnorm(
    parts: Sequence[torch.Tensor],
    residual_MH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rounded norm [M, H], new residual [M, H]); the parts are summed in rank order."""
    residual_MH = residual_MH + sum(parts)
    return fake_quantize_e4m3(rmsnorm(residual_MH, weight_H, eps), scale), residual_MH


def allreduce_rmsnorm_of_group(
    part_MH: torch.Tensor,
    residual_MH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    scale: float | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with one part per process of a torch.distributed group.

    Parts are gathered, not reduced by the backend: every rank adds them in rank order and gets the same bits.
    """
    parts = [torch.empty_like(part_MH) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, part_MH, group)
    return allreduce_rmsnorm(parts, residual_MH, weight_H, eps, scale)
