"""verify in Triton: accept or reject k drafts and choose the next token on the device; nothing returns to the host.

What it is: two kernels each. The first cuts the vocabulary into splits (best token, or mass); the second, one program,
decides. Sampling follows Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1, with the caller's uniform numbers.
What it refuses to be: a tree. Run it: `python -m pytest tests/engine_plugins/test_triton.py`.
Legend: K drafts, V vocabulary, rows 0..K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SPLITS, BLOCK_V = 32, 1024


@triton.jit
def best_kernel(logits, best, index, V, per, SPLITS: tl.constexpr, BLOCK_V: tl.constexpr):
    row, split = tl.program_id(0), tl.program_id(1)
    top = tl.full((), -float("inf"), tl.float32)
    at = tl.full((), 0, tl.int32) + split * per
    for start in range(split * per, tl.minimum((split + 1) * per, V), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        inside = (v < V) & (v < (split + 1) * per)
        x = tl.load(logits + row.to(tl.int64) * V + v, mask=inside, other=-float("inf")).to(tl.float32)
        high, where = tl.max(x, axis=0), tl.argmax(x, axis=0, tie_break_left=True)
        at = tl.where(high > top, start + where, at)
        top = tl.maximum(top, high)
    tl.store(best + row * SPLITS + split, top)
    tl.store(index + row * SPLITS + split, at)


@triton.jit
def greedy_kernel(best, index, draft, tokens, count, K: tl.constexpr, SPLITS: tl.constexpr):
    s, going, taken = tl.arange(0, SPLITS), 1, 0
    for row in tl.static_range(K + 1):
        x = tl.load(best + row * SPLITS + s)
        where = tl.argmax(x, axis=0, tie_break_left=True)
        token = tl.load(index + row * SPLITS + where).to(tl.int64)
        tl.store(tokens + row, tl.where(going == 1, token, -1))
        taken += going
        if row < K:
            going = going * (tl.load(draft + row) == token).to(tl.int32)
    tl.store(count, taken)


@triton.jit
def mass_kernel(p, q, mass, V, per, K: tl.constexpr, SPLITS: tl.constexpr, BLOCK_V: tl.constexpr):
    """mass [2, K + 1, splits]: of max(p - q, 0) and of p; behind the last draft there is no q."""
    row, split = tl.program_id(0), tl.program_id(1)
    left, whole = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    for start in range(split * per, tl.minimum((split + 1) * per, V), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        inside = (v < V) & (v < (split + 1) * per)
        target = tl.load(p + row.to(tl.int64) * V + v, mask=inside, other=0.0)
        drafted = tl.load(q + row.to(tl.int64) * V + v, mask=inside & (row < K), other=0.0)
        left += tl.sum(tl.maximum(target - drafted, 0.0), axis=0)
        whole += tl.sum(target, axis=0)
    tl.store(mass + row * SPLITS + split, left)
    tl.store(mass + (K + 1 + row) * SPLITS + split, whole)


@triton.jit
def sample_kernel(
    p, q, draft, uniform, mass, tokens, count, V, per, K: tl.constexpr, SPLITS: tl.constexpr, BLOCK_V: tl.constexpr
):
    s, row = tl.arange(0, SPLITS), tl.zeros((), tl.int32)
    going = row + 1
    for i in tl.static_range(K):
        guess = tl.load(draft + i)
        accepted = tl.load(uniform + i) * tl.load(q + i * V + guess) < tl.load(p + i * V + guess)
        going = going * accepted.to(tl.int32)
        tl.store(tokens + i, tl.where(going == 1, guess, -1))
        row += going
    tl.store(tokens + K, tl.full((), -1, tl.int64))
    split_mass = tl.load(mass + row * SPLITS + s)
    residual = ((row < K) & (tl.sum(split_mass, axis=0) > 0)).to(tl.float32)  # equal p and q leave p itself
    if residual == 0.0:
        split_mass = tl.load(mass + (K + 1 + row) * SPLITS + s)
    target = tl.load(uniform + tl.minimum(row + 1, K)) * tl.sum(split_mass, axis=0)
    split = tl.sum((tl.cumsum(split_mass, axis=0) <= target).to(tl.int32), axis=0)
    split = tl.minimum(split, tl.max(tl.where(split_mass > 0, s, 0), axis=0))
    before = tl.sum(tl.where(s < split, split_mass, 0.0), axis=0)
    token, fallback = row * 0 - 1, row * 0
    for start in range(split * per, tl.minimum((split + 1) * per, V), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        inside = (v < V) & (v < (split + 1) * per)
        x = tl.load(p + row.to(tl.int64) * V + v, mask=inside, other=0.0)
        drafted = tl.load(q + row.to(tl.int64) * V + v, mask=inside & (row < K), other=0.0)
        x = tl.maximum(x - drafted * residual, 0.0)
        hit = tl.min(tl.where((tl.cumsum(x, axis=0) + before > target) & (x > 0), v, V), axis=0)
        token = tl.where((token < 0) & (hit < V), hit, token)
        fallback = tl.maximum(fallback, tl.max(tl.where(x > 0, v, 0), axis=0))  # when rounding ate the last hit
        before += tl.sum(x, axis=0)
    tl.store(tokens + row, tl.where(token < 0, fallback, token).to(tl.int64))
    tl.store(count, row + 1)


def _outputs(draft_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.empty(len(draft_K) + 1, dtype=torch.int64, device=draft_K.device)
    return tokens, torch.empty(1, dtype=torch.int32, device=draft_K.device)


def verify_greedy(logits_RV: torch.Tensor, draft_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [K + 1] int64, -1 behind the accepted ones; their count [1] int32) from logits [K + 1, V]."""
    (rows, V), (tokens, count) = logits_RV.shape, _outputs(draft_K)
    per = triton.cdiv(V, SPLITS)
    best = torch.empty((rows, SPLITS), dtype=torch.float32, device=logits_RV.device)
    index = torch.empty((rows, SPLITS), dtype=torch.int32, device=logits_RV.device)
    best_kernel[(rows, SPLITS)](logits_RV, best, index, V, per, SPLITS=SPLITS, BLOCK_V=BLOCK_V)
    greedy_kernel[(1,)](best, index, draft_K, tokens, count, K=rows - 1, SPLITS=SPLITS)
    return tokens, count


def verify_sampling(
    p_RV: torch.Tensor, q_KV: torch.Tensor, draft_K: torch.Tensor, uniform_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from fp32 probabilities, p [K + 1, V] and q [K, V], and K + 1 numbers in [0, 1)."""
    (rows, V), (tokens, count) = p_RV.shape, _outputs(draft_K)
    per = triton.cdiv(V, SPLITS)
    mass = torch.empty((2, rows, SPLITS), dtype=torch.float32, device=p_RV.device)
    mass_kernel[(rows, SPLITS)](p_RV, q_KV, mass, V, per, K=rows - 1, SPLITS=SPLITS, BLOCK_V=BLOCK_V)
    sample_kernel[(1,)](
        p_RV, q_KV, draft_K, uniform_R, mass, tokens, count, V, per, K=rows - 1, SPLITS=SPLITS, BLOCK_V=BLOCK_V
    )
    return tokens, count
