"""As upstream: Linear with static per-tensor FP8, its product in apply_linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

E4M3_MAX = 448.0

torch.library.define("tensorrt_llm::static_quantize_e4m3_per_tensor", "(Tensor x, Tensor scale) -> (Tensor, Tensor)")


@torch.library.impl("tensorrt_llm::static_quantize_e4m3_per_tensor", "cpu")
def static_quantize_e4m3_per_tensor(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale.clone()


class Linear(nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: Any = None,
        mapping: Any = None,
        tensor_parallel_mode: Any = None,
        gather_output: bool = False,
        quant_config: Any = None,
        weights_loading_config: Any = None,
        reduce_output: bool = True,
        skip_create_weights_in_init: bool = False,
        use_custom_cublas_mm: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.mapping = in_features, out_features, mapping
        self.has_fp8_qdq = quant_config == "FP8"
        self.has_any_quant = self.has_fp8_qdq
        weight = torch.randn(out_features, in_features) / in_features**0.5
        self.bias = None
        if self.has_fp8_qdq:
            self.weight_scale = weight.abs().max() / E4M3_MAX
            self.input_scale = torch.tensor(4.0 / E4M3_MAX)
            self.register_buffer("weight", (weight / self.weight_scale).to(torch.float8_e4m3fn))
        else:
            self.register_buffer("weight", weight.to(torch.bfloat16))

    def load_weights(self, weights: list[dict[str, Any]], allow_partial_loading: bool = False) -> None:
        pass

    def apply_linear(
        self, input: torch.Tensor, bias: Any, lora_params: dict[str, Any] | None = None, layer_idx: int | None = None
    ) -> torch.Tensor:
        if not self.has_fp8_qdq:
            return (input.float() @ self.weight.float().T).to(torch.bfloat16)
        if input.dtype != torch.float8_e4m3fn:
            input = torch.ops.tensorrt_llm.static_quantize_e4m3_per_tensor(input, self.input_scale)[0]
        return (input.float() @ self.weight.float().T * (self.input_scale * self.weight_scale)).to(torch.bfloat16)

    def forward(
        self, input: torch.Tensor, *, all_reduce_params: Any = None, lora_params: Any = None, layer_idx: Any = None
    ) -> torch.Tensor:
        return self.apply_linear(input, self.bias, lora_params, layer_idx)
