"""Compile the CUDA ops for one GPU architecture, and say what each kernel costs.

What it is: one nvcc run into one shared library, its digest, and ptxas's report per kernel. A kernel that spills
registers is refused: it was written to hold its weights in them. Needs nvcc, not a GPU.
What it refuses to be: a reason to fail without nvcc; it warns, and Triton or the reference serves.
Run it: `python -m engine_plugins.ops.compile OUT_DIR sm_90a`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from specs.digest import file_sha256
from specs.errors import InputError, IntegrityError, StageFailed

ARCHITECTURES = ("sm_90a", "sm_100a")  # Hopper and Blackwell data centre GPUs; `a` for their own features
RECORD = "gpu.json"
ROOT = Path(__file__).resolve().parent
SOURCE = ROOT / "cuda" / "api.cu"
FLAGS = ("-std=c++17", "-O3", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC", "-Xptxas", "-v")
_ENTRY = re.compile(r"Compiling entry function '_ZN7kilotok\d+(\w+?)(?:I((?:L\w\d+E)+)E)?E\w*' for")
SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")


def library_name(architecture: str) -> str:
    """File name of the library in a bundle's `plugins/`."""
    return f"libkilotok_{architecture}.so"


def compile_cuda(out: Path, architecture: str) -> dict[str, Any] | None:
    """Write the library and its record into `out`; None, with a warning, without nvcc.

    The record: {architecture, file, sha256, compiler, kernels: {name: {registers, spill_bytes, shared_bytes}}}.
    """
    if architecture not in ARCHITECTURES:
        raise InputError(f"unknown architecture {architecture!r}", "engine.gpu_architecture", ", ".join(ARCHITECTURES))
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        warnings.warn(
            f"nvcc was not found: the bundle has no kernels for {architecture}; on the GPU Triton serves the ops, "
            "and without Triton the slow reference",
            stacklevel=2,
        )
        return None
    out.mkdir(parents=True, exist_ok=True)
    library = out / library_name(architecture)
    command = [nvcc, *FLAGS, f"-arch={architecture}", f"-I{ROOT}", str(SOURCE), "-o", str(library)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise StageFailed(
            f"the kernels do not compile for {architecture}:\n{run.stderr[-2000:]}",
            nvcc,
            "CUDA 12.8 or newer is needed",
        )
    kernels = resources(run.stderr)
    spilling = [name for name, cost in kernels.items() if cost["spill_bytes"]]
    if spilling or not kernels:
        raise StageFailed(
            f"registers spill in {', '.join(spilling)}" if spilling else "ptxas reported no kernel",
            architecture,
            "this compiler allots registers differently; use CUDA 13.0, or lower kBatch of the kernel",
        )
    record = {
        "architecture": architecture,
        "file": library.name,
        "sha256": file_sha256(library),
        "compiler": _version(nvcc),
        "kernels": kernels,
    }
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def read_record(plugins: Path) -> dict[str, Any] | None:
    """What `compile_cuda` wrote into a bundle's `plugins/`, or None; refuses a library that is not the one it wrote."""
    if not (plugins / RECORD).exists():
        return None
    record: dict[str, Any] = json.loads((plugins / RECORD).read_text(encoding="utf-8"))
    library = plugins / record["file"]
    if not library.exists() or file_sha256(library) != record["sha256"]:
        raise IntegrityError(f"{library.name} does not match its sha256", str(plugins), "build the bundle again")
    return record


def resources(ptxas: str) -> dict[str, dict[str, int]]:
    """Registers, spilled and shared bytes of each kernel, as `ptxas -v` prints them. Template values join the name."""
    kernels: dict[str, dict[str, int]] = {}
    name = ""
    for line in ptxas.splitlines():
        if entry := _ENTRY.search(line):
            values = re.findall(r"L\w(\d+)E", entry[2] or "")
            name = "_".join([entry[1], *values])
            kernels[name] = {"registers": 0, "spill_bytes": 0, "shared_bytes": 0}
        elif name and (spill := SPILL.search(line)):
            kernels[name]["spill_bytes"] = int(spill[1]) + int(spill[2])
        elif name and (used := USED.search(line)):
            kernels[name] |= {"registers": int(used[1]), "shared_bytes": int(used[2] or 0)}
    return kernels


def _version(nvcc: str) -> str:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    return (re.search(r"release [\d.]+, V([\d.]+)", said) or ["", "unknown"])[1]


def main() -> None:
    """Compile into the directory and for the architecture named on the command line; print the record."""
    print(json.dumps(compile_cuda(Path(sys.argv[1]), sys.argv[2]), indent=1))


if __name__ == "__main__":
    main()
