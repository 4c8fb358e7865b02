"""From an FP8 checkpoint and a draft to a bundle: the directory an engine is started from, and nothing else.

`native`: weights in kernel layout and the fused ops compiled for this machine. `trtllm`: the PyTorch backend has no
engine file, so the bundle is checkpoint, draft, arguments, environment and argv rendered for the pinned version, the
plugin package as a wheel and unpacked, the image, and what a start will have to prove.
Refuses to start anything. Run it: `kilotok run SPEC` (stage `build_engine`).
"""

from __future__ import annotations

import json
import os
import shutil
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
    from engine_plugins.trtllm import package
    from engine_plugins.trtllm.liveness import expect
    from engine_plugins.trtllm.render import render

    engine: dict[str, Any] = job.spec["engine"]
    rendered = render(job.spec)
    config = json.loads((job.inputs["quantize"] / "config.json").read_text(encoding="utf-8"))
    _link_tree(job.inputs["quantize"], job.out / "checkpoint")
    if engine["draft_tokens"]:
        _link_tree(job.inputs["train_draft"], job.out / "draft")
    progress(1, 2, "packing the plugin package")
    wheel = package.build_wheel(job.out / "plugins")
    package.unpack(wheel, job.out / "site")
    record = {
        "backend": "trtllm",
        "version": engine["version"],
        "image": (job.spec.get("deploy") or {}).get("image"),
        **{name: engine[name] for name in ("draft_tokens", "max_batch_size", "max_seq_len", "plugins")},
        "argv": rendered.argv,
        "env": rendered.env,
        "args": rendered.args_yaml,
        "wheel": wheel.name,
        "expected": expect(job.spec, config).to_dict(),
    }
    # JSON is YAML; its placeholders are filled in when it is started.
    (job.out / "args.yaml").write_text(json.dumps(rendered.args_yaml, indent=2) + "\n")
    (job.out / "bundle.json").write_text(json.dumps(record, indent=2) + "\n")
    progress(2, 2, "rendered")
    return {"bundle.bytes": float(_size(job.out)), "bundle.plugins": float(len(engine["plugins"]))}


def _link_tree(source: Path, target: Path) -> None:
    """Hard links where the store allows it: 400 GB of checkpoint need not exist twice on one disk."""

    def link_or_copy(src: str, dst: str) -> None:
        try:
            os.link(src, dst)
        except OSError:
            shutil.copy2(src, dst)

    shutil.rmtree(target, ignore_errors=True)
    own = shutil.ignore_patterns("manifest.json", ".provenance")  # the source's papers are not the bundle's
    shutil.copytree(source, target, copy_function=link_or_copy, ignore=own)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
