"""Time of one speculative cycle: one verify pass of k+1 tokens and k draft steps, operator by operator.

Three levels, as in the roofline of the record: `hbm` = bytes / bandwidth (nothing can be faster), `hbm_ar` = plus one
wire latency per all-reduce, `kernels` = every kernel pays its fixed cost and every all-reduce its measured one. Times
in us, sizes in bytes, per GPU. Refuses to know what a stack adds on top: that is `calibrate.py`. Run it: `kilotok
predict SPEC`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

from tasks.predict.hardware import Gpu
from tasks.predict.shape import DraftShape, Shape

TYPICAL_ACCEPTANCE = 2.5  # tokens per cycle, where only the number of rows depends on it
OPS = frozenset({"qkv_attn_scaling", "fc13_swiglu", "moe_top1", "router", "allreduce_rmsnorm"})  # that change the count


@dataclass(frozen=True)
class Setting:
    """How the model is run: parallelism, speculation, context, precision."""

    tensor_parallel: int = 1
    expert_parallel: int = 1
    attention_dp: bool = False  # attention and dense weights on every GPU, each with its share of the requests
    draft_tokens: int = 3
    context: float = 1000
    batch: float = 1
    weight_bytes: float = 1.0
    kv_bytes: float = 1.0
    head_bytes: float = 2.0  # lm_head stays BF16
    parallel_draft: bool = False  # one pass proposes all k tokens (DFlash, P-EAGLE)
    distinct_experts: float | None = None  # per verify and layer, from a routing trace when there is one
    accept_us: float = 20.0  # verification and sampling glue, measured on the record's stack
    fused: frozenset[str] = OPS

    @property
    def local_batch(self) -> float:
        """Requests whose attention one GPU computes."""
        return max(1.0, self.batch / self.tensor_parallel) if self.attention_dp else self.batch


@dataclass(frozen=True)
class Operator:
    """One row: bytes read per GPU, multiply-adds x 2, weights unpacked, kernels at the fixed cost, other fixed us."""

    name: str
    bytes: float
    kernels: float = 0
    fixed_us: float = 0.0
    flops: float = 0.0
    weights: float = 0.0  # elements unpacked; 0 where nothing is
    width: float = 1.0  # bytes per weight
    again: float = 0.0  # of `bytes`: read before in the same cycle, by an earlier draft step

    def plus(self, other: Operator) -> Operator:
        """Both, as one row."""
        return Operator(
            self.name, self.bytes + other.bytes, self.kernels + other.kernels, self.fixed_us + other.fixed_us,
            self.flops + other.flops, self.weights + other.weights, self.width,
            self.again + other.again,
        )  # fmt: skip


@dataclass(frozen=True)
class Cycle:
    """Rows of a cycle and its all-reduces; three totals."""

    gpu: Gpu
    operators: tuple[Operator, ...]
    allreduces: int
    allreduce_us: float
    resident_bytes: float  # weights that stay on the device: decides whether a cache holds them
    draft_bytes: float  # of the head alone: a cache may keep it from one draft step to the next
    setting: Setting = field(repr=False)

    @property
    def bytes(self) -> float:
        return sum(row.bytes for row in self.operators)

    @property
    def hbm_us(self) -> float:
        return self.bytes / self._bytes_per_us(1.0)

    @property
    def hbm_ar_us(self) -> float:
        return self.hbm_us + self.allreduces * self.gpu.ar_floor_us

    @cached_property
    def kernels_us(self) -> float:
        return sum(self.operator_us(row) for row in self.operators) + self.allreduces * self.allreduce_us

    def _bytes_per_us(self, efficiency: float, held: float | None = None) -> float:
        """The cache's speed while `held` bytes (all weights) fit in it, falling to the memory's as they outgrow it."""
        memory = self.gpu.bytes_per_us * efficiency
        if not self.gpu.cache_mb:
            return memory
        held = self.resident_bytes if held is None else held
        hit = max(0.0, min(1.0, 2.0 - held / (self.gpu.cache_mb * 1e6)))
        return 1 / (hit / (self.gpu.cache_tbs * 1e6) + (1 - hit) / memory)

    @cached_property
    def _speeds(self) -> tuple[float, float]:
        """Achieved bytes per us: of what is read once in a cycle, and of what a draft step reads again."""
        return self._bytes_per_us(self.gpu.hbm_eff), self._bytes_per_us(self.gpu.hbm_eff, self.draft_bytes)

    def operator_us(self, row: Operator) -> float:
        """Reading and computing, as far as one hides the other, plus what each launch costs before data flows."""
        gpu = self.gpu
        once, again = self._speeds
        read = (row.bytes - row.again) / once + row.again / again
        unpack = gpu.unpack_bf16_rows if row.width >= 2 else gpu.unpack_rows
        rate = gpu.flops_per_us(row.width)
        if row.name.endswith("attention") and gpu.attn_tflops:
            rate = gpu.attn_tflops * 1e6
        compute = max(row.flops, 2 * unpack * row.weights) / rate
        hidden = gpu.overlap * min(read, compute)
        return read + compute - hidden + row.kernels * gpu.t0_us + row.fixed_us


def cycle(gpu: Gpu, shape: Shape, draft: DraftShape | None, setting: Setting) -> Cycle:
    """The rows of one cycle; with `draft_tokens` 0 it is one plain decode step."""
    k = setting.draft_tokens if draft else 0
    rows = _verify(gpu, shape, setting, k + 1)
    allreduces = 2 * shape.moe_layers if setting.attention_dp else 2 * shape.layers + 1
    passes = (1 if setting.parallel_draft else k) if draft else 0
    for index in range(passes):
        step = _draft(gpu, shape, draft, setting, first=index == 0)  # type: ignore[arg-type]
        rows += step if index == 0 else [replace(row, again=row.bytes) for row in step]
        allreduces += 3
    if k:
        rows.append(Operator("accept", 0.0, 0, setting.accept_us))
    if gpu.host_us:
        rows.append(Operator("host", 0.0, 0, gpu.host_us))
    message = gpu.message_us(setting.local_batch * (k + 1) * shape.hidden * 2)
    fused = "allreduce_rmsnorm" in setting.fused
    allreduce_us = (gpu.ar_us if fused else gpu.ar_unfused_us) + message
    one_gpu = setting.tensor_parallel == 1
    head = draft.params(shape) * draft.bytes_per_weight if draft else 0.0
    resident = weight_bytes_per_gpu(shape, setting) + head
    return Cycle(gpu, _merged(rows), 0 if one_gpu else allreduces, allreduce_us, resident, head, setting)


def linear(name: str, params: float, rows: float, width: float, split: float, kernels: float = 0, us: float = 0.0,
           distinct: float = 1.0) -> Operator:  # fmt: skip
    """A weight of `params` elements over `split` GPUs, times `rows` rows; of `distinct` such weights each row takes
    one."""
    weights = params * distinct / split
    return Operator(name, weights * width, kernels, us, 2 * params * rows / split, weights, width)


def _verify(gpu: Gpu, shape: Shape, setting: Setting, tokens: int) -> list[Operator]:
    width, tp = setting.weight_bytes, setting.tensor_parallel
    split = 1 if setting.attention_dp else tp  # of what is not a routed expert
    rows = setting.local_batch * tokens
    layers, moe, small = shape.layers, shape.moe_layers, gpu.small_us
    dense = layers - moe
    ffn_kernels = 2 if "fc13_swiglu" in setting.fused else 3  # FC13+SwiGLU and FC2, or the activation on its own
    # Unfused: top-k, sort by expert, FC13, activation, FC2, weighted sum; and the shared expert's own three.
    moe_kernels, moe_fixed = (2, small) if "moe_top1" in setting.fused else (6 + 3 * bool(shape.shared_experts), 0.0)
    scaling = 0.0 if "qkv_attn_scaling" in setting.fused else shape.global_layers * small
    qkv_kernels = 4 if shape.latent else 1  # down, up of q, absorbed up of k, absorbed up of v
    result = [
        linear("qkv", layers * shape.qkv_params, rows, width, split, qkv_kernels * layers, scaling),
        Operator("rope+kv", 0.0, 0, layers * (small + gpu.row_us * rows * shape.hidden / 1000)),
        _attention("attention", gpu, shape, setting, layers, rows, tokens),
        linear("o", layers * shape.o_params, rows, width, split, layers),
        linear("dense_mlp", dense * shape.dense_params, rows, width, split, ffn_kernels * dense),
        linear("lm_head", shape.head_params, rows, setting.head_bytes, split, 1, 2 * small),
    ]
    if moe:
        # The router is BF16 and replicated; the shared expert runs on a second stream and has no launch of its own.
        router = (0, moe * small) if "router" in setting.fused else (moe, 0.0)
        routed_rows = setting.batch * tokens * shape.top_k
        distinct = _busiest_gpu(shape, setting, setting.batch * tokens)
        result += [
            Operator("router", moe * shape.router_params * 2, *router),
            linear("shared_expert", moe * shape.expert_params * shape.shared_experts, rows, width, split),
            linear("routed_experts", moe * shape.expert_params, routed_rows, width, tp, moe_kernels * moe,
                   moe * moe_fixed, distinct=distinct),
        ]  # fmt: skip
    return result


def _attention(name: str, gpu: Gpu, shape: Shape, setting: Setting, layers: int, rows: float, tokens: int) -> Operator:
    """KV cache read once per request; scores and values for every row and head."""
    split = 1 if setting.attention_dp else setting.tensor_parallel
    positions = shape.kv_tokens(setting.context)
    bytes_ = (rows / tokens) * positions * shape.kv_elements(split) * setting.kv_bytes
    per_position = 2 * (shape.latent.kv_rank + shape.latent.rope) if shape.latent else 2 * shape.head_dim
    flops = 2 * rows * positions * shape.q_heads * per_position / split
    return Operator(name, bytes_, 0, layers * gpu.attn_us, flops, 0.0, 2.0)


def _busiest_gpu(shape: Shape, setting: Setting, tokens: float) -> float:
    """Distinct routed experts that the busiest GPU reads, counted as if they were spread over all of them.

    With tensor-parallel experts every GPU reads its part of each. With expert parallelism a GPU reads whole experts,
    and the cycle waits for the one that drew the most.
    """
    distinct = setting.distinct_experts
    if distinct is None:
        distinct = shape.distinct_experts(max(1, round(tokens)))
    if setting.expert_parallel == 1:
        return distinct
    held, hit = shape.experts // setting.expert_parallel, distinct / shape.experts
    expected, below = 0.0, 0.0  # sum over t of P(the largest of `expert_parallel` binomials > t)
    for t in range(held):
        below += math.comb(held, t) * hit**t * (1 - hit) ** (held - t)
        expected += 1 - min(1.0, below) ** setting.expert_parallel
    return expected * setting.expert_parallel


def _draft(gpu: Gpu, shape: Shape, draft: DraftShape, setting: Setting, *, first: bool) -> list[Operator]:
    tp = 1 if setting.attention_dp else setting.tensor_parallel
    width, hidden, small = draft.bytes_per_weight, shape.hidden, gpu.small_us
    # The first step also catches up on the tokens that the cycle before accepted.
    caught_up = min(TYPICAL_ACCEPTANCE, 1 + setting.draft_tokens / 2) if first else 1.0
    at_once = setting.draft_tokens - 1 if setting.parallel_draft else 0
    rows = setting.local_batch * (caught_up + at_once)
    per_token = 2 * max(1, shape.kv_heads // tp) * shape.head_dim * 2
    attention_flops = 4 * rows * setting.context * shape.q_heads * shape.head_dim / tp
    steps = [
        Operator("draft_norms", 0.0, 0, small + gpu.row_us * rows * hidden / 1000),
        linear("draft_qkv", 2 * shape.qkv_params, rows, width, tp, 1, small),
        Operator(
            "draft_attention",
            setting.local_batch * setting.context * per_token,
            0,
            gpu.attn_us,
            attention_flops,
            0.0,
            2.0,
        ),
        linear("draft_o", shape.o_params, rows, width, tp, 1),
        linear("draft_mlp", 3 * hidden * draft.ffn, rows, width, tp, 2),
        linear("draft_lm_head", hidden * draft.vocab, rows, width, tp, 1, 2 * small),
    ]
    return [linear("draft_fc", 3 * hidden * hidden, rows, width, tp, 1), *steps] if first else steps


def _merged(rows: Iterable[Operator]) -> tuple[Operator, ...]:
    """Draft steps repeat the same rows: one row each, summed."""
    merged: dict[str, Operator] = {}
    for row in rows:
        merged[row.name] = merged[row.name].plus(row) if row.name in merged else row
    return tuple(merged.values())


def weight_bytes_per_gpu(shape: Shape, setting: Setting) -> float:
    """Target weights on one GPU: embedding and lm_head in BF16, the router everywhere."""
    tp, width = setting.tensor_parallel, setting.weight_bytes
    heads = (1 if shape.tied_embeddings else 2) * shape.head_params * 2
    experts = shape.moe_layers * shape.experts * shape.expert_params * width
    rest = (shape.total_params - (1 if shape.tied_embeddings else 2) * shape.head_params) * width - experts
    return experts / tp + (rest + heads) / (1 if setting.attention_dp else tp)


def memory_gib_per_gpu(shape: Shape, draft: DraftShape | None, setting: Setting, max_seq_len: int) -> dict[str, float]:
    """{"weights", "draft", "kv_cache", "total"}: KV for batch x max_seq_len."""
    gib = 2.0**30
    split = 1 if setting.attention_dp else setting.tensor_parallel
    kv = setting.local_batch * max_seq_len * shape.layers * shape.kv_elements(split) * setting.kv_bytes
    head = draft.params(shape) * draft.bytes_per_weight / split if draft else 0.0
    parts = {"weights": weight_bytes_per_gpu(shape, setting) / gib, "draft": head / gib, "kv_cache": kv / gib}
    return {**parts, "total": sum(parts.values())}
