"""Our fused ops in TensorRT-LLM's Llama 4: after a model is constructed, its modules get our ops in front of their own.

A module keeps its class, weights, loading and parallelism; only its class is extended by one method that calls
`torch.ops.kilotok.NAME` inside the op's gate and upstream's own code outside of it. The model class itself stays the
registered object: upstream's input processors and vision encoders are looked up by it, so a subclass would lose them.

What ran, and what fell back and why, is written down once per kind in EVIDENCE/PID.json: that is how a deployer knows
that an op is live. Under CUDA graphs the Python below runs at warm-up and capture; what it chose there is what is
replayed.

It refuses to change a result: an op that is absent, a shape outside the gate or a missing scale means upstream's code.

Run it: `python -m pytest tests/engine_plugins/trtllm/test_adapter.py`, against a stand-in for upstream.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from engine_plugins.trtllm import EVIDENCE_ENV, PLUGINS_ENV

MODEL = "Llama4ForConditionalGeneration"
OPS_MODULE = "engine_plugins.ops.library"  # importing it defines torch.ops.kilotok.*
FEW_TOKENS = 8  # one verify step of up to seven drafts
GEMM_TOKENS = 16
REPORTED_ENV = ("TRTLLM_ENABLE_PDL", "TRT_LLM_DISABLE_LOAD_WEIGHTS_IN_PARALLEL")


class Evidence:
    """This process's own account of what is live; every new kind of fact rewrites one small file."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / f"{os.getpid()}.json" if folder else None
        self.facts: dict[str, Any] = {"pid": os.getpid(), "ops": {}, "grafted": {}, "errors": []}
        self.facts["env"] = {name: os.environ[name] for name in REPORTED_ENV if name in os.environ}
        self._seen: set[tuple[str, str]] = set()

    def note(self, op: str, outcome: str, tokens: int) -> None:
        """`outcome` is "ran", or why it did not."""
        if (op, outcome) not in self._seen:
            self._seen.add((op, outcome))
            self.facts["ops"].setdefault(op, {})[outcome] = tokens
            self.write()

    def write(self) -> None:
        if self.path is None:
            return
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.facts))
        part.replace(self.path)


def register(modeling_llama: ModuleType) -> None:
    """Make every Llama 4 that this process constructs use the ops that the environment names."""
    asked = tuple(name for name in os.environ.get(PLUGINS_ENV, "").split(",") if name)
    evidence = Evidence(os.environ.get(EVIDENCE_ENV, ""))
    model: Any = getattr(modeling_llama, MODEL)
    construct = model.__init__

    def construct_and_graft(self: Any, *args: Any, **more: Any) -> None:
        construct(self, *args, **more)
        evidence.facts |= _machine()
        try:
            load_ops()
            graft(self, asked, evidence)
        except Exception as error:  # noqa: BLE001  a server without our ops still serves; the deployer decides
            evidence.facts["errors"].append(f"{type(error).__name__}: {error}")
        evidence.write()

    model.__init__ = construct_and_graft
    evidence.write()


def load_ops() -> None:
    """Define torch.ops.kilotok.*, with the kernels that the bundle brings for this GPU."""
    import torch

    library = importlib.import_module(OPS_MODULE)
    plugins = Path(__file__).resolve().parents[3] / "plugins"  # of the bundle whose `site/` this is
    if torch.cuda.is_available() and plugins.is_dir():
        library.use_kernels(plugins)


def op_named(name: str) -> Callable[..., Any] | None:
    """torch.ops.kilotok.NAME, or None when it is not there."""
    import torch

    return getattr(torch.ops.kilotok, name, None)


def _machine() -> dict[str, Any]:
    import torch

    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or os.environ.get("RANK") or 0)
    if not torch.cuda.is_available():
        return {"rank": rank, "sm": 0}
    major, minor = torch.cuda.get_device_capability()
    return {"rank": rank, "sm": 10 * major + minor}


# Seats: the module an op sits in front of, by its attribute name, and the method it extends.


