"""moe_top1 in Triton: FC13 of the shared expert and of every distinct routed one, then both FC2 in one sum.

What it refuses to be: top-k. Run it: `python -m pytest tests/engine_plugins/test_gpu_ops.py`.
Legend: M tokens, K hidden, F intermediate, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine_plugins.ops.fc13_swiglu.kernel import swiglu
from engine_plugins.ops.tiles import MAX_TOKENS, ROWS, dot_rows, expert_of_slot, route, to_bf16, to_e4m3

BLOCK_N, FC13_BLOCK_K, FC2_BLOCK_K = 16, 128, 256  # other sizes spill


@triton.jit
def scored_rows(x, rows, score, inv_scale, K, start, BLOCK_K: tl.constexpr):
    """FP16 [16, BLOCK_K]: E4M3 of score * x, for the rows of one expert."""
    m, k = tl.arange(0, ROWS), start + tl.arange(0, BLOCK_K)
    tile = tl.load(x + m[:, None] * K + k[None, :], mask=rows[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
    return to_e4m3(tile * score[:, None] * tl.load(inv_scale)).to(tl.float16)


@triton.jit
def moe_fc13_kernel(
    x8, x, logits, shared_w, shared_scale, routed_w, routed_scale, shared_h, routed_h, inv_scale, M, E, F, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    m, first = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_N
    f = first + tl.arange(0, BLOCK_N)
    at = m[:, None] * F + f[None, :]
    if tl.program_id(1) == 0:
        gate = dot_rows(x8, m < M, shared_w, F, K, first, BLOCK_N, BLOCK_K)
        up = dot_rows(x8, m < M, shared_w + F.to(tl.int64) * K, F, K, first, BLOCK_N, BLOCK_K)
        value = swiglu(gate, up, shared_scale, 1, F, f, inv_scale + 1)
        tl.store(shared_h + at, value, mask=(m < M)[:, None] & (f < F)[None, :])
    else:
        expert, score = route(logits, M, E, BLOCK_E)
        mine = expert_of_slot(expert, tl.program_id(1) - 1)
        if mine >= 0:
            rows = expert == mine
            w = routed_w + mine.to(tl.int64) * 2 * F * K + f[None, :].to(tl.int64) * K
            gate, up = tl.zeros((ROWS, BLOCK_N), tl.float32), tl.zeros((ROWS, BLOCK_N), tl.float32)
            for start in range(0, K, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                a = scored_rows(x, rows, score, inv_scale, K, start, BLOCK_K)
                inside = (f < F)[None, :] & (k < K)[:, None]
                gate = tl.dot(a, tl.load(w + k[:, None], mask=inside, other=0.0).to(tl.float16), gate)
                up_at = w + F.to(tl.int64) * K + k[:, None]
                up = tl.dot(a, tl.load(up_at, mask=inside, other=0.0).to(tl.float16), up)
            value = swiglu(gate, up, routed_scale + mine * 2 * F, 1, F, f, inv_scale + 2)
            tl.store(routed_h + at, value, mask=rows[:, None] & (f < F)[None, :])


@triton.jit
def moe_fc2_kernel(
    shared_h, routed_h, logits, shared_w, shared_scale, routed_w, routed_scale, y, M, E, F, K,
    SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    m, first = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    expert, _ = route(logits, M, E, BLOCK_E)
    total = dot_rows(shared_h, m < M, shared_w, K, F, first, BLOCK_N, BLOCK_K) * tl.load(shared_scale)
    for slot in range(SLOTS):
        mine = expert_of_slot(expert, slot)
        if (mine >= 0) & (slot < M):
            w = routed_w + mine.to(tl.int64) * K * F
            total += dot_rows(routed_h, expert == mine, w, K, F, first, BLOCK_N, BLOCK_K) * tl.load(routed_scale + mine)
    tl.store(y + m[:, None] * K + n[None, :], to_bf16(total), mask=(m < M)[:, None] & (n < K)[None, :])


def moe_top1(
    x8_MK: torch.Tensor,
    x_MK: torch.Tensor,
    logits_ME: torch.Tensor,
    shared13_2FK: torch.Tensor,
    shared13_scale_2F: torch.Tensor,
    shared2_KF: torch.Tensor,
    shared2_scale: torch.Tensor,
    routed13_E2FK: torch.Tensor,
    routed13_scale_E2F: torch.Tensor,
    routed2_EKF: torch.Tensor,
    routed2_scale_E: torch.Tensor,
    inv_scale_3: torch.Tensor,
) -> torch.Tensor:
    """BF16 [M, K]: shared expert plus each token's best one."""
    (M, K), E, F = x_MK.shape, logits_ME.shape[1], shared2_KF.shape[1]
    shared_h, routed_h = (torch.empty((M, F), dtype=torch.float8_e4m3fn, device=x_MK.device) for _ in range(2))
    y_MK, block_e = torch.empty_like(x_MK), triton.next_power_of_2(E)
    moe_fc13_kernel[(triton.cdiv(F, BLOCK_N), 1 + M)](
        *(x8_MK, x_MK, logits_ME, shared13_2FK, shared13_scale_2F, routed13_E2FK, routed13_scale_E2F),
        *(shared_h, routed_h, inv_scale_3, M, E, F, K),
        BLOCK_N=BLOCK_N,
        BLOCK_K=FC13_BLOCK_K,
        BLOCK_E=block_e,
    )
    moe_fc2_kernel[(triton.cdiv(K, BLOCK_N),)](
        *(shared_h, routed_h, logits_ME, shared2_KF, shared2_scale, routed2_EKF, routed2_scale_E, y_MK, M, E, F, K),
        SLOTS=MAX_TOKENS,
        BLOCK_N=BLOCK_N,
        BLOCK_K=FC2_BLOCK_K,
        BLOCK_E=block_e,
    )
    return y_MK
