"""The C++ compiler of this machine: find it, run it, compile one file.

It stands above the packages that compile, because a stage is built anew when a source beside what it imports changes.
Refuses to be a build system, or a reason to fail: without a compiler the caller has a slower way.
Run it: nothing to run; `python -m engine_plugins.native.compiler OUT_DIR` compiles the engine.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from specs.errors import StageFailed

COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden", "-Wall")


def find_compiler() -> str | None:
    """g++, else clang++, else None."""
    return shutil.which("g++") or shutil.which("clang++")


def run(commands: list[list[str]]) -> None:
    """All of them side by side; the first that fails is the error."""
    children = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    for command, child in zip(commands, children, strict=False):
        output, _ = child.communicate()
        if child.returncode:
            raise StageFailed(
                f"the C++ source does not compile:\n{output[-2000:]}",
                " ".join(command[:1] + command[-3:]),
                "check the compiler's version (g++ >= 9 is known to work)",
            )


def compile_source(source: Path, out: Path) -> Path | None:
    """One C++ file as a library for this machine's own CPU, in the directory `out`; None when there is no compiler."""
    compiler = find_compiler()
    if compiler is None:
        return None
    target = out / source.with_suffix(".so").name
    run([[compiler, *COMMON_FLAGS, "-march=native", "-fopenmp-simd", "-shared", str(source), "-o", str(target)]])
    return target
