"""Compile the C++ step into one shared library with a path per instruction set.

What it is: `compile_library` runs g++ once per path (AVX2, AVX-512, AVX512-BF16) and once for the C ABI, side by side,
and links them.
What it refuses to be: a build system, or a reason to fail: without a compiler it warns and returns None.
Run it: `python -m engine_plugins.native.compiler OUT_DIR`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

from engine_plugins import ops
from engine_plugins.compiler import COMMON_FLAGS, find_compiler, run

LIBRARY = "libkilotok.so"
SOURCES = Path(__file__).resolve().parent / "cpp"
OPS_DIR = Path(ops.__file__).parent
OPS = (
    "allreduce_rmsnorm",
    "attention_decode",
    "fc13_swiglu",
    "gemm_low_latency",
    "moe_top1",
    "qkv_attn_scaling",
    "router",
    "verify",
)
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
ISA_FLAGS = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": (*AVX512, "-mavx512bf16", "-mavx512vbmi")}
_compiled: dict[str, bytes] = {}


def source_files() -> list[Path]:
    """Every file that shapes the library."""
    return sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp"), *OPS_DIR.glob("*/*.h")])


def source_digest() -> str:
    """sha256 over the sources and flags."""
    digest = hashlib.sha256(repr((sorted(ISA_FLAGS.items()), COMMON_FLAGS)).encode())
    for file in source_files():
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def cpu_supported() -> bool:
    """True when this CPU has what the AVX2 path needs."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True  # not Linux: let the library's own check speak
    line = next((x for x in flags.splitlines() if x.startswith("flags")), "")
    return {"avx2", "fma", "f16c"} <= set(line.split())


def compile_library(out: Path) -> Path | None:
    """Path of the library in `out`, or None (with a warning) when there is no compiler or no x86-64."""
    compiler = find_compiler()
    if compiler is None or not cpu_supported() or not (SOURCES / "step.cpp").exists():
        reason = "no C++ compiler was found" if compiler is None else "this CPU has no AVX2, FMA and F16C"
        warnings.warn(f"{reason}: the bundle will run on the slow reference engine", stacklevel=2)
        return None
    out.mkdir(parents=True, exist_ok=True)
    digest = source_digest()
    if digest in _compiled:  # one process builds several bundles in tests and sweeps
        (out / LIBRARY).write_bytes(_compiled[digest])
        return out / LIBRARY
    with tempfile.TemporaryDirectory() as scratch:
        units = [(SOURCES / "step.cpp", isa, (*flags, f"-DKILOTOK_ISA={isa}")) for isa, flags in ISA_FLAGS.items()]
        units.append((SOURCES / "api.cpp", "api", ("-mno-avx",)))
        objects = [os.path.join(scratch, f"{name}.o") for _, name, _ in units]
        run(
            [
                [compiler, *COMMON_FLAGS, *flags, f"-I{SOURCES}", f"-I{OPS_DIR}", "-c", str(source), "-o", target]
                for (source, _, flags), target in zip(units, objects, strict=False)
            ]
        )
        linked = os.path.join(scratch, LIBRARY)
        run([[compiler, "-shared", "-o", linked, *objects, "-lpthread"]])
        shutil.copyfile(linked, out / LIBRARY)
        _compiled[digest] = Path(linked).read_bytes()
    return out / LIBRARY


def main() -> None:
    """Compile into the directory named on the command line."""
    print(compile_library(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
