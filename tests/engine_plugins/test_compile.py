"""The GPU kernels compile for both architectures, hold their data in registers, and a bundle says so. No GPU needed.

Run it: `python -m pytest tests/engine_plugins/test_compile.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine_plugins.ops import library
from engine_plugins.ops.compile import ARCHITECTURES, RECORD, compile_cuda, read_record, resources
from specs.digest import file_sha256
from specs.errors import InputError, IntegrityError

ROOT = Path(__file__).resolve().parents[2]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cuda_kernels_compile_without_spills(architecture: str, tmp_path: Path) -> None:
    record = compile_cuda(tmp_path, architecture)
    assert record == read_record(tmp_path)
    kernels = record["kernels"]
    assert {name.partition("_kernel")[0] for name in kernels} == {
        *(
            "allreduce_rmsnorm",
            "attention_decode",
            "fc13_swiglu",
            "gemm_low_latency",
            "moe_fc13",
            "moe_fc2",
            "moe_route",
            "qkv_attn_scaling",
            "router",
        )
    }
    assert all(cost["spill_bytes"] == 0 and 0 < cost["registers"] <= 208 for cost in kernels.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_triton_kernels_compile_without_spills(architecture: str) -> None:
    """In a process of its own: this one interprets the kernels."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "engine_plugins.ops.triton_cubins", architecture]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads(run.stdout)
    assert len(rows) == 15
    assert {row["kernel"]: row["spill_bytes"] for row in rows if row["spill_bytes"]} == {}


def test_ptxas_is_read_as_it_writes() -> None:
    said = """
ptxas info    : Compiling entry function '_ZN7kilotok23gemm_low_latency_kernelILi0ELb1EEEvPKvE' for 'sm_90a'
    24 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 82 registers, used 1 barriers, 8 bytes cumulative stack size, 4096 bytes smem"""
    assert resources(said) == {
        "gemm_low_latency_kernel_0_1": {"registers": 82, "spill_bytes": 28, "shared_bytes": 4096}
    }


def test_without_nvcc_it_says_so_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match="nvcc was not found"):
        assert compile_cuda(tmp_path / "plugins", "sm_90a") is None
    with pytest.warns(UserWarning, match="no kernels for a GPU"):
        library.use_kernels(tmp_path / "plugins")


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sm_90a, sm_100a"):
        compile_cuda(tmp_path, "sm_70")


def record_of(folder: Path, architecture: str) -> Path:
    """A record of a library that is there."""
    (folder / "kernels.so").write_bytes(b"ELF")
    record = {"architecture": architecture, "file": "kernels.so", "sha256": file_sha256(folder / "kernels.so")}
    (folder / RECORD).write_text(json.dumps(record))
    return folder


def test_a_changed_library_is_refused(tmp_path: Path) -> None:
    plugins = record_of(tmp_path, "sm_90a")
    (plugins / "kernels.so").write_bytes(b"elf")
    with pytest.raises(IntegrityError, match="kernels.so does not match"):
        read_record(plugins)


def test_kernels_for_another_gpu_are_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"built for sm_42a, this GPU is .*engine.gpu_architecture"):
        library.use_kernels(record_of(tmp_path, "sm_42a"))
