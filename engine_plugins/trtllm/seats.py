"""Where each op sits in TensorRT-LLM's Llama 4: one class per kind of module, which calls the op or upstream's code.

A seat is mixed into the module's class, so weights, loading and parallelism stay upstream's. What differs between the
two sides is handled here, once and at warm-up, before a CUDA graph is captured: products of scales; and since our
experts have gate before up (upstream stores up first), `moe_top1` keeps a second copy of the experts' first weights:
1.3 GB per layer and GPU for Maverick, known to upstream's memory estimate because it is made while weights load.

It refuses a shape outside the op's contract, more tokens than the op is for, and a layer without static FP8 scales:
upstream's code runs, and the reason is in the evidence.

Run it: `python -m pytest tests/engine_plugins/trtllm/test_adapter.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from specs.errors import InputError

FEW_TOKENS = 8  # one verify step of up to seven drafts
GEMM_TOKENS = 16


@dataclass
class Seat:
    """What a seated module knows: its op, where to write what happened, its parent's figures, and what it made once."""

    name: str
    op: Callable[..., Any] | None  # torch.ops.kilotok.NAME
    note: Callable[[str, str, int], None]  # op, "ran" or why not, tokens
    parent: dict[str, Any] = field(default_factory=dict)
    made: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made at the first call."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def attempt(self, tokens: int, limit: int, refusal: str, arguments: Callable[[], tuple[Any, ...]]) -> Any:
        """The op's result, or None for upstream's own code."""
        if self.op is None:
            refusal = "absent"
        elif tokens > limit:
            refusal = f"more than {limit} tokens"
        if not refusal:
            try:
                assert self.op is not None
                result = self.op(*arguments())
            except InputError as error:  # outside the op's contract
                refusal = str(error)
            else:
                self.note(self.name, "ran", tokens)
                return result
        self.note(self.name, refusal, tokens)
        return None


class Seated:
    """A module with a seat."""

    kilotok: Seat


def quantized(this: Any, x: Any) -> Any:
    """x as upstream quantizes it, unless it comes in FP8."""
    import torch

    if x.dtype == torch.float8_e4m3fn:
        return x
    return torch.ops.tensorrt_llm.static_quantize_e4m3_per_tensor(x, this.input_scale)[0]


def combined_scale(seat: Seat, layer: Any) -> Any:
    """Input scale x weight scale of a linear layer, fp32 [1]."""
    key = ("scale", layer.weight.data_ptr())
    return seat.once(key, lambda: (layer.input_scale * layer.weight_scale).float().reshape(1))


def not_fp8(layer: Any) -> str:
    import torch

    scales = (getattr(layer, "input_scale", None), getattr(layer, "weight_scale", None))
    static = all(scale is not None and scale.numel() == 1 for scale in scales)
    return "" if static and layer.weight.dtype == torch.float8_e4m3fn else "not a static FP8 layer"


class _Linear(Seated):
    """Linear.apply_linear(input, bias, lora_params, layer_idx); x is [tokens, in], weight [out, in]."""

    def apply_linear(self, input: Any, bias: Any, *rest: Any, **more: Any) -> Any:
        refusal = "bias or LoRA" if bias is not None or any(rest[:1]) or more.get("lora_params") else ""
        made = self.through_op(input, refusal)
        own: Any = super()
        return own.apply_linear(input, bias, *rest, **more) if made is None else made

    def through_op(self, x: Any, refusal: str) -> Any:
        raise NotImplementedError


class Router(_Linear):
    """Logits [tokens, experts] in BF16; the op keeps fp32, which the shape of upstream's next op does not."""

    def through_op(self, x: Any, refusal: str) -> Any:
        import torch

        this: Any = self
        both = (x.dtype, this.weight.dtype) == (torch.bfloat16, torch.bfloat16)
        refusal = refusal or ("" if both else "not BF16")
        made = self.kilotok.attempt(x.shape[0], FEW_TOKENS, refusal, lambda: (x, this.weight))
        return None if made is None else made.to(x.dtype)


