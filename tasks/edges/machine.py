"""Facts about this machine that can shape an artifact or a measurement, read from files: no driver call. (Free GPU
memory, which shapes neither, is asked of nvidia-smi.)

Refuses to guess: what cannot be read is "none", which is a value like any other in a key.
See them with `python -m tasks.edges.machine`.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

# Only flags that change what our compiler emits or which kernel is picked; the rest vary between equal machines.
_ISA_FLAGS = (
    *("avx", "avx2", "fma", "f16c", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16", "avx512_vnni"),
    *("asimd", "asimdhp", "sve", "bf16", "i8mm"),
)
_IMAGE_DIGEST = Path("/etc/kilotok-image-digest")  # written when our images are built


@cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's fields."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def cpu_isa() -> str:
    flags = set((_cpuinfo().get("flags") or _cpuinfo().get("Features") or "").split())
    return " ".join([platform.machine(), *(flag for flag in _ISA_FLAGS if flag in flags)])


def cpu() -> str:
    """Model and the cores this process may use: a measured figure belongs to both."""
    model = _cpuinfo().get("model name", platform.machine())
    return f"{model} x {num_cores()}"


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_share(seconds: float) -> float:
    """Share of all processor time that anybody used during the next `seconds`; 0 where the kernel does not tell."""

    def read() -> tuple[int, int]:
        try:
            fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:
            return 0, 0
        return sum(fields), fields[3] + fields[4]  # all, idle and waiting for a disk

    total, idle = read()
    time.sleep(seconds)
    total, idle = read()[0] - total, read()[1] - idle
    return 1 - idle / total if total else 0.0


def gpu() -> str:
    """ "8 x NVIDIA B200", from the driver's own files."""
    models: dict[str, int] = {}
    for info in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        try:
            lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        except OSError:
            continue
        model = lines.get("Model", "unknown").strip()
        models[model] = models.get(model, 0) + 1
    return ", ".join(f"{count} x {model}" for model, count in models.items()) or "none"


def gpu_driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].split("  ")[1].strip()
    except (OSError, IndexError):
        return "none"


def gpu_free_bytes() -> int | None:
    """Memory that no process uses, over all GPUs; None where nvidia-smi does not answer."""
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return sum(int(line) for line in answer.stdout.split()) << 20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def compiler(*names: str) -> str:
    """The compiler behind `c++`, told apart by name and size, which is what a package update changes."""
    found = next(filter(None, map(shutil.which, names or ("c++", "g++", "clang++"))), None)
    if not found:
        return "none"
    real = Path(found).resolve()
    return f"{real.name} ({real.stat().st_size} bytes)"


def cuda_compiler() -> str:
    """nvcc, or none: a bundle built without it is built again once it is there."""
    return compiler("nvcc")


def container() -> str:
    try:
        return _IMAGE_DIGEST.read_text().strip() or "none"
    except OSError:
        return "none"


FACTS: dict[str, Callable[[], str]] = {
    "cpu_isa": cpu_isa,
    "cpu": cpu,
    "gpu": gpu,
    "compiler": compiler,
    "cuda_compiler": cuda_compiler,
    "container": container,
    "host": socket.gethostname,
}


def describe() -> dict[str, str]:
    """Everything, for provenance."""
    facts = {name: read() for name, read in FACTS.items()}
    return {**facts, "gpu_driver": gpu_driver(), "kernel": platform.release(), "python": platform.python_version()}


if __name__ == "__main__":
    for fact, value in describe().items():
        print(f"{fact:12} {value}")
