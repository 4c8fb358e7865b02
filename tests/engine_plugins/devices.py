"""Two ways to run a GPU op without a GPU, the CUDA source on the emulator and the Triton source in its interpreter.
One with a GPU: the compiled library.

All take the calls of `CudaLibrary`. TRITON_INTERPRET must be set before a kernel is imported: import this first.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"
os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"  # ranks on streams of one GPU wait for each other: none may queue

from engine_plugins.ops.allreduce_rmsnorm import kernel as allreduce  # noqa: E402
from engine_plugins.ops.attention_decode.kernel import attention_decode  # noqa: E402
from engine_plugins.ops.cuda.launch import CudaLibrary  # noqa: E402
from engine_plugins.ops.fc13_swiglu.kernel import fc13_swiglu  # noqa: E402
from engine_plugins.ops.gemm_low_latency.kernel import gemm_kernel, gemm_low_latency  # noqa: E402
from engine_plugins.ops.moe_top1.kernel import moe_top1  # noqa: E402
from engine_plugins.ops.qkv_attn_scaling.kernel import qkv_attn_scaling  # noqa: E402
from engine_plugins.ops.router.kernel import router  # noqa: E402

OPS = Path(__file__).resolve().parents[2] / "engine_plugins" / "ops"
EMULATOR = Path(__file__).resolve().parent / "emulator"


def build(out: Path, ops: Path = OPS) -> Path:
    """The kernels as a C++ library."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command = [compiler, *flags, f"-I{EMULATOR}", f"-I{ops}", "-x", "c++", str(ops / "cuda" / "api.cu"), "-o", str(out)]
    subprocess.run(command, check=True)
    return out


class Emulated(CudaLibrary):
    """CudaLibrary on the emulator, which must know every buffer that a kernel may load from."""

    zeros = staticmethod(lambda count, dtype: torch.zeros(count, dtype=dtype))

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._lib.kt_emulate_finish.restype = ctypes.c_char_p

    def made_before(self, *tensors: torch.Tensor) -> None:
        """Weights: may be read at any time."""
        self._register(tensors, dependent=0)

    def made_by_the_kernel_before(self, *tensors: torch.Tensor) -> None:
        """Activations: NaN until grid_wait."""
        self._register(tensors, dependent=1)

    def _register(self, tensors: tuple[torch.Tensor, ...], dependent: int) -> None:
        for t in tensors:
            assert t.is_contiguous()
            self._lib.kt_emulate_buffer(
                ctypes.c_void_p(t.data_ptr()), ctypes.c_longlong(t.nbytes), ctypes.c_int(dependent)
            )

    def _scratch(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        scratch = super()._scratch(like, *shape)
        self.made_by_the_kernel_before(scratch)
        return scratch

    def _routing(self, like: torch.Tensor, tokens: int) -> torch.Tensor:
        routing = super()._routing(like, tokens)
        self.made_before(routing)
        return routing

    def together(self, on: bool) -> None:
        self._lib.kt_emulate_together(int(on))

    def finish(self) -> str:
        return str(self._lib.kt_emulate_finish().decode())

    def allreduce_of_all_ranks(
        self,
        parts: Sequence[torch.Tensor],
        *shared: torch.Tensor,
        epochs: Sequence[torch.Tensor],
        eps: float,
        inv_scale: torch.Tensor,
    ) -> list[tuple[torch.Tensor, ...]]:
        """Every rank's outputs; the ranks run side by side. `shared`: residual, weight, inbox addresses."""
        self.together(True)
        outputs = [
            self.allreduce_rmsnorm(part, *shared, epochs[rank], rank, eps, inv_scale) for rank, part in enumerate(parts)
        ]
        said = self.finish()
        self.together(False)
        assert said == ""
        return outputs


class Interpreted:
    """The Triton kernels; buffers need no registration, and one rank runs after the other."""

    gemm_low_latency = staticmethod(gemm_low_latency)
    qkv_attn_scaling = staticmethod(qkv_attn_scaling)
    fc13_swiglu = staticmethod(fc13_swiglu)
    router = staticmethod(router)
    moe_top1 = staticmethod(moe_top1)
    attention_decode = staticmethod(attention_decode)
    zeros = staticmethod(lambda count, dtype: torch.zeros(count, dtype=dtype))

    def __init__(self) -> None:
        assert type(gemm_kernel).__name__ == "InterpretedFunction"

    def made_before(self, *tensors: torch.Tensor) -> None:
        """Nothing to register."""

    made_by_the_kernel_before = made_before

    def finish(self) -> str:
        return ""

    def allreduce_of_all_ranks(
        self,
        parts: Sequence[torch.Tensor],
        *shared: torch.Tensor,
        epochs: Sequence[torch.Tensor],
        eps: float,
        inv_scale: torch.Tensor,
    ) -> list[tuple[torch.Tensor, ...]]:
        """First all push, then all reduce."""
        for rank, part in enumerate(parts):
            allreduce.allreduce_rmsnorm(part, *shared, epochs[rank], rank, eps, inv_scale, reduce=False)
        return [
            allreduce.allreduce_rmsnorm(part, *shared, epochs[rank], rank, eps, inv_scale, push=False)
            for rank, part in enumerate(parts)
        ]


class OnGpu:
    """The compiled library on a real GPU: arguments go there, results come back."""

    def __init__(self, path: Path) -> None:
        self._library = CudaLibrary(path)

    zeros = staticmethod(lambda count, dtype: torch.zeros(count, dtype=dtype, device="cuda"))

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            there = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
            result = getattr(self._library, name)(*there).cpu()
            for mine, theirs in zip(arguments, there, strict=True):  # a cache is written
                if isinstance(mine, torch.Tensor):
                    mine.copy_(theirs)
            return result

        return call

    def made_before(self, *tensors: torch.Tensor) -> None:
        """Nothing to register."""

    made_by_the_kernel_before = made_before

    def finish(self) -> str:
        torch.cuda.synchronize()
        return ""

    def allreduce_of_all_ranks(
        self,
        parts: Sequence[torch.Tensor],
        *shared: torch.Tensor,
        epochs: Sequence[torch.Tensor],
        eps: float,
        inv_scale: torch.Tensor,
    ) -> list[tuple[torch.Tensor, ...]]:
        """Every rank on a stream of its own, all at once."""
        there, inverse, parts_there = [t.cuda() for t in shared], inv_scale.cuda(), [part.cuda() for part in parts]
        torch.cuda.synchronize()
        outputs = []
        for rank, part in enumerate(parts_there):
            with torch.cuda.stream(torch.cuda.Stream()):
                outputs.append(self._library.allreduce_rmsnorm(part, *there, epochs[rank], rank, eps, inverse))
        torch.cuda.synchronize()
        return [tuple(t.cpu() for t in output) for output in outputs]
