"""Time of one speculative cycle: one verify pass of k+1 tokens and k draft steps, operator by operator.

Three levels, as in the roofline of the record: `hbm` = bytes / bandwidth (nothing can be faster), `hbm_ar` =
plus one wire
latency per all-reduce, `kernels` = every kernel pays its fixed cost and every all-reduce its measured one.
Times in us, sizes
in bytes, per GPU. Refuses to know what a stack adds on top: that is `calibrate.py`. Run it: `kilotok predict SPEC`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tasks.predict.hardware import Gpu
from tasks.predict.shape import DraftShape, Shape


@dataclass(frozen=True)
class Setting:
    """How the model is run: parallelism, speculation, context, precision."""

    tensor_parallel: int = 1
    draft_tokens: int = 3
    context: int = 1000
    batch: int = 1
    weight_bytes: float = 1.0
    kv_bytes: float = 1.0
    head_bytes: float = 2.0  # lm_head stays BF16
    parallel_draft: bool = False  # one pass proposes all k tokens (DFlash, P-EAGLE)
    distinct_experts: float | None = None  # per verify and layer, from a routing trace when there is one
    accept_us: float = 20.0  # verification and sampling glue, measured on the record's stack
    fused: frozenset[str] = frozenset({"qkv_attn_scaling", "fc13_swiglu", "moe_top1", "router", "allreduce_rmsnorm"})


@dataclass(frozen=True)
class Operator:
    """One row: bytes read per GPU, kernels at the fixed launch-to-data cost, other fixed microseconds."""

    name: str
    bytes: float
    kernels: float = 0
    fixed_us: float = 0.0


@dataclass(frozen=True)
class Cycle:
    """Rows of a cycle and its all-reduces; three totals."""

    gpu: Gpu
    operators: tuple[Operator, ...]
    allreduces: int
    allreduce_us: float
    setting: Setting = field(repr=False)

    @property
    def bytes(self) -> float:
        return sum(row.bytes for row in self.operators)

    @property
    def hbm_us(self) -> float:
        return self.bytes / self.gpu.bytes_per_us

    @property
    def hbm_ar_us(self) -> float:
        return self.hbm_us + self.allreduces * self.gpu.ar_floor_us

    @property
    def kernels_us(self) -> float:
        return sum(self.operator_us(row) for row in self.operators) + self.allreduces * self.allreduce_us

    def operator_us(self, row: Operator) -> float:
        """bytes at the achieved bandwidth, plus what each launch costs before data flows."""
        return row.bytes / (self.gpu.bytes_per_us * self.gpu.hbm_eff) + row.kernels * self.gpu.t0_us + row.fixed_us


def cycle(gpu: Gpu, shape: Shape, draft: DraftShape | None, setting: Setting) -> Cycle:
    """The rows of one cycle; with `draft_tokens` 0 it is one plain decode step."""
    k = setting.draft_tokens if draft else 0
    rows = _verify(gpu, shape, setting, k + 1)
    allreduces = 2 * shape.layers + 1
    passes = (1 if setting.parallel_draft else k) if draft else 0
    for index in range(passes):
        rows += _draft(gpu, shape, draft, setting, first=index == 0)  # type: ignore[arg-type]
        allreduces += 3
    if k:
        rows.append(Operator("accept", 0.0, 0, setting.accept_us))
    one_gpu = setting.tensor_parallel == 1
    allreduce_us = gpu.ar_us if "allreduce_rmsnorm" in setting.fused else gpu.ar_unfused_us
    return Cycle(gpu, _merged(rows), 0 if one_gpu else allreduces, allreduce_us, setting)


def _verify(gpu: Gpu, shape: Shape, setting: Setting, tokens: int) -> list[Operator]:
    tp, width, rows = setting.tensor_parallel, setting.weight_bytes, setting.batch * tokens
    layers, moe, small = shape.layers, shape.moe_layers, gpu.small_us
    dense = layers - moe
    kv_heads = max(1, shape.kv_heads // tp)
    kv_bytes = setting.batch * shape.kv_tokens(setting.context) * 2 * kv_heads * shape.head_dim * setting.kv_bytes
    distinct = setting.distinct_experts if setting.distinct_experts is not None else shape.distinct_experts(rows)
    ffn_kernels = 2 if "fc13_swiglu" in setting.fused else 3  # FC13+SwiGLU and FC2, or the activation on its own
    moe_kernels, moe_fixed = (2, small) if "moe_top1" in setting.fused else (4, 2 * small)
    scaling = 0.0 if "qkv_attn_scaling" in setting.fused else shape.global_layers * small
    result = [
        Operator("qkv", layers * shape.qkv_params * width / tp, layers, scaling),
        Operator("rope+kv", 0.0, 0, layers * small),
        Operator("attention", kv_bytes, 0, layers * gpu.attn_us),
        Operator("o", layers * shape.o_params * width / tp, layers),
        Operator("dense_mlp", dense * shape.dense_params * width / tp, ffn_kernels * dense),
        Operator("lm_head", shape.head_params * setting.head_bytes / tp, 1, 2 * small),
    ]
    if moe:
        # The router is BF16 and replicated; the shared expert runs on a second stream and has no launch of its own.
        router = (0, moe * small) if "router" in setting.fused else (moe, 0.0)
        result += [
            Operator("router", moe * shape.router_params * 2, *router),
            Operator("shared_expert", moe * shape.expert_params * shape.shared_experts * width / tp),
            Operator(
                "routed_experts", moe * shape.expert_params * distinct * width / tp, moe_kernels * moe, moe * moe_fixed
            ),
        ]
    return result


def _draft(gpu: Gpu, shape: Shape, draft: DraftShape, setting: Setting, *, first: bool) -> list[Operator]:
    tp, width, hidden, small = setting.tensor_parallel, draft.bytes_per_weight, shape.hidden, gpu.small_us
    kv_heads = max(1, shape.kv_heads // tp)
    rows = [
        Operator("draft_norms", 0.0, 0, small),
        Operator("draft_qkv", 2 * shape.qkv_params * width / tp, 1, small),
        Operator(
            "draft_attention", setting.batch * setting.context * 2 * kv_heads * shape.head_dim * 2, 0, gpu.attn_us
        ),
        Operator("draft_o", shape.o_params * width / tp, 1),
        Operator("draft_mlp", 3 * hidden * draft.ffn * width / tp, 2),
        Operator("draft_lm_head", hidden * draft.vocab * width / tp, 1, 2 * small),
    ]
    return [Operator("draft_fc", 3 * hidden * hidden * width / tp, 1), *rows] if first else rows


def _merged(rows: list[Operator]) -> tuple[Operator, ...]:
    """Draft steps repeat the same rows: one row each, summed."""
    merged: dict[str, Operator] = {}
    for row in rows:
        if old := merged.get(row.name):
            row = Operator(row.name, old.bytes + row.bytes, old.kernels + row.kernels, old.fixed_us + row.fixed_us)
        merged[row.name] = row
    return tuple(merged.values())


def memory_gib_per_gpu(
    shape: Shape, draft: DraftShape | None, setting: Setting, max_seq_len: int, expert_parallel: int = 1
) -> dict[str, float]:
    """{"weights", "draft", "kv_cache", "total"}: embedding and lm_head in BF16, KV for batch x max_seq_len."""
    gib, tp = 2.0**30, setting.tensor_parallel
    heads = (1 if shape.tied_embeddings else 2) * shape.head_params
    weights = ((shape.total_params - heads) * setting.weight_bytes + heads * 2) / tp
    kv_heads = max(1, shape.kv_heads // tp)
    kv = setting.batch * max_seq_len * shape.layers * 2 * kv_heads * shape.head_dim * setting.kv_bytes
    head = 0.0
    if draft:
        params = (
            3 * shape.hidden**2
            + 2 * shape.qkv_params
            + shape.o_params
            + 3 * shape.hidden * draft.ffn
            + shape.hidden * draft.vocab
        )
        head = params * draft.bytes_per_weight / tp
    parts = {"weights": weights / gib, "draft": head / gib, "kv_cache": kv / gib}
    return {**parts, "total": sum(parts.values())}
