"""The ops that only Triton has on the GPU, attention and verification, in its interpreter against their references.

Run it: `python -m pytest tests/engine_plugins/test_triton.py`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine_plugins.native import gpu_kernels
from engine_plugins.ops.attention_decode.reference import attention_decode as attention_reference
from engine_plugins.ops.verify.reference import verify_greedy as greedy_reference
from engine_plugins.ops.verify.reference import verify_sampling as sampling_reference
from tests.engine_plugins import devices  # noqa: F401  sets TRITON_INTERPRET before a kernel is imported
from tests.engine_plugins.formats import E4M3, assert_within_one_step, codes, normal

from engine_plugins.native import gpu_triton  # isort: skip
import triton  # isort: skip
import triton.language as tl  # isort: skip
from engine_plugins.ops.attention_decode.kernel import attention_decode  # isort: skip
from engine_plugins.ops.tiles import to_bf16  # isort: skip
from engine_plugins.ops.verify.kernel import verify_greedy, verify_sampling  # isort: skip


@pytest.mark.parametrize(
    ("positions", "chunk", "group"),
    [
        ([0], 0, 1),  # one key
        ([1000, 1001, 1002, 1003], 0, 5),
        ([126, 127, 128, 129], 128, 5),  # rows of one step on both sides of a chunk border
        ([300], 128, 2),  # a chunk that starts inside a block
        ([63, 64], 0, 3),
    ],
)
def test_attention(positions: list[int], chunk: int, group: int) -> None:
    """What no row may see is NaN in the cache."""
    kv_heads, dim, m = 2, 32, len(positions)
    q = normal(m, kv_heads * group, dim, seed=1).bfloat16() * 4
    k, v = (codes(1200, kv_heads, dim, seed=seed, high=4.0) for seed in (2, 3))
    k_scale, v_scale = 0.5, 0.25
    position = torch.tensor(positions)
    expected = attention_reference(q.float(), k.float() * k_scale, v.float() * v_scale, position, chunk)
    first = min(positions) // chunk * chunk if chunk else 0
    for cache in (k, v):
        cache.view(torch.uint8)[max(positions) + 1 :] = 0x7F
        cache.view(torch.uint8)[:first] = 0x7F
    out = attention_decode(q, k, v, position, k_scale, v_scale, chunk)
    assert_within_one_step(out, expected, 2e-3 * float(v_scale) * 4)


def test_attention_survives_scores_that_overflow_exp() -> None:
    q, k = torch.full((2, 1, 16), 100.0).bfloat16(), torch.full((8, 1, 16), 448.0).to(E4M3)
    v = codes(8, 1, 16, high=2.0)
    out = attention_decode(q, k, v, torch.tensor([6, 7]), 1.0, 1.0, 0)
    assert_within_one_step(out[1, 0], v.float()[:, 0].mean(0), 2e-3)


@triton.jit
def round_kernel(x, y, N: tl.constexpr):
    tl.store(y + tl.arange(0, N), to_bf16(tl.load(x + tl.arange(0, N))))


def test_what_is_not_a_number_stays_so() -> None:
    """Any NaN, a GPU's own with all bits set too: the engine ends a request by it. (E4M3's is the GPU's own cast.)"""
    x = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, 0x3F800000], dtype=torch.int32).view(torch.float32)
    y = x.bfloat16()
    round_kernel[(1,)](x, y, N=4)
    assert y.isnan().tolist() == [True, True, True, False]
    assert y[3] == 1.0


@pytest.mark.parametrize("vocab", [2, 1000, 5003])
@pytest.mark.parametrize("accepted", [0, 2, 3])
def test_greedy(vocab: int, accepted: int) -> None:
    logits = normal(4, vocab, seed=vocab).bfloat16()
    best = logits.float().argmax(1)
    draft = best[:3].clone()
    if accepted < 3:
        draft[accepted] = (draft[accepted] + 1) % vocab
    tokens, count = verify_greedy(logits, draft)
    expected = greedy_reference(logits.float().numpy(), draft.tolist())
    assert count.item() == len(expected) == accepted + 1
    assert tokens.tolist() == expected + [-1] * (3 - accepted)


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    logits = torch.zeros(1, 4000)
    logits[0, [77, 2500]] = 1.0
    tokens, count = verify_greedy(logits, torch.empty(0, dtype=torch.int64))
    assert (tokens.tolist(), count.item()) == ([77], 1)


