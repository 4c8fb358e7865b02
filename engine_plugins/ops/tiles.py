"""What the Triton kernels share: a 16-row dot product, rounding, and routing.

What it is: device functions. FP8 operands are unpacked to FP16, exactly, before they multiply: sums are fp32.
What it refuses to be: a launcher. Imported only where Triton is (Linux).
Run it: `python -m pytest tests/engine_plugins/test_gpu_ops.py` runs kernels in Triton's interpreter.
Legend: M rows (padded to 16), N outputs, K inputs, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = tl.constexpr(16)  # the least that tl.dot takes
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # its tl.dot multiplies the bit patterns of BF16
MAX_TOKENS = 8  # of every kernel but the plain GEMM


@triton.jit
def dot_rows(x, rows, w, N, K, first, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """fp32 [16, BLOCK_N]: x [., K] times rows first .. first + BLOCK_N of w [N, K]. Where `rows` is false x is zero."""
    m, n = tl.arange(0, ROWS), first + tl.arange(0, BLOCK_N)
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + m[:, None] * K + k[None, :], mask=rows[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(w + n[None, :].to(tl.int64) * K + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
        total = dot(a, b, total)
    return total


@triton.jit
def dot(a, b, total):
    """total + a b in fp32: E4M3 through FP16, BF16 as it is."""
    if b.dtype == tl.float8e4nv:
        return tl.dot(a.to(tl.float16), b.to(tl.float16), total)
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total)


def scale_step(scale: torch.Tensor | None) -> int:
    """How far the next row's scale is: 0 when one number holds for all rows."""
    return 0 if scale is None or scale.numel() == 1 else 1


# Rounded here rather than by the cast, which then is exact: Triton's interpreter cuts bits off, a GPU rounds.
@triton.jit
def to_bf16(x):
    """Nearest BF16, ties to even; what is not a number stays so (a GPU's NaN, all ones, would round to -0)."""
    bits = x.to(tl.int32, bitcast=True)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return tl.where(x == x, nearest, x).to(tl.bfloat16)


@triton.jit
def to_e4m3(x):
    """Nearest E4M3, ties to even, saturating; what is not a number stays so."""
    inside = tl.minimum(tl.maximum(x, -448.0), 448.0)
    bits = inside.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
    subnormal = (inside + 24576.0) - 24576.0  # fp32 keeps steps of 2^-9 there, E4M3's smallest
    nearest = tl.where(tl.abs(inside) < 0.015625, subnormal, normal)
    return tl.where(x == x, nearest, x).to(tl.float8e4nv)


@triton.jit
def route(logits, M, E, BLOCK_E: tl.constexpr):
    """(expert, score) of 16 rows; the lowest index of equals. Rows from M on get expert -1."""
    m, e = tl.arange(0, ROWS), tl.arange(0, BLOCK_E)
    values = tl.load(
        logits + m[:, None] * E + e[None, :], mask=(m < M)[:, None] & (e < E)[None, :], other=-float("inf")
    )
    best = tl.max(values, axis=1)
    expert = tl.argmax(values, axis=1, tie_break_left=True)
    return tl.where(m < M, expert, -1), 1.0 / (1.0 + tl.exp(-best))


@triton.jit
def expert_of_slot(expert, slot):
    """The expert of row `slot`, or -1 when an earlier row already has it."""
    m = tl.arange(0, ROWS)
    mine = tl.sum(tl.where(m == slot, expert, 0), axis=0)
    taken = tl.sum(((expert == mine) & (m < slot)).to(tl.int32), axis=0)
    return tl.where(taken > 0, -1, mine)
