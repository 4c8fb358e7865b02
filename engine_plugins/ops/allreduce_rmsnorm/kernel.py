"""allreduce_rmsnorm in Triton: push a rank's part into every peer's inbox, add what arrives, normalize.

What it is: the protocol and the inbox layout of `kernel.cuh`; an int64 word is two values below and the epoch above.
What it refuses to be: a collective for large messages. Run it: `python -m pytest tests/engine_plugins/test_gpu_ops.py`.
Legend: M tokens, H hidden, R ranks. A word is two BF16 values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine_plugins.ops.tiles import MAX_TOKENS, to_bf16, to_e4m3

NUM_WARPS = 8  # a whole row is in registers


@triton.jit
def low_half(word):
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_half(word):
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def inbox_row(inbox_R, of, epoch, source, token, RANKS: tl.constexpr, TOKENS: tl.constexpr, W):
    """Address of the words that `source` sends to rank `of` for one token in this epoch."""
    base = tl.load(inbox_R + of).to(tl.pointer_type(tl.int64))
    return base + (((epoch & 1) * RANKS + source) * TOKENS + token) * W


@triton.jit
def allreduce_kernel(
    part, residual, weight, inbox_R, epoch_M, y8, y, residual_out, inv_out_scale, rank, W, eps,
    RANKS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_W: tl.constexpr, PUSH: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    token, word = tl.program_id(0), tl.arange(0, BLOCK_W)
    live, at = word < W, tl.program_id(0) * W + word
    epoch = tl.load(epoch_M + token) + 1
    mine = tl.load(part + at, mask=live, other=0)
    if PUSH:
        message = (mine.to(tl.int64) & 0xFFFFFFFF) | (epoch.to(tl.int64) << 32)
        for peer in range(RANKS):
            if peer != rank:
                tl.store(inbox_row(inbox_R, peer, epoch, rank, token, RANKS, TOKENS, W) + word, message, mask=live)
    if REDUCE:
        even, odd = tl.zeros((BLOCK_W,), tl.float32), tl.zeros((BLOCK_W,), tl.float32)
        for source in range(RANKS):
            arrived = mine
            if source != rank:
                inbox = inbox_row(inbox_R, rank, epoch, source, token, RANKS, TOKENS, W) + word
                message = tl.load(inbox, mask=live, volatile=True)
                while tl.max((live & ((message >> 32) != epoch)).to(tl.int32), axis=0) != 0:
                    message = tl.load(inbox, mask=live, volatile=True)
                arrived = message.to(tl.int32)
            even, odd = even + low_half(arrived), odd + high_half(arrived)
        before = tl.load(residual + at, mask=live, other=0)
        even, odd = tl.where(live, low_half(before) + even, 0.0), tl.where(live, high_half(before) + odd, 0.0)
        factor = 1.0 / tl.sqrt(tl.sum(even * even + odd * odd, axis=0) / (2 * W) + eps)
        tl.store(residual_out + 2 * at, to_bf16(even), mask=live)
        tl.store(residual_out + 2 * at + 1, to_bf16(odd), mask=live)
        finer = tl.load(inv_out_scale)
        even = even * factor * tl.load(weight + 2 * word, mask=live, other=0.0)
        odd = odd * factor * tl.load(weight + 2 * word + 1, mask=live, other=0.0)
        tl.store(y + 2 * at, to_bf16(even), mask=live)
        tl.store(y + 2 * at + 1, to_bf16(odd), mask=live)
        tl.store(y8 + 2 * at, to_e4m3(even * finer), mask=live)
        tl.store(y8 + 2 * at + 1, to_e4m3(odd * finer), mask=live)
        tl.store(epoch_M + token, epoch)


def allreduce_rmsnorm(
    part_MH: torch.Tensor,
    residual_MH: torch.Tensor,
    weight_H: torch.Tensor,
    inbox_R: torch.Tensor,
    epoch_M: torch.Tensor,
    rank: int,
    eps: float,
    inv_out_scale: torch.Tensor,
    *,
    push: bool = True,
    reduce: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(E4M3 norm, BF16 norm, BF16 residual), each [M, H]. `push` and `reduce` split the op
    where one device plays all ranks, one after the other."""
    M, H = part_MH.shape
    y8_MH = torch.empty_like(part_MH, dtype=torch.float8_e4m3fn)
    y_MH, residual_out_MH = torch.empty_like(part_MH), torch.empty_like(part_MH)
    allreduce_kernel[(M,)](
        *(part_MH.view(torch.int32), residual_MH.view(torch.int32), weight_H, inbox_R, epoch_M),
        *(y8_MH, y_MH, residual_out_MH, inv_out_scale, rank, H // 2, eps),
        RANKS=len(inbox_R),
        TOKENS=MAX_TOKENS,
        BLOCK_W=triton.next_power_of_2(H // 2),
        PUSH=push,
        REDUCE=reduce,
        num_warps=NUM_WARPS,
    )
    return y8_MH, y_MH, residual_out_MH
