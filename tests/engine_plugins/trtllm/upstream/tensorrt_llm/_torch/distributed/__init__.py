"""As upstream: AllReduce with its fusions. One process: the sum over the ranks is the input."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


class AllReduceFusionOp(IntEnum):
    NONE = 0
    RESIDUAL_RMS_NORM = 1
    RESIDUAL_RMS_NORM_QUANT_FP8 = 4
    RESIDUAL_RMS_NORM_OUT_QUANT_FP8 = 6


@dataclass
class AllReduceParams:
    strategy: Any = None
    fusion_op: AllReduceFusionOp = AllReduceFusionOp.NONE
    residual: torch.Tensor | None = None
    norm_weight: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    eps: float = 1e-6
    enable_allreduce: bool = True


class AllReduce(nn.Module):
    def __init__(self, mapping: Any = None, strategy: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.mapping = mapping or SimpleNamespace(tp_size=1, tp_rank=0, tp_group=[0])
        self.workspace = torch.zeros(1)

    def forward(self, input: torch.Tensor, *, all_reduce_params: AllReduceParams | None = None) -> Any:
        params = all_reduce_params
        if params is None or params.fusion_op == AllReduceFusionOp.NONE:
            return input
        residual = (input.float() + params.residual.float()).to(torch.bfloat16)
        wide = residual.float()
        norm = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + params.eps) * params.norm_weight.float()
        norm = norm.to(torch.bfloat16)
        if params.fusion_op == AllReduceFusionOp.RESIDUAL_RMS_NORM:
            return norm, residual
        quantized = torch.ops.tensorrt_llm.static_quantize_e4m3_per_tensor(norm, params.scale)[0]
        if params.fusion_op == AllReduceFusionOp.RESIDUAL_RMS_NORM_QUANT_FP8:
            return quantized, residual
        return norm, quantized, residual