class Qkv(_Linear):
    """BF16 [tokens, q + k + v]. Upstream rotates Q and K itself; on NoPE layers it hands over positions for scaling."""

    def through_op(self, x: Any, refusal: str) -> Any:
        layer, seat = _any(self), self.kilotok
        known = {"q_size", "kv_size", "head_dim"} <= seat.parent.keys()
        refusal = refusal or not_fp8(layer) or ("" if known else "the attention around it does not tell its sizes")

        def arguments() -> tuple[Any, ...]:
            positions = getattr(layer, "position_ids", None)
            floor = 0.0 if positions is None else float(seat.parent["floor_scale"])
            positions = None if positions is None else positions.flatten()
            sizes = (int(seat.parent[name]) for name in ("q_size", "kv_size", "head_dim"))
            scaling = (floor, float(seat.parent.get("attn_scale", 0.0)))
            return (quantized(layer, x), layer.weight, combined_scale(seat, layer), positions, None, *sizes, *scaling)

        return seat.attempt(x.shape[0], FEW_TOKENS, refusal, arguments)


class GateUp(_Linear):
    """FP8 silu(gate) * up in units of the down projection's input scale; gate rows come first in the weight."""

    def through_op(self, x: Any, refusal: str) -> Any:
        layer, seat = _any(self), self.kilotok
        if not getattr(layer, "enable_fused_gemm_swiglu", False) or not hasattr(layer, "inv_output_scale"):
            refusal = refusal or "the layer above applies SwiGLU itself"
        refusal = refusal or not_fp8(layer)

        def arguments() -> tuple[Any, ...]:
            inverse = seat.once("inverse", lambda: layer.inv_output_scale.float().reshape(1))
            return quantized(layer, x), layer.weight, combined_scale(seat, layer), inverse

        return seat.attempt(x.shape[0], FEW_TOKENS, refusal, arguments)


class Gemm(_Linear):
    """BF16 [tokens, out]: the output and down projections."""

    def through_op(self, x: Any, refusal: str) -> Any:
        layer, seat = _any(self), self.kilotok

        def arguments() -> tuple[Any, ...]:
            return quantized(layer, x), layer.weight, combined_scale(seat, layer)

        return seat.attempt(x.shape[0], GEMM_TOKENS, refusal or not_fp8(layer), arguments)


class MoE(Seated):
    """Llama4MoE.forward(hidden_states, ..., hidden_states_high=BF16): the shared expert and the chosen one, reduced."""

    def forward(self, hidden_states: Any, *rest: Any, **more: Any) -> Any:
        import torch

        this, seat, own = _any(self), self.kilotok, _any(super())
        high = more.get("hidden_states_high")
        fits = high is not None and hidden_states.dtype == torch.float8_e4m3fn and hasattr(this.experts, "kilotok_w13")
        refusal = "" if fits else "not on the FP8 min-latency path"
        made = seat.attempt(hidden_states.shape[0], FEW_TOKENS, refusal, lambda: self._arguments(hidden_states, high))
        if made is None:
            return own.forward(hidden_states, *rest, **more)
        if getattr(this, "enable_attention_dp", False) or this.mapping.tp_size == 1:
            return made
        return this.all_reduce(made, all_reduce_params=more.get("final_all_reduce_params"))

    def _arguments(self, x8: Any, x: Any) -> tuple[Any, ...]:
        import torch

        this, seat = _any(self), self.kilotok
        experts, gate_up, down = this.experts, this.shared_expert.gate_up_proj, this.shared_expert.down_proj
        first, second = experts.kilotok_w13, experts.w2_weight

        def scales() -> tuple[Any, ...]:
            shared = combined_scale(seat, gate_up).expand(gate_up.weight.shape[0]).contiguous()
            routed = experts.fc31_dequant.float().reshape(-1, 1).expand(first.shape[:2]).contiguous()
            routed2 = experts.fc2_dequant.float().reshape(-1).expand(first.shape[0]).contiguous()
            inputs = (1.0 / experts.fc31_input_dequant, 1.0 / down.input_scale, experts.fc2_quant)
            return shared, routed, routed2, torch.stack([scale.float().reshape(()) for scale in inputs])

        shared, routed, routed2, inverse = seat.once("scales", scales)
        experts_of = (gate_up.weight, shared, down.weight, combined_scale(seat, down), first, routed, second, routed2)
        return (x8, x, this.router(x).float(), *experts_of, inverse)