def graft(model: Any, asked: tuple[str, ...], evidence: Evidence) -> None:
    """Give each module of `model` the ops among `asked` that have a seat there."""
    for path, module in model.named_modules():
        seat = SEATS.get(path.rpartition(".")[2])
        if seat is None or seat[0] not in asked or isinstance(module, _Seated) or not _is_target(path):
            continue
        name, mixin = seat
        module.__class__ = type(f"Kilotok{type(module).__name__}", (mixin, type(module)), {})
        module.kilotok = (name, op_named(name), evidence)
        evidence.facts["grafted"][name] = evidence.facts["grafted"].get(name, 0) + 1
    for name in asked:
        if name not in evidence.facts["grafted"]:
            evidence.note(name, "has no seat in this model", 0)


def _is_target(path: str) -> bool:
    """The draft and the vision encoder have modules of the same names, and other shapes."""
    return not path.startswith(("draft_model.", "mm_encoder.", "vision", "multi_modal"))


class _Seated:
    """What every seat does: try the op inside its gate, note what happened."""

    kilotok: tuple[str, Callable[..., Any] | None, Evidence]

    def attempt(self, tokens: int, limit: int, refusal: str, *arguments: Any) -> Any:
        """The op's result, or None for upstream's own code."""
        name, op, evidence = self.kilotok
        if op is None:
            refusal = "absent"
        elif tokens > limit:
            refusal = f"more than {limit} tokens"
        if refusal:
            evidence.note(name, refusal, tokens)
            return None
        assert op is not None
        result = op(*arguments)
        evidence.note(name, "ran", tokens)
        return result


class _Linear(_Seated):
    """Linear.apply_linear(input, bias, lora_params, layer_idx); x is [tokens, in], weight [out, in]."""

    def apply_linear(self, input: Any, bias: Any, *rest: Any, **more: Any) -> Any:
        refusal = "bias or LoRA" if bias is not None or any(rest[:1]) or more.get("lora_params") else ""
        made = self.through_op(input, refusal)
        own: Any = super()
        return own.apply_linear(input, bias, *rest, **more) if made is None else made

    def through_op(self, x: Any, refusal: str) -> Any:
        raise NotImplementedError

    def fp8_scale(self, x: Any) -> tuple[Any, Any, str]:
        """(x in FP8, input scale x weight scale, ""), or why there is none."""
        import torch

        scales = getattr(self, "input_scale", None), getattr(self, "weight_scale", None)
        if scales[0] is None or scales[1] is None or self.weight.dtype != torch.float8_e4m3fn:  # type: ignore[attr-defined]
            return x, None, "not a static FP8 layer"
        if x.dtype != torch.float8_e4m3fn:
            x = torch.ops.tensorrt_llm.static_quantize_e4m3_per_tensor(x, scales[0])[0]
        combined = getattr(self, "combined_scale", None)  # upstream's min-latency layers keep the product
        return x, combined if combined is not None else scales[0] * scales[1], ""


class _Router(_Linear):
    """BF16 logits [tokens, experts]."""

    def through_op(self, x: Any, refusal: str) -> Any:
        import torch

        weight = self.weight  # type: ignore[attr-defined]
        if (x.dtype, weight.dtype) != (torch.bfloat16, torch.bfloat16):
            refusal = refusal or "not BF16"
        made = self.attempt(x.shape[0], FEW_TOKENS, refusal, x, weight)
        return None if made is None else made.to(x.dtype)  # the op keeps fp32


class _Qkv(_Linear):
    """BF16 [tokens, q + k + v]; on NoPE layers the rows of Q are scaled by their positions."""

    def through_op(self, x: Any, refusal: str) -> Any:
        if x.shape[0] > FEW_TOKENS:  # before x is quantized for nothing
            return self.attempt(x.shape[0], FEW_TOKENS, refusal)
        x, scale, missing = self.fp8_scale(x)
        positions = getattr(self, "position_ids", None)
        weight = self.weight  # type: ignore[attr-defined]
        head = weight.shape[0] // 7  # five query heads, one key and one value head per rank
        scaling = (0.0 if positions is None else 8192.0, 0.1)
        rows = (5 * head, head, head)
        return self.attempt(
            x.shape[0], FEW_TOKENS, refusal or missing, x, weight, scale, positions, None, *rows, *scaling
        )


