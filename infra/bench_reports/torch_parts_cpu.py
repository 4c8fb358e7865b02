"""The parts of each fused op in torch, BF16, on the CPU: what a framework runs one after another.

What it is: seconds per operator group of one decode pass over a shape, with weights rotated through more memory than
the cache holds. BF16 because that is torch's fastest on a CPU: it has no FP8 multiply there.
What it refuses to be: compiled; torch.compile would fuse.
Run it: engine_cpu.py imports it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from random_checkpoints import Shape

ROTATE_BYTES = 128 << 20


class Rotated:
    """A weight [n, k] in as many copies as exceed the cache; each call of `next` gives another."""

    def __init__(self, *shape: int) -> None:
        copies = max(2, min(64, ROTATE_BYTES // (2 * torch.Size(shape).numel())))
        self.copies = [torch.randn(shape, dtype=torch.bfloat16) * shape[-1] ** -0.5 for _ in range(copies)]
        self.at = 0

    @property
    def next(self) -> torch.Tensor:
        self.at = (self.at + 1) % len(self.copies)
        return self.copies[self.at]


def best_us(call: Callable[[], Any], rounds: int = 5, calls: int = 12) -> float:
    """Best mean of `rounds`."""
    best = float("inf")
    with torch.inference_mode():
        for _ in range(rounds):
            started = time.perf_counter()
            for _ in range(calls):
                call()
            best = min(best, (time.perf_counter() - started) / calls)
    return best * 1e6


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotated halves, as transformers computes them."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def part_times(s: Shape, rows: int, context: int = 192) -> dict[str, float]:
    """Microseconds per layer (per head for lm_head, sampling), by the engine's group names."""
    D, q_width, kv_width = s.head_dim, s.heads * s.head_dim, s.kv_heads * s.head_dim
    x, residual = torch.randn(rows, s.hidden, dtype=torch.bfloat16), torch.randn(rows, s.hidden, dtype=torch.bfloat16)
    norm = torch.ones(s.hidden, dtype=torch.bfloat16)
    qkv, o = Rotated(q_width + 2 * kv_width, s.hidden), Rotated(s.hidden, q_width)
    gate_up, down, head = Rotated(2 * s.width, s.hidden), Rotated(s.hidden, s.width), Rotated(s.vocab, s.hidden)
    cos, sin = torch.randn(rows, 1, D, dtype=torch.bfloat16), torch.randn(rows, 1, D, dtype=torch.bfloat16)
    k_cache, v_cache = (torch.randn(context, s.kv_heads, D, dtype=torch.bfloat16) for _ in range(2))
    at = torch.arange(context - rows, context)
    attended, q = (
        torch.randn(rows, q_width, dtype=torch.bfloat16),
        torch.randn(1, s.heads, rows, D, dtype=torch.bfloat16),
    )
    mask = torch.ones(rows, context, dtype=torch.bool).tril(context - rows)
    logits, drafts = torch.randn(rows, s.vocab), torch.randint(0, s.vocab, (rows - 1,))

    def qkv_parts() -> None:
        q, k, v = F.linear(x, qkv.next).split([q_width, kv_width, kv_width], -1)
        rope(q.view(rows, s.heads, D), cos, sin)
        k_cache[at], v_cache[at] = rope(k.view(rows, s.kv_heads, D), cos, sin), v.view(rows, s.kv_heads, D)

    def attention() -> None:
        keys, values = (c.transpose(0, 1)[None] for c in (k_cache, v_cache))
        F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)

    def mlp(gate_up: torch.Tensor, down: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, down)

    def verify() -> None:
        chosen = logits.argmax(-1)
        (chosen[:-1] == drafts).long().cumprod(-1).sum().item()

    times = {
        "norms": 2 * best_us(lambda: F.rms_norm(x + residual, (s.hidden,), norm, 1e-5)),
        "qkv": best_us(qkv_parts),
        "attention": best_us(attention),
        "o": best_us(lambda: residual + F.linear(attended, o.next)),
        "dense_mlp": best_us(lambda: residual + mlp(gate_up.next, down.next, x)),
        "lm_head": best_us(lambda: F.linear(x, head.next).float()),
        "sampling": best_us(verify),
    }
    if s.experts:
        router, shared_in = Rotated(s.experts, s.hidden), Rotated(2 * s.expert_width, s.hidden)
        shared_out = Rotated(s.hidden, s.expert_width)
        gates, downs = Rotated(2 * s.expert_width, s.hidden), Rotated(s.hidden, s.expert_width)

        def moe() -> None:
            score, expert = F.linear(x, router.next).topk(1, -1)
            routed, out = x * score.sigmoid(), mlp(shared_in.next, shared_out.next, x)
            for chosen in expert.unique():
                which = (expert[:, 0] == chosen).nonzero()[:, 0]
                out.index_add_(0, which, mlp(gates.next, downs.next, routed[which]))
            residual + out

        times["moe"] = best_us(moe)
    return times


def transformers_tokens_per_s(checkpoint: str, threads: int, tokens: int = 64, rounds: int = 3) -> float:
    """`generate`, greedy, KV cache, BF16: tokens after the first per second, best of `rounds`."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    ids = torch.randint(3, 500, (1, 64), generator=torch.Generator().manual_seed(0))
    best = 0.0
    for _ in range(rounds):
        seconds = []
        for count in (1, tokens + 1):
            started = time.perf_counter()
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
            seconds.append(time.perf_counter() - started)
        best = max(best, tokens / (seconds[1] - seconds[0]))
    return best
