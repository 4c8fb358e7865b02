"""Compile every Triton kernel for a GPU that is not here, at Maverick's shapes, and say what each costs.

What it is: `triton.compile` with an explicit target, and ptxas's report per kernel: the kernels compile for
the GPU and keep their data in registers.
What it refuses to be: part of a bundle. Triton compiles again, and caches, where the kernels run.
Run it: `python -m engine_plugins.ops.triton_cubins sm_90a`.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine_plugins.ops.allreduce_rmsnorm.kernel import NUM_WARPS, allreduce_kernel
from engine_plugins.ops.attention_decode.kernel import combine_kernel, split_kernel
from engine_plugins.ops.compile import SPILL, USED
from engine_plugins.ops.fc13_swiglu.kernel import fc13_kernel
from engine_plugins.ops.gemm_low_latency.kernel import gemm_kernel
from engine_plugins.ops.moe_top1.kernel import moe_fc2_kernel, moe_fc13_kernel
from engine_plugins.ops.qkv_attn_scaling.kernel import qkv_kernel
from engine_plugins.ops.verify.kernel import best_kernel, greedy_kernel, mass_kernel, sample_kernel

GEMM = {"BLOCK_N": 16, "BLOCK_K": 256}
MOE = {"BLOCK_N": 16, "BLOCK_K": 128, "BLOCK_E": 128}
VERIFY = {"K": 3, "SPLITS": 32, "BLOCK_V": 1024}
# Types of the arguments in order: pointers to 8 = E4M3, b = BF16, f = fp32, i = int32, l = int64; n = int32, s = fp32.
KERNELS: tuple[tuple[Any, str, dict[str, Any]], ...] = (
    (gemm_kernel, "88fbnnnn", {**GEMM, "SCALED": True}),
    (gemm_kernel, "bbbfnnnn", {"BLOCK_N": 16, "BLOCK_K": 128, "SCALED": False}),
    (qkv_kernel, "88flfbnnnnnnssn", {"BLOCK_P": 16, "BLOCK_K": 256, "ROPE": True, "TEMPERATURE": False}),
    (qkv_kernel, "88flfbnnnnnnssn", {"BLOCK_P": 16, "BLOCK_K": 256, "ROPE": False, "TEMPERATURE": True}),
    (fc13_kernel, "88f8nnnfn", {"BLOCK_F": 16, "BLOCK_K": 256}),
    (moe_fc13_kernel, "8bf8f8f88fnnnn", MOE),
    (moe_fc2_kernel, "88f8f8fbnnnn", {**MOE, "BLOCK_K": 256, "SLOTS": 8}),
    (allreduce_kernel, "iifli8bbfnns", {"RANKS": 8, "TOKENS": 8, "BLOCK_W": 4096, "PUSH": True, "REDUCE": True}),
    (
        split_kernel,
        "b88lffnnnsn",
        {"GROUP": 5, "D": 128, "SPLITS": 16, "BLOCK_R": 32, "BLOCK_M": 4, "BLOCK_S": 64},
    ),
    (combine_kernel, "ffbsf", {"D": 128, "SPLITS": 16, "ROUND": False}),
    (combine_kernel, "ff8sf", {"D": 128, "SPLITS": 16, "ROUND": True}),
    (best_kernel, "bfinn", {"SPLITS": 32, "BLOCK_V": 1024}),
    (greedy_kernel, "filli", {"K": 3, "SPLITS": 32}),
    (mass_kernel, "fffnn", VERIFY),
    (sample_kernel, "fflfflinn", VERIFY),
)
_TYPES = {"8": "*fp8e4nv", "b": "*bf16", "f": "*fp32", "i": "*i32", "l": "*i64", "n": "i32", "s": "fp32"}


def cubins(architecture: str) -> list[dict[str, Any]]:
    """One row per kernel: registers, spilled and shared bytes, sha256 of the cubin."""
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_").rstrip("a")), 32)
    rows = []
    for kernel, types, constants in KERNELS:
        names = [name for name in kernel.arg_names if name not in constants]
        signature = {name: _TYPES[kind] for name, kind in zip(names, types, strict=True)}
        aligned = {
            (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names if "*" in signature[name]
        }
        full = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(kernel, full, constexprs=constants, attrs=aligned)
        warps = {"num_warps": NUM_WARPS} if kernel is allreduce_kernel else {}
        code = triton.compile(source, target=target, options=warps).asm
        cost = _resources(code["ptx"], architecture)
        rows.append({"kernel": kernel.__name__, **cost, "sha256": hashlib.sha256(code["cubin"]).hexdigest()})
    return rows


def _resources(ptx: str, architecture: str) -> dict[str, int]:
    """What Triton's own ptxas says of the PTX that became the cubin."""
    tools = triton.knobs.nvidia
    ptxas = (tools.ptxas_blackwell if architecture.startswith("sm_10") else tools.ptxas).path
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "kernel.ptx"
        file.write_text(ptx)
        command = [ptxas, "-v", f"-arch={architecture}", str(file), "-o", f"{scratch}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spill, used = SPILL.search(said), USED.search(said)
    assert spill and used, said
    return {"registers": int(used[1]), "spill_bytes": int(spill[1]) + int(spill[2]), "shared_bytes": int(used[2] or 0)}


if __name__ == "__main__":
    print(json.dumps(cubins(sys.argv[1]), indent=1))
