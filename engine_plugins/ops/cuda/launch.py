"""The compiled CUDA library, called with torch tensors.

What it is: one method per op that allocates the outputs and calls the C ABI of `api.cu` on the current stream. Nothing
here synchronizes, so a call may be captured in a CUDA graph; torch's allocator then owns the outputs.
What it refuses to be: a check of shapes (`library.py` has asked the contract) or of architecture (`compile.py` has).
Run it: `python -m pytest tests/engine_plugins/test_gpu_ops.py` runs it on the emulator.
Legend: M tokens, K inputs, N outputs, F intermediate, E experts, R ranks, P rotated pairs, S positions.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, ClassVar

import torch

from specs.errors import StageFailed

E4M3, BF16 = 0, 1
HEAD_DIM = 128  # kHeadDim of attention_decode/kernel.cuh
INBOX_TOKENS = 8  # kNarrowTokens
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


class _Moe(ctypes.Structure):
    """`struct Moe` of moe_top1/kernel.cuh, in its order."""

    _fields_: ClassVar[list[Any]] = [
        *((name, _POINTER) for name in ("x8", "x", "logits", "shared13", "shared2", "routed13", "routed2")),
        *((name, _POINTER) for name in ("shared13_scale", "routed13_scale", "shared2_scale", "routed2_scale")),
        *((name, _POINTER) for name in ("inv_scale", "routed_x", "shared_h", "routed_h", "expert", "chosen", "y")),
        *((name, _INT) for name in ("tokens", "hidden", "width", "experts")),
    ]


class _Attention(ctypes.Structure):
    """`struct Attention` of attention_decode/kernel.cuh."""

    _fields_: ClassVar[list[Any]] = [
        *((name, _POINTER) for name in ("q", "k", "v", "position", "y", "y8", "inv_out_scale")),
        *((name, _FLOAT) for name in ("k_scale", "v_scale")),
        *((name, _INT) for name in ("tokens", "heads", "kv_heads", "q_stride", "chunk_size")),
    ]


class _Norm(ctypes.Structure):
    """`struct Norm` of allreduce_rmsnorm/kernel.cuh."""

    _fields_: ClassVar[list[Any]] = [
        *((name, _POINTER) for name in ("part", "residual", "weight", "y", "residual_out", "y8", "inv_out_scale")),
        ("hidden", _INT),
        ("eps", _FLOAT),
    ]


class _Exchange(ctypes.Structure):
    """`struct Exchange` of allreduce_rmsnorm/kernel.cuh."""

    _fields_: ClassVar[list[Any]] = [("inbox", _POINTER), ("epoch", _POINTER), ("rank", _INT), ("ranks", _INT)]


def inbox_bytes(ranks: int, hidden: int) -> int:
    """Size of one rank's inbox: two parities, one row per source and token, four bytes of epoch beside four of data."""
    return 2 * ranks * INBOX_TOKENS * hidden * 4


