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

from engine_plugins.ops.allreduce_rmsnorm import kernel as allreduce  # noqa: E402
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

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            there = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
            return getattr(self._library, name)(*there).cpu()

        return call

    def made_before(self, *tensors: torch.Tensor) -> None:
        """Nothing to register."""

    made_by_the_kernel_before = made_before

    def finish(self) -> str:
        torch.cuda.synchronize()
        return ""

    def allreduce_of_all_ranks(self, *_: object, **__: object) -> None:
        pytest.skip("inboxes of several ranks want several GPUs")
