"""From an FP8 checkpoint and a draft to a bundle: the directory an engine is started from, and nothing else.

`native`: weights in kernel layout and the fused ops compiled for this machine. `trtllm`: the PyTorch backend has no
engine file, so the bundle is checkpoint, draft, arguments, environment and argv rendered for the pinned version, the
plugin package as a wheel and unpacked, the image, and what a start will have to prove.
Refuses to start anything. Run it: `kilotok run SPEC` (stage `build_engine`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specs.errors import InputError
from tasks.job import Job, Progress


def build(job: Job, progress: Progress) -> dict[str, float]:
    """Write the bundle into `job.out`; returns its size in bytes and the number of plugins."""
    backend = job.spec["engine"]["backend"]
    _gpu_kernels(job, progress)
    if backend == "native":
        return _native(job, progress)
    if backend == "trtllm":
        return _trtllm(job, progress)
    raise InputError(f"unknown engine backend {backend!r}", "engine.backend", "use native or trtllm")


def _gpu_kernels(job: Job, progress: Progress) -> None:
    """The ops for `engine.gpu_architecture`, in `plugins/`, before the bundle's files are listed."""
    architecture = job.spec["engine"].get("gpu_architecture")
    if not architecture:
        return
    from engine_plugins.ops.compile import compile_cuda

    progress.note(f"compiling the fused ops for {architecture}")
    if compile_cuda(job.out / "plugins", architecture) is None:
        progress.note(f"NO nvcc: the bundle has no kernels for {architecture}, Triton or the slow reference will serve")


def _native(job: Job, progress: Progress) -> dict[str, float]:
    from engine_plugins.native.bundle import build_bundle

    engine: dict[str, Any] = job.spec["engine"]
    progress.note("compiling the fused ops for this machine and packing weights")
    summary = build_bundle(
        job.inputs["quantize"],
        job.out,
        draft=job.inputs["train_draft"],
        draft_tokens=engine["draft_tokens"],
        max_seq_len=engine["max_seq_len"],
        max_batch_size=engine["max_batch_size"],
        plugins=engine["plugins"],
    )
    progress(1, 1, "packed")
    return {"bundle.bytes": float(_size(job.out)), "bundle.plugins": float(len(summary.get("plugins", ())))}


def _trtllm(job: Job, progress: Progress) -> dict[str, float]:
    from engine_plugins.trtllm.bundle import write_bundle

    write_bundle(job.out, job.spec, job.inputs["quantize"], job.inputs["train_draft"])
    progress(1, 1, "rendered")
    return {"bundle.bytes": float(_size(job.out)), "bundle.plugins": float(len(job.spec["engine"]["plugins"]))}


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