def symmetric_inboxes(hidden: int, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Every rank's inbox in memory that the GPUs of a process group map for each other (NVLink): their addresses,
    int64 [R], for `allreduce_rmsnorm`, and this rank's own, which must be kept. A collective call."""
    from torch.distributed import _symmetric_memory as symmetric

    mine = symmetric.empty(inbox_bytes(group.size(), hidden), dtype=torch.uint8, device=torch.device("cuda"))
    mine.zero_()
    handle = symmetric.rendezvous(mine, group)
    handle.barrier()  # no peer may push into an inbox that is not zero yet
    return torch.tensor(list(handle.buffer_ptrs), device="cuda"), mine


class CudaLibrary:
    """The shared library of one architecture."""

    def __init__(self, path: Path) -> None:
        self.path, self._lib = path, ctypes.CDLL(str(path))

    def _call(self, name: str, like: torch.Tensor, *arguments: object) -> None:
        stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
        error = getattr(self._lib, f"kt_{name}")(*arguments, _POINTER(stream))
        if error:
            raise StageFailed(f"launch failed with CUDA error {error}", name, "compare the shapes with the contract")

    def _scratch(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """What one kernel of an op leaves for the next."""
        return like.new_empty(shape)

    def _routing(self, like: torch.Tensor, tokens: int) -> torch.Tensor:
        """Experts by token and distinct ones, int32 [2, M]: the kernel after the next reads them before it waits."""
        return like.new_empty((2, tokens), dtype=torch.int32)

    def gemm_low_latency(self, x_MK: torch.Tensor, w_NK: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """BF16 [M, N]; E4M3 or BF16 operands, both the same. A scale is one number or one per row, here and below."""
        y_MN = x_MK.new_empty((x_MK.shape[0], w_NK.shape[0]), dtype=torch.bfloat16)
        sizes = (_INT(x_MK.shape[0]), _INT(w_NK.shape[0]), _INT(x_MK.shape[1] * x_MK.element_size()))
        self._call("gemm_low_latency", x_MK, _format(w_NK), _at(x_MK), _at(w_NK), *_scale(scale), _at(y_MN), *sizes)
        return y_MN

    def qkv_attn_scaling(
        self,
        x_MK: torch.Tensor,
        w_NK: torch.Tensor,
        scale: torch.Tensor | None,
        position_M: torch.Tensor | None,
        cos_sin_SP2: torch.Tensor | None,
        q_rows: int,
        k_rows: int,
        head_dim: int,
        floor_scale: float,
        attn_scale: float,
        k_SGD: torch.Tensor | None = None,
        v_SGD: torch.Tensor | None = None,
        inv_k_scale: float = 1.0,
        inv_v_scale: float = 1.0,
    ) -> torch.Tensor:
        """BF16 [M, N], rows [q | k | v]; rotated with a table, scaled with a floor_scale above 0. With an E4M3 cache,
        keys and values times their inverse scale are also written at their positions."""
        y_MN = x_MK.new_empty((x_MK.shape[0], w_NK.shape[0]), dtype=torch.bfloat16)
        pointers = (_at(x_MK), _at(w_NK), *_scale(scale), _at(position_M), _at(cos_sin_SP2), _at(y_MN))
        row_bytes = x_MK.shape[1] * x_MK.element_size()
        sizes = (_INT(n) for n in (x_MK.shape[0], w_NK.shape[0], row_bytes, q_rows, k_rows, head_dim))
        cache = (_at(k_SGD), _at(v_SGD), _FLOAT(inv_k_scale), _FLOAT(inv_v_scale))
        temperature = (_FLOAT(floor_scale), _FLOAT(attn_scale))
        self._call("qkv_attn_scaling", x_MK, _format(w_NK), *pointers, *sizes, *temperature, *cache)
        return y_MN

    qkv_attn_scaling_cache = qkv_attn_scaling

    def fc13_swiglu(
        self,
        x_MK: torch.Tensor,
        w_2FK: torch.Tensor,
        scale: torch.Tensor | None,
        inv_out_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        """E4M3 [M, F] of E4M3 operands, BF16 of BF16 ones; `inv_out_scale` [1] is 1 / the down projection's input
        scale."""
        h_MF = x_MK.new_empty((x_MK.shape[0], w_2FK.shape[0] // 2))
        sizes = (_INT(x_MK.shape[0]), _INT(h_MF.shape[1]), _INT(x_MK.shape[1] * x_MK.element_size()))
        pointers = (_at(x_MK), _at(w_2FK), *_scale(scale), _at(inv_out_scale), _at(h_MF))
        self._call("fc13_swiglu", x_MK, _format(w_2FK), *pointers, *sizes)
        return h_MF

    def router(self, x_MK: torch.Tensor, w_EK: torch.Tensor) -> torch.Tensor:
        """fp32 logits [M, E]."""
        logits_ME = x_MK.new_empty((x_MK.shape[0], w_EK.shape[0]), dtype=torch.float32)
        sizes = (_INT(x_MK.shape[0]), _INT(w_EK.shape[0]), _INT(x_MK.shape[1]))
        self._call("router", x_MK, _at(x_MK), _at(w_EK), _at(logits_ME), *sizes)
        return logits_ME

    def moe_top1(
        self,
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
        """BF16 [M, K]: shared expert plus each token's best one.

        `inv_scale_3` holds 1 / the input scales of routed FC13, shared FC2 and routed FC2.
        """
        (tokens, hidden), width = x_MK.shape, shared2_KF.shape[1]
        y_MK = torch.empty_like(x_MK)
        routed_x = self._scratch(x8_MK, tokens, hidden)
        shared_h, routed_h = self._scratch(x8_MK, tokens, width), self._scratch(x8_MK, tokens, width)
        expert, chosen = self._routing(logits_ME, tokens)
        tensors = (x8_MK, x_MK, logits_ME, shared13_2FK, shared2_KF, routed13_E2FK, routed2_EKF)
        scales = (shared13_scale_2F, routed13_scale_E2F, shared2_scale, routed2_scale_E, inv_scale_3)
        arguments = _Moe(
            *(t.data_ptr() for t in (*tensors, *scales, routed_x, shared_h, routed_h, expert, chosen, y_MK)),
            *(tokens, hidden, width, logits_ME.shape[1]),
        )
        self._call("moe_top1", x_MK, ctypes.byref(arguments))
        return y_MK

    def attention_decode(
        self,
        q_MHD: torch.Tensor,
        k_SGD: torch.Tensor,
        v_SGD: torch.Tensor,
        position_M: torch.Tensor,
        k_scale: float,
        v_scale: float,
        chunk_size: int,
        inv_out_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """BF16 [M, H, D], or E4M3 with `inv_out_scale` [1]; D is 128. `q_MHD` may be a slice of QKV's rows."""
        (M, H, D), G = q_MHD.shape, k_SGD.shape[1]
        y_MHD = q_MHD.new_empty((M, H, D), dtype=torch.bfloat16 if inv_out_scale is None else torch.float8_e4m3fn)
        tensors = (q_MHD, k_SGD, v_SGD, position_M)
        outputs = (y_MHD, None, None) if inv_out_scale is None else (None, y_MHD, inv_out_scale)
        arguments = _Attention(
            *(t.data_ptr() for t in tensors),
            *(None if t is None else t.data_ptr() for t in outputs),
            *(k_scale, v_scale, M, H, G, q_MHD.stride(0), chunk_size),
        )
        self._call("attention_decode", q_MHD, ctypes.byref(arguments))
        return y_MHD

    def allreduce_rmsnorm(
        self,
        part_MH: torch.Tensor,
        residual_MH: torch.Tensor,
        weight_H: torch.Tensor,
        inbox_R: torch.Tensor,
        epoch_M: torch.Tensor,
        rank: int,
        eps: float,
        inv_out_scale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(E4M3 norm, BF16 norm, BF16 residual), each [M, H]; `inbox_R` holds every rank's inbox address as int64."""
        y8_MH = torch.empty_like(part_MH, dtype=torch.float8_e4m3fn)
        y_MH, residual_out_MH = torch.empty_like(part_MH), torch.empty_like(part_MH)
        norm = _Norm(
            *(t.data_ptr() for t in (part_MH, residual_MH, weight_H, y_MH, residual_out_MH, y8_MH, inv_out_scale)),
            *(part_MH.shape[1], eps),
        )
        exchange = _Exchange(inbox_R.data_ptr(), epoch_M.data_ptr(), rank, len(inbox_R))
        arguments = (ctypes.byref(norm), ctypes.byref(exchange), _INT(part_MH.shape[0]))
        self._call("allreduce_rmsnorm", part_MH, *arguments)
        return y8_MH, y_MH, residual_out_MH


def _format(w: torch.Tensor) -> ctypes.c_int:
    return _INT(BF16 if w.dtype == torch.bfloat16 else E4M3)


def _scale(scale: torch.Tensor | None) -> tuple[ctypes.c_void_p, ctypes.c_int]:
    return _at(scale), _INT(0 if scale is None or scale.numel() == 1 else 1)


def _at(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return _POINTER(tensor.data_ptr() if tensor is not None else None)