@pytest.mark.parametrize("vocab", [2, 37, 4099])
def test_sampling_is_the_reference_with_the_same_numbers(vocab: int) -> None:
    """Token by token; a draw within rounding of a border between two tokens may take either."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        p, q = (np.exp(rng.normal(size=(rows, vocab)) * 2) for rows in (4, 3))
        p, q = (x / x.sum(1, keepdims=True) for x in (p, q))
        if seed % 3 == 0:
            q = p[:3].copy()  # every draft is accepted
        if seed % 3 == 1:
            p[:, : vocab // 2] = 0  # tokens that must never come
            p /= p.sum(1, keepdims=True)
        draft, uniform = rng.integers(0, vocab, 3), rng.random(4)
        tensors = (torch.from_numpy(x).float() for x in (p, q))
        tokens, count = verify_sampling(*tensors, torch.from_numpy(draft), torch.from_numpy(uniform).float())
        got = tokens[: count.item()].tolist()
        numbers = iter(uniform.astype(np.float32).tolist())
        expected = sampling_reference(p, q, draft.tolist(), lambda numbers=numbers: next(numbers))
        assert tokens[count.item() :].eq(-1).all()
        assert got[:-1] == expected[:-1]
        row = len(got) - 1
        weights = np.maximum(p[row] - q[row], 0) if row < 3 else p[row]
        weights = weights if weights.sum() > 0 else p[row]
        border = np.cumsum(weights) / weights.sum()
        low = border[got[-1] - 1] if got[-1] else 0.0
        u = float(np.float32(uniform[min(row + 1, 3)]))
        assert weights[got[-1]] > 0
        assert low - 1e-5 <= u <= border[got[-1]] + 1e-5


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("rope", "eps", "floor_scale"), [(False, 0.0, 0.0), (True, 1e-5, 0.0), (False, 0.0, 4.0)])
def test_queries_keys_and_values_find_their_places(fp8: bool, rope: bool, eps: float, floor_scale: float) -> None:
    """Padding goes behind the last position; rows that nothing was written to keep what they had."""
    heads, kv_heads, dim = 6, 2, 32
    qkv = normal(3, (heads + 2 * kv_heads) * dim, seed=1).bfloat16() * 300
    table = torch.stack((normal(20, dim // 2, seed=2).cos(), normal(20, dim // 2, seed=2).sin()), dim=-1).contiguous()
    how = gpu_kernels.Positioning(table if rope else None, eps, floor_scale, 0.1)
    position, write = torch.tensor([7, 8, 8]), torch.tensor([7, 8, 21])
    results = []
    for place in (gpu_kernels.place_qkv, gpu_triton.place_qkv):
        k, v = (torch.full((28, kv_heads, dim), 3.0, dtype=E4M3 if fp8 else torch.bfloat16) for _ in range(2))
        results.append((place(qkv, k, v, position, write, (1.7, 0.6), how), k, v))
    for expected, actual in zip(*results, strict=True):
        assert_within_one_step(actual, expected.float())


def test_rounding_and_swiglu_between_ops() -> None:
    x, inv_scale = normal(3, 2 * 1100, seed=4).bfloat16() * 400, torch.tensor([0.9])
    assert_within_one_step(gpu_triton.to_e4m3_rows(x, inv_scale), x.float() * 0.9)
    gate, up = (x.float() / 100).bfloat16().float().chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    assert_within_one_step(gpu_triton.silu_mul((x.float() / 100).bfloat16()), expected)
    assert_within_one_step(gpu_kernels.silu_mul((x.float() / 100).bfloat16()), expected)


@pytest.mark.parametrize("accepted", [1, 3, 4])
@pytest.mark.parametrize(("position", "num_drafts"), [(0, 0), (40, 3), (60, 3), (61, 2), (63, 0)])
@pytest.mark.parametrize("broken", [False, True])
def test_a_cycle_s_rows_and_its_end(accepted: int, position: int, num_drafts: int, broken: bool) -> None:
    """Up to the last of 64 positions; with NaN the count is 0."""
    count = min(accepted, num_drafts + 1)
    chosen = torch.tensor([5, 6, 7, 8]).masked_fill(torch.arange(4) >= count, -1)
    logits = normal(4, 9).bfloat16()
    logits[2] = float("nan") if broken else 1.0
    seen = []
    for how in (gpu_kernels, gpu_triton):
        state, result = torch.tensor([position, num_drafts, 5, 6, 7, 8]), torch.zeros(5, dtype=torch.int64)
        rows = how.plan_rows(state, 64)
        settled = how.settle(logits, chosen, torch.tensor([count], dtype=torch.int32), state, result, 64)
        seen.append([t.tolist() for t in (*rows, *settled, state, result)])
    assert seen[0] == seen[1]
    assert seen[0][-1][0] == (0 if broken else count)
