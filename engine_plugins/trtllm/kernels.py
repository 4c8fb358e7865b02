"""Which of the record's kernels run for a spec, and which silently do not.

What it is: TensorRT-LLM's own gates for Llama 4's min-latency path, evaluated for the tokens of one step.
What it refuses to be: a promise. It says what the gates allow; the profiler trace after start says what ran.
Run it: `kilotok plan specs/llama4-maverick-b200.yaml`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from engine_plugins.trtllm.contract import FOLDER
from specs.schema import Spec

RECORD_TOKENS = 8  # of a step that router, FC_QKV and MoE take; beyond it they fall back without a word
_FUSED_ALLREDUCE_TOKENS = 128  # one-shot Lamport kernels; larger messages fall back to separate kernels


@dataclass(frozen=True)
class Kernel:
    """One kernel of the record, whether it runs, and the gate that decides."""

    name: str
    runs: bool
    why: str

    @property
    def in_trace(self) -> str:
        """Part of its name in a profiler trace; "" for those shipped as cubins, whose names are not stable."""
        return _IN_TRACE.get(self.name, ("", ""))[0]

    @property
    def plugin(self) -> str:
        """Our op that takes its place when the spec names it."""
        return _IN_TRACE.get(self.name, ("", ""))[1]


# Read in upstream's llama4MinLatencyKernels and communication kernels.
_IN_TRACE = {
    "router GEMV (BF16)": ("llama4_bf16_bf16_gemm", "router"),
    "FC_QKV GEMV": ("llama4_fp8_bf16_gemm", "qkv_attn_scaling"),
    "FC_QKV + attention scaling (NoPE layers)": ("llama4_fp8_bf16_gemm", "qkv_attn_scaling"),
    "FC13 + SwiGLU GEMV": ("llama4_fp8_fp8_gemm_swiglu", "fc13_swiglu"),
    "MoE top-1, FC13 + SwiGLU + FC2": ("llama4_moe_fc13_swiglu_fp8", "moe_top1"),
    "AllReduce + residual + RMSNorm (+ FP8)": ("allreduce_fusion_kernel", "allreduce_rmsnorm"),
}


@dataclass(frozen=True)
class _Step:
    """What the gates look at."""

    tokens: int
    tensor: int
    expert: int
    min_latency: bool
    fp8: bool
    shape: dict[str, Any]


def record_kernels(
    spec: Spec | dict[str, Any], config: dict[str, Any] | None = None, requests: int = 1
) -> list[Kernel]:
    """The kernels at `requests` in flight; `config` is the model's config.json, else its name must be a known one."""
    plain = spec.to_dict() if isinstance(spec, Spec) else spec
    engine = plain["engine"]
    if engine["backend"] != "trtllm":
        return []
    shape = _shape(plain, config)
    if shape is None:
        return [Kernel("all", False, f"the shapes of {plain['model']['source']} are not known before the download")]
    options = engine["options"]
    step = _Step(
        tokens=requests * (engine["draft_tokens"] + 1),
        tensor=engine["tensor_parallel"],
        expert=engine["expert_parallel"],
        min_latency=bool(options.get("enable_min_latency")),
        fp8="fp8" in plain.get("quantize", {}).get("recipe", "fp8"),
        shape=shape,
    )
    return [*_min_latency(step), _allreduce(step, options, engine.get("env", {}))]


def _min_latency(step: _Step) -> list[Kernel]:
    s, tokens = step.shape, step.tokens
    tp8 = (step.tensor == 8, "tensor_parallel 8")
    hidden = (s["hidden_size"] == 5120, "hidden size 5120")
    fp8 = (step.fp8, "FP8 weights")
    heads = ((s["num_attention_heads"], s["num_key_value_heads"]) == (40, 8), "40 query and 8 KV heads")
    widths = ({s["intermediate_size"], s["intermediate_size_mlp"]} <= {8192, 16384}, "MLP width 8192 or 16384")
    experts = (s["num_local_experts"] == 128, "128 experts")
    tuned = (
        bool(s["attn_temperature_tuning"]) and (s["floor_scale"], s["attn_scale"]) == (8192, 0.1),
        "floor 8192, scale 0.1",
    )
    whole = (step.tensor // step.expert == 8 and step.expert == 1, "experts split 8 ways, expert_parallel 1")
    routed = (s["intermediate_size"] == 8192 and s["num_experts_per_tok"] == 1, "expert width 8192, top 1")

    def upto(low: int, high: int) -> tuple[bool, str]:
        return low <= tokens <= high, f"{low} to {high} tokens a step"

    gates = {
        "router GEMV (BF16)": [upto(1, RECORD_TOKENS), hidden, experts],
        "FC_QKV GEMV": [upto(1, 4), tp8, hidden, heads, fp8],
        "FC_QKV + attention scaling (NoPE layers)": [upto(1, RECORD_TOKENS), tp8, hidden, heads, fp8, tuned],
        "FC_QKV trtllm-gen (RoPE layers)": [upto(5, RECORD_TOKENS), tp8, hidden, heads, fp8],
        "FC13 + SwiGLU GEMV": [upto(1, 3), tp8, hidden, widths, fp8],
        "FC13 + SwiGLU trtllm-gen": [upto(4, 16), tp8, hidden, widths, fp8],
        "FC2 trtllm-gen": [upto(1, 16), tp8, hidden, widths, fp8],
        "MoE top-1, FC13 + SwiGLU + FC2": [upto(1, RECORD_TOKENS), hidden, experts, routed, whole, fp8],
    }
    if not step.min_latency:
        return [Kernel(name, False, "needs enable_min_latency") for name in gates]
    return [_decide(name, conditions, tokens) for name, conditions in gates.items()]


def _allreduce(step: _Step, options: dict[str, Any], env: dict[str, str]) -> Kernel:
    conditions = [
        (step.tensor > 1, "more than one GPU"),
        (not options.get("enable_attention_dp"), "no enable_attention_dp: data parallel attention reduces nothing"),
        (step.tokens <= _FUSED_ALLREDUCE_TOKENS, f"at most {_FUSED_ALLREDUCE_TOKENS} tokens a step"),
        (
            env.get("TRTLLM_LLAMA_EAGER_FUSION_DISABLED") != "1" or step.min_latency,
            "TRTLLM_LLAMA_EAGER_FUSION_DISABLED not set",
        ),
    ]
    return _decide("AllReduce + residual + RMSNorm (+ FP8)", conditions, step.tokens)


def _decide(name: str, conditions: list[tuple[bool, str]], tokens: int) -> Kernel:
    failed = [text for holds, text in conditions if not holds]
    if failed:
        return Kernel(
            name,
            False,
            f"needs {'; '.join(failed)}; this step has {tokens}"
            if "tokens" in failed[0]
            else f"needs {'; '.join(failed)}",
        )
    return Kernel(name, True, f"{tokens} tokens a step")


def _shape(plain: dict[str, Any], config: dict[str, Any] | None) -> dict[str, Any] | None:
    if config is not None:
        text = config.get("text_config", config)
        return {
            **next(iter(_known().values())),
            **{key: text[key] for key in next(iter(_known().values())) if key in text},
        }
    source = plain.get("model", {}).get("source", "")
    return next((shape for name, shape in _known().items() if name in source), None)


@cache
def _known() -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = yaml.safe_load((FOLDER / "models.yaml").read_text(encoding="utf-8"))
    return loaded