class _GateUp(_Linear):
    """FP8 silu(gate) * up on the down projection's scale; gate rows come first in the weight."""

    def through_op(self, x: Any, refusal: str) -> Any:
        if not getattr(self, "enable_fused_gemm_swiglu", False) or not hasattr(self, "inv_output_scale"):
            refusal = refusal or "the layer above applies SwiGLU itself"
        if refusal or x.shape[0] > FEW_TOKENS:
            return self.attempt(x.shape[0], FEW_TOKENS, refusal)
        x, scale, missing = self.fp8_scale(x)
        weight, output = self.weight, self.inv_output_scale  # type: ignore[attr-defined]
        return self.attempt(x.shape[0], FEW_TOKENS, missing, x, weight, scale, output)


class _Gemm(_Linear):
    """BF16 [tokens, out]: the output and down projections."""

    def through_op(self, x: Any, refusal: str) -> Any:
        if refusal or x.shape[0] > GEMM_TOKENS:
            return self.attempt(x.shape[0], GEMM_TOKENS, refusal)
        x, scale, missing = self.fp8_scale(x)
        return self.attempt(x.shape[0], GEMM_TOKENS, missing, x, self.weight, scale)  # type: ignore[attr-defined]


class _Experts(_Seated):
    """The routed experts' forward(x, router_logits, output_dtype, x_high); w3 stands before w1 in the fused weight."""

    def forward(self, x: Any, router_logits: Any, *rest: Any, **more: Any) -> Any:
        import torch

        this: Any = self
        scales: Any = getattr(self, "min_latency_quant_scales", None)
        refusal = "" if scales is not None and x.dtype == torch.float8_e4m3fn else "not on the FP8 min-latency path"
        refusal = refusal or "the op runs the shared expert too, which upstream runs elsewhere"
        arguments = () if refusal else (x, router_logits, this.w3_w1_weight, this.w2_weight, list(scales))
        made = self.attempt(x.shape[0], FEW_TOKENS, refusal, *arguments)
        own: Any = super()
        return own.forward(x, router_logits, *rest, **more) if made is None else made


class _AllReduce(_Seated):
    """AllReduce.forward(input, all_reduce_params=...) where it ends in a residual, an RMSNorm and an FP8 rounding."""

    def forward(self, input: Any, *, all_reduce_params: Any = None, **more: Any) -> Any:
        own: Any = super()
        this: Any = self
        fusion = getattr(getattr(all_reduce_params, "fusion_op", None), "name", "")
        if fusion != "RESIDUAL_RMS_NORM_QUANT_FP8":
            return own.forward(input, all_reduce_params=all_reduce_params, **more)
        params = all_reduce_params
        refusal = "the op has an inbox of its own, which upstream's workspace is not"
        made = self.attempt(
            input.shape[0], FEW_TOKENS, refusal,
            input, params.residual, params.norm_weight, params.scale, params.eps,
            getattr(this, "workspace", None), list(this.mapping.tp_group),
        )  # fmt: skip
        return own.forward(input, all_reduce_params=all_reduce_params, **more) if made is None else made


SEATS: dict[str, tuple[str, type[_Seated]]] = {
    "router": ("router", _Router),
    "qkv_proj": ("qkv_attn_scaling", _Qkv),
    "gate_up_proj": ("fc13_swiglu", _GateUp),
    "o_proj": ("gemm_low_latency", _Gemm),
    "down_proj": ("gemm_low_latency", _Gemm),
    "experts": ("moe_top1", _Experts),
    "all_reduce": ("allreduce_rmsnorm", _AllReduce),
}
