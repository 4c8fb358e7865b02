"""One rank's whole cycle on one GPU: a verify pass of k + 1 tokens and k draft steps, without communication.

What it is: every operator of every layer of rank 0, random weights, in order, as one CUDA graph; then each operator's
calls as a graph of their own, against the bytes they must read. Inputs are fixed: no call uses another's numbers.
What it refuses to be: a speed of the model. All-reduces have no peers here; `kilotok predict` adds their time.
Run it: `kilotok bench slice --spec llama4-maverick-b200`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from specs.errors import InputError
from specs.schema import Spec
from tasks.bench import Call, Case, Maker, gpu_here, graph_us
from tasks.predict.prediction import draft_shape, shape_of
from tasks.predict.shape import DraftShape, Shape


@dataclass(frozen=True)
class Step:
    """One call of one operator."""

    operator: str
    bytes: int
    call: Call


def bench_slice(spec: Spec, context: int = 1024) -> list[dict[str, Any]]:
    """One row per operator and one for the cycle."""
    gpu = gpu_here()
    shape, k = shape_of(spec), spec.engine.draft_tokens
    steps = program(shape, draft_shape(spec, shape), spec.engine.tensor_parallel, k, context, torch.device("cuda"))
    rows = []
    for operator in dict.fromkeys(step.operator for step in steps):
        mine = [step for step in steps if step.operator == operator]
        measured, read = graph_us([step.call for step in mine]) * len(mine), sum(step.bytes for step in mine)
        rows.append(_row(operator, len(mine), read, measured, read / gpu.bytes_per_us))
    whole, read = graph_us([step.call for step in steps]) * len(steps), sum(step.bytes for step in steps)
    cycle = _row(f"cycle, verify {k + 1} + {k} drafts", len(steps), read, whole, read / gpu.bytes_per_us)
    return [*rows, {**cycle, "device": torch.cuda.get_device_name()}]


def _row(operator: str, calls: int, read: int, measured_us: float, floor_us: float) -> dict[str, Any]:
    return {
        "operator": operator,
        "calls": calls,
        "mb": read / 1e6,
        "us": measured_us,
        "floor_us": floor_us,
        "share_of_roof": floor_us / measured_us,
    }


def program(
    shape: Shape, draft: DraftShape, tensor_parallel: int, draft_tokens: int, context: int, device: torch.device
) -> list[Step]:
    """Every call of one cycle, in order. Raises InputError for a model that is not Llama 4's kind."""
    if not shape.experts or shape.top_k != 1 or not shape.shared_experts:
        raise InputError("the slice is Llama 4's: top-1 experts beside a shared one", "model.source", "see docs/ops.md")
    rank = _Rank(shape, draft, tensor_parallel, context)
    verify = rank.verify(Maker(draft_tokens + 1, device))
    # The first draft step also brings the head up to date with every verified token.
    rows = [draft_tokens + 1, *[1] * (draft_tokens - 1)] if draft_tokens else []
    return verify + [step for n, m in enumerate(rows) for step in rank.draft_step(Maker(m, device), n == 0)]


@dataclass(frozen=True)
class _Rank:
    shape: Shape
    draft: DraftShape
    split: int
    context: int

    def verify(self, make: Maker) -> list[Step]:
        s, split = self.shape, self.split
        every = s.layers // s.moe_layers  # the last of so many layers has experts
        head = self._gemm_bf16("lm_head", make, s.vocab // split, s.hidden)
        steps = [self._norm(make)]
        for layer in range(s.layers):
            steps += self._attention(make)
            steps += self._experts(make) if (layer + 1) % every == 0 else self._dense(make)
            steps += [self._norm(make)]
        return [*steps, head, _step("accept", make.verify(s.vocab // split))]

    def draft_step(self, make: Maker, first: bool) -> list[Step]:
        """An EAGLE-3 layer in BF16 over an E4M3 cache; the first step also merges three captured states."""
        s, d, split = self.shape, self.draft, self.split
        heads, kv_heads = s.q_heads // split, max(1, s.kv_heads // split)
        context, head_dim = self.context, s.head_dim
        norm = _step("draft_norms", make.norm(s.hidden))
        return [
            *([self._gemm_bf16("draft_fc", make, s.hidden // split, 3 * s.hidden)] if first else []),
            *(norm, norm),  # of the embedding and of the state
            _step("draft_qkv", make.draft_qkv(heads, kv_heads, head_dim, s.hidden, context)),
            _step("draft_attention", make.attention(heads, kv_heads, head_dim, context, rounded=False)),
            self._gemm_bf16("draft_o", make, s.hidden, heads * head_dim),
            norm,
            _step("draft_mlp", make.fc13_bf16(d.ffn // split, s.hidden)),
            self._gemm_bf16("draft_mlp", make, s.hidden, d.ffn // split),
            norm,
            self._gemm_bf16("draft_lm_head", make, d.vocab // split, s.hidden),
            _step("draft_choice", make.verify(d.vocab // split, drafts=0)),
        ]

    def _attention(self, make: Maker) -> list[Step]:
        s, heads, kv_heads = self.shape, self.shape.q_heads // self.split, max(1, self.shape.kv_heads // self.split)
        return [
            _step("qkv", make.qkv(heads, kv_heads, s.head_dim, s.hidden, self.context)),
            _step("attention", make.attention(heads, kv_heads, s.head_dim, self.context)),
            _step("o", make.gemm(s.hidden, heads * s.head_dim)),
            self._norm(make),
        ]

    def _dense(self, make: Maker) -> list[Step]:
        s, width = self.shape, self.shape.ffn_dense // self.split
        return [_step("dense_mlp", make.fc13(width, s.hidden)), _step("dense_mlp", make.gemm(s.hidden, width))]

    def _experts(self, make: Maker) -> list[Step]:
        s = self.shape
        moe = make.moe(s.experts, s.hidden, s.ffn_expert // self.split)
        return [_step("router", make.router(s.experts, s.hidden)), _step("moe", moe)]

    def _norm(self, make: Maker) -> Step:
        return _step("norm", make.norm(self.shape.hidden))

    def _gemm_bf16(self, operator: str, make: Maker, rows: int, columns: int) -> Step:
        return _step(operator, make.gemm_bf16(rows, columns))


def _step(operator: str, case: Case) -> Step:
    return Step(operator, case.bytes, case.make())