class Experts(Seated):
    """The routed experts: after their weights are loaded, a copy of the first ones with gate before up."""

    def load_weights(self, *arguments: Any, **more: Any) -> Any:
        import torch

        this, own = _any(self), _any(super())
        result = own.load_weights(*arguments, **more)
        up, gate = this.w3_w1_weight.view(torch.uint8).chunk(2, dim=1)
        this.kilotok_w13 = torch.cat([gate, up], dim=1).view(torch.float8_e4m3fn)
        return result


class AllReduce(Seated):
    """AllReduce.forward(input, all_reduce_params=...) where it ends in a residual, an RMSNorm and an FP8 rounding."""

    def forward(self, input: Any, *, all_reduce_params: Any = None, **more: Any) -> Any:
        own, seat, params = _any(super()), self.kilotok, all_reduce_params
        fusion = getattr(getattr(params, "fusion_op", None), "name", "")
        if fusion not in ("RESIDUAL_RMS_NORM_QUANT_FP8", "RESIDUAL_RMS_NORM_OUT_QUANT_FP8"):
            return own.forward(input, all_reduce_params=all_reduce_params, **more)

        def arguments() -> tuple[Any, ...]:
            addresses, epoch, rank = seat.once("inbox", lambda: inbox(_any(self).mapping, input))
            norm = seat.once(("norm", params.norm_weight.data_ptr()), params.norm_weight.float)
            inverse = seat.once(("scale", params.scale.data_ptr()), lambda: 1.0 / params.scale.float().reshape(1))
            return input, params.residual, norm, addresses, epoch, rank, float(params.eps), inverse

        made = seat.attempt(input.shape[0], FEW_TOKENS, "", arguments)
        if made is None:
            return own.forward(input, all_reduce_params=all_reduce_params, **more)
        fp8, norm, residual = made
        return (fp8, residual) if fusion == "RESIDUAL_RMS_NORM_QUANT_FP8" else (norm, fp8, residual)


_inboxes: dict[tuple[int, int], tuple[Any, Any, int, Any]] = {}


def inbox(mapping: Any, like: Any) -> tuple[Any, Any, int]:
    """(every rank's inbox address, this rank's epochs, its number): one per process, for calls come one after another.

    Upstream's IpcMemory maps the ranks' memory into each other and fills it with zeros; it is a collective call.
    """
    import torch

    from engine_plugins.ops.cuda.launch import INBOX_TOKENS, inbox_bytes

    key = (mapping.tp_size, like.shape[-1])
    if key not in _inboxes:
        if mapping.tp_size == 1:
            memory = torch.zeros(inbox_bytes(1, like.shape[-1]), dtype=torch.uint8, device=like.device)
            addresses, keep = [memory.data_ptr()], memory
        else:
            from tensorrt_llm._ipc_utils import IpcMemory

            keep = IpcMemory(mapping, inbox_bytes(*key))
            addresses = list(keep.peer_ptrs)
        pointers = torch.tensor(addresses, dtype=torch.int64, device=like.device)
        epoch = torch.zeros(INBOX_TOKENS, dtype=torch.int32, device=like.device)
        _inboxes[key] = (pointers, epoch, mapping.tp_rank, keep)  # as long as its addresses are known, the memory is
    return _inboxes[key][:3]


def _any(value: Any) -> Any:
    """Upstream's attributes are not ours to declare."""
    return value


# Attribute name of a module -> (op, seat)
SEATS: dict[str, tuple[str, type[Seated]]] = {
    "router": ("router", Router),
    "qkv_proj": ("qkv_attn_scaling", Qkv),
    "gate_up_proj": ("fc13_swiglu", GateUp),
    "o_proj": ("gemm_low_latency", Gemm),
    "down_proj": ("gemm_low_latency", Gemm),
    "feed_forward": ("moe_top1", MoE),
    "experts": ("moe_top1", Experts),
    "all_reduce": ("allreduce_rmsnorm", AllReduce),
}
