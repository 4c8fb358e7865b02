"""As upstream: Llama 4 with the modules of its min-latency path, in modeling_llama_min_latency's shapes and names."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tensorrt_llm._torch.distributed import AllReduce, AllReduceFusionOp, AllReduceParams
from tensorrt_llm._torch.models.modeling_utils import register_auto_model
from tensorrt_llm._torch.modules.linear import E4M3_MAX, Linear


def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def attention_scale(positions: torch.Tensor) -> torch.Tensor:
    return (torch.log(torch.floor((positions.float() + 1) / 8192) + 1) * 0.1 + 1)[:, None]


class Llama4MinLatencyLinear(Linear):
    def __init__(self, *args: Any, q_size: int = 0, enable_fused_gemm_swiglu: bool = False, **more: Any) -> None:
        super().__init__(*args, **more)
        self.q_size, self.enable_fused_gemm_swiglu = q_size, enable_fused_gemm_swiglu
        self.position_ids: torch.Tensor | None = None
        if self.has_fp8_qdq:
            self.combined_scale = self.input_scale * self.weight_scale

    def apply_linear(self, input: torch.Tensor, bias: Any, lora_params: Any = None, layer_idx: Any = None) -> Any:
        made = super().apply_linear(input, bias, lora_params, layer_idx)
        if self.position_ids is not None:
            q = made[:, : self.q_size].float() * attention_scale(self.position_ids)
            made = torch.cat([q.to(torch.bfloat16), made[:, self.q_size :]], dim=1)
        if self.enable_fused_gemm_swiglu:
            wide = swiglu(made.float()) * self.inv_output_scale
            made = wide.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        return made

    def set_position_ids(self, position_ids: torch.Tensor | None = None) -> None:
        self.position_ids = position_ids


class Llama4MinLatencyGatedMLP(nn.Module):
    def __init__(self, *, hidden_size: int, intermediate_size: int, bias: bool, config: Any) -> None:
        super().__init__()
        make = functools.partial(Llama4MinLatencyLinear, bias=bias, quant_config=config.quant)
        self.gate_up_proj = make(hidden_size, 2 * intermediate_size, enable_fused_gemm_swiglu=True)
        self.down_proj = make(intermediate_size, hidden_size)
        self.gate_up_proj.inv_output_scale = 1.0 / self.down_proj.input_scale

    def forward(self, x: torch.Tensor, final_all_reduce_params: AllReduceParams | None = None) -> torch.Tensor:
        return self.down_proj(self.gate_up_proj(x), all_reduce_params=final_all_reduce_params)


class Llama4MinLatencyFusedMoE(nn.Module):
    """Top-1: the score, sigmoid of the logit, multiplies the input."""

    def __init__(self, *, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        size = (num_experts, 2 * intermediate_size, hidden_size)
        self.register_buffer("w3_w1_weight", torch.randn(size).mul(40).to(torch.float8_e4m3fn))
        self.register_buffer(
            "w2_weight", torch.randn(num_experts, hidden_size, intermediate_size).mul(40).to(torch.float8_e4m3fn)
        )
        self.fc31_input_dequant = torch.tensor(4.0 / E4M3_MAX)
        self.fc31_dequant = torch.full((num_experts,), 0.01) * self.fc31_input_dequant  # weight x input scale
        self.fc2_quant = torch.tensor(50.0)
        self.fc2_dequant = torch.full((num_experts,), 0.01) / self.fc2_quant

    def load_weights(self, weights: list[dict[str, Any]]) -> None:
        pass

    def forward(
        self, x: torch.Tensor, router_logits: torch.Tensor, output_dtype: Any = None, x_high: Any = None
    ) -> torch.Tensor:
        score, expert = torch.sigmoid(router_logits.float()).max(dim=-1)
        scored = (x_high.float() * score[:, None]).to(torch.bfloat16)
        quantize = torch.ops.tensorrt_llm.static_quantize_e4m3_per_tensor
        rows = []
        for row, e in zip(quantize(scored, self.fc31_input_dequant)[0].float(), expert.tolist(), strict=True):
            up, gate = (self.w3_w1_weight[e].float() @ row * self.fc31_dequant[e]).chunk(2)
            hidden = quantize(F.silu(gate) * up, 1.0 / self.fc2_quant)[0].float()
            rows.append(self.w2_weight[e].float() @ hidden * self.fc2_dequant[e])
        return torch.stack(rows).to(torch.bfloat16)


class Llama4MinLatencyMoE(nn.Module):
    def __init__(self, *, num_experts: int, hidden_size: int, intermediate_size: int, config: Any) -> None:
        super().__init__()
        self.shared_expert = Llama4MinLatencyGatedMLP(
            hidden_size=hidden_size, intermediate_size=intermediate_size, bias=False, config=config
        )
        self.experts = Llama4MinLatencyFusedMoE(
            num_experts=num_experts, hidden_size=hidden_size, intermediate_size=intermediate_size
        )
        self.router = Llama4MinLatencyLinear(hidden_size, num_experts, bias=False, quant_config=None)
        self.all_reduce = AllReduce()
        self.mapping, self.enable_attention_dp = self.all_reduce.mapping, False

    def forward(
        self,
        hidden_states: torch.Tensor,
        all_rank_num_tokens: Any = None,
        final_all_reduce_params: AllReduceParams | None = None,
        hidden_states_high: torch.Tensor | None = None,
    ) -> torch.Tensor:
        logits = self.router(hidden_states_high)
        routed = self.experts(hidden_states, logits, x_high=hidden_states_high)
        made = self.shared_expert(hidden_states) + routed
        return self.all_reduce(made, all_reduce_params=final_all_reduce_params) if self.mapping.tp_size > 1 else made


class Llama4MinLatencyAttention(nn.Module):
    def __init__(self, config: Any, nope_layer: bool) -> None:
        super().__init__()
        self.nope_layer, self.q_size, self.kv_size = nope_layer, config.q_size, config.kv_size
        self.head_dim, self.floor_scale, self.attn_scale = config.kv_size, 8192.0, 0.1
        make = functools.partial(Llama4MinLatencyLinear, bias=False, quant_config=config.quant)
        self.qkv_proj = make(config.hidden_size, self.q_size + 2 * self.kv_size, q_size=self.q_size)
        self.o_proj = Linear(self.q_size, config.hidden_size, bias=False, quant_config=config.quant)

    def forward(self, position_ids: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.nope_layer:
            self.qkv_proj.set_position_ids(position_ids)
        q = self.qkv_proj(hidden_states)[:, : self.q_size]
        return self.o_proj(q)


class Llama4MinLatencyDecoderLayer(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Llama4MinLatencyAttention(config, nope_layer=(layer_idx + 1) % 4 == 0)
        self.is_mlp_layer = layer_idx % 2 == 0
        sizes = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size, "config": config}
        self.feed_forward: Any = (
            Llama4MinLatencyGatedMLP(bias=False, **sizes)
            if self.is_mlp_layer
            else Llama4MinLatencyMoE(num_experts=config.num_experts, **sizes)
        )
        self.register_buffer("norm_weight", torch.ones(config.hidden_size, dtype=torch.bfloat16))
        self.all_reduce = AllReduce()

    def forward(self, position_ids: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor) -> Any:
        attended = self.self_attn(position_ids, hidden)
        dense = self.is_mlp_layer
        gate_up = self.feed_forward.gate_up_proj if dense else self.feed_forward.shared_expert.gate_up_proj
        fusion = "RESIDUAL_RMS_NORM_QUANT_FP8" if dense else "RESIDUAL_RMS_NORM_OUT_QUANT_FP8"
        params = AllReduceParams(
            fusion_op=AllReduceFusionOp[fusion],
            residual=residual,
            norm_weight=self.norm_weight,
            scale=gate_up.input_scale,
            eps=1e-5,
        )
        *high, quantized, residual = self.all_reduce(attended, all_reduce_params=params)
        return self.feed_forward(quantized) if dense else self.feed_forward(
            quantized, hidden_states_high=high[0]
        ), residual


@register_auto_model("Llama4ForConditionalGeneration")
class Llama4ForConditionalGeneration(nn.Module):
    """`model.layers`, and a draft whose modules have the target's names."""

    def __init__(self, model_config: Any = None) -> None:
        super().__init__()
        config = model_config or SimpleNamespace(
            hidden_size=64, q_size=80, kv_size=16, intermediate_size=32, num_experts=4, num_layers=4, quant="FP8"
        )
        self.config = config
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Llama4MinLatencyDecoderLayer(config, i) for i in range(config.num_layers))
        self.draft_model = nn.Module()
        self.draft_model.qkv_proj = Linear(config.hidden_size, 3 * config.hidden_size, bias=False)

    def load_weights(self, weights: dict[str, Any]) -> None:
        for module in self.modules():
            if module is not self and hasattr(module, "load_weights"):
                module.load_weights([weights])

    def forward(self, position_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        residual = hidden
        for layer in self.model.layers:
            hidden, residual = layer(position_ids, hidden, residual)
        return hidden + residual
