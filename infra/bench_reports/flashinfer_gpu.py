"""FlashInfer's calls for the work of our fused ops, at Maverick's TP8 shapes, beside our ops in one run on one GPU.

What it is: the cases of tasks/bench.py, timed its way (CUDA graph, weights rotated out of the L2). Where one of our ops
is several of FlashInfer's calls the row names the sequence; a call that fails leaves its error in its row.
What it refuses to be: a judge of what FlashInfer has no small call for. Greedy verify, the MoE (its CUTLASS one is 248
files to compile) and the all-reduce (several ranks) have no row.
Run it: `python infra/bench_reports/flashinfer_gpu.py [--out FILE.json]`; exits 2 without FlashInfer or a
GPU. Attention comes last: after a kernel that faults the process can measure nothing more.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from specs.errors import InputError  # noqa: E402 - the script runs from the repository root
from tasks.bench import Call, Case, Maker, cases, gpu_here, graph_us, rotation  # noqa: E402

try:
    import flashinfer
except ImportError as missing:
    print(f"no FlashInfer to compare with: {missing}; pip install flashinfer-python", file=sys.stderr)
    raise SystemExit(2) from None

PAGE, WORKSPACE_BYTES = 64, 128 << 20
E4M3 = torch.float8_e4m3fn
Makers = dict[str, Callable[[], Callable[[], Any]]]  # a name -> makes a call over fresh weights


@dataclass(frozen=True)
class Beside(Case):
    """A case of ours with FlashInfer's calls for it."""

    calls: Makers = field(default_factory=dict)


def beside(case: Case, calls: Makers) -> Case:
    return Beside(**vars(case), calls=calls)


class Peer(Maker):
    """Our cases, each with FlashInfer's calls."""

    def products(self, n: int, k: int) -> Makers:
        """FP8 GEMM by cuBLASLt: its first choice, and the fastest of its algorithms, which FlashInfer times warm."""
        x, one = self.e4m3(self.tokens, k), self.ones(1)

        def first() -> Call:
            return functools.partial(flashinfer.mm_fp8, x, self.e4m3(n, k), one, backend="cublas")

        def tuned() -> Call:
            call = first()
            with flashinfer.autotune(True):  # measures a shape once, then remembers
                call()
            return call

        return {"mm_fp8(cublas)": first, "mm_fp8(cublas), autotuned": tuned}

    def products_bf16(self, n: int, k: int) -> Makers:
        x = self.bf16(self.tokens, k)

        def cublas() -> Call:
            return functools.partial(flashinfer.mm_bf16, x, self.bf16(n, k).T, backend="cublaslt")

        def tiny() -> Call:
            return functools.partial(flashinfer.gemm.tinygemm_bf16, x, self.bf16(n, k), self.bf16(self.tokens, n))

        return {"mm_bf16(cublaslt)": cublas} | ({"tinygemm_bf16": tiny} if n % 16 == 0 else {})  # else it refuses

    def gemm(self, n: int, k: int) -> Case:
        return beside(super().gemm(n, k), self.products(n, k))

    def gemm_bf16(self, n: int, k: int) -> Case:
        return beside(super().gemm_bf16(n, k), self.products_bf16(n, k))

    def router(self, experts: int, hidden: int) -> Case:
        return beside(super().router(experts, hidden), self.products_bf16(experts, hidden))

    def qkv(self, q_heads: int, kv_heads: int, head_dim: int, hidden: int, position: int) -> Case:
        case = super().qkv(q_heads, kv_heads, head_dim, hidden, position)
        calls = self.products((q_heads + 2 * kv_heads) * head_dim, hidden)
        return beside(case, {f"{name}; no rotation, no scaling": make for name, make in calls.items()})

    def fc13(self, width: int, hidden: int) -> Case:
        def sequence(make: Callable[[], Callable[[], Any]]) -> Call:
            product = make()
            return lambda: flashinfer.silu_and_mul(product()).to(E4M3)

        calls = self.products(2 * width, hidden)
        then = " + silu_and_mul + torch's .to(e4m3)"
        named: Makers = {name + then: functools.partial(sequence, make) for name, make in calls.items()}
        return beside(super().fc13(width, hidden), named)

    def norm(self, hidden: int) -> Case:
        shape, weight, one = (self.tokens, hidden), self.bf16(hidden), self.ones(1)

        def plain() -> Call:
            rows = (self.bf16(*shape), self.bf16(*shape))
            return functools.partial(flashinfer.fused_add_rmsnorm, *rows, weight, 1e-5)

        def rounded() -> Call:
            rows = (self.e4m3(*shape), self.bf16(*shape), self.bf16(*shape))
            return functools.partial(flashinfer.fused_add_rmsnorm_quant, *rows, weight, one, 1e-5)

        calls: Makers = {"fused_add_rmsnorm; BF16 only": plain, "fused_add_rmsnorm_quant; FP8 only": rounded}
        return beside(super().norm(hidden), calls)

    def attention(self, q_heads: int, kv_heads: int, head_dim: int, context: int) -> Case:
        m, device, pages, scale = self.tokens, self.device, context // PAGE, head_dim**-0.5
        q, space = self.bf16(m, q_heads, head_dim), torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        table = torch.arange(pages, dtype=torch.int32, device=device)
        length = torch.tensor([context], dtype=torch.uint32).to(device)
        causal = torch.tensor([[[(2 << row) - 1, 0] for row in range(m)]], dtype=torch.uint16).to(device)

        def cache() -> tuple[torch.Tensor, torch.Tensor]:
            return self.e4m3(pages, PAGE, kv_heads, head_dim), self.e4m3(pages, PAGE, kv_heads, head_dim)

        def xqa() -> Call:
            given = (q, cache(), space, table[None], length, context, scale)
            more: dict[str, Any] = {"q_len_per_req": m, "mask": causal} if m > 1 else {}
            return functools.partial(flashinfer.decode.xqa_batch_decode_with_kv_cache, *given, **more)

        @functools.cache
        def planned() -> Any:
            at = [torch.tensor(rows, dtype=torch.int32, device=device) for rows in ([0, m], [0, pages], [PAGE])]
            index = (at[0], at[1], table, at[2])
            own = torch.empty_like(space)  # XQA wants its semaphores left at zero
            kernel = flashinfer.BatchPrefillWithPagedKVCacheWrapper(own, "NHD", True, *index, backend="fa2")
            heads, dtypes = (q_heads, kv_heads, head_dim, PAGE), {"q_data_type": q.dtype, "kv_data_type": E4M3}
            kernel.plan(*(i.clone() for i in index), *heads, causal=True, sm_scale=scale, **dtypes)
            return kernel

        def batch() -> Call:
            return functools.partial(planned().run, q, cache())

        calls: Makers = {"xqa_batch_decode_with_kv_cache": xqa, "BatchPrefillWithPagedKVCache(fa2)": batch}
        return beside(super().attention(q_heads, kv_heads, head_dim, context), calls)


def timed(make: Callable[[], Call], copies: int) -> tuple[float | None, str]:
    """(microseconds per call, "") or (None, the error)."""
    try:
        return graph_us([make() for _ in range(copies)]), ""
    except Exception as error:  # noqa: BLE001 - one row must not end the others
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="FlashInfer's calls beside our fused ops on one GPU")
    parser.add_argument("--out", type=Path, help="the rows as JSON, rewritten after each")
    given = parser.parse_args()
    try:
        gpu_here()
    except InputError as refused:
        print(refused, file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, FlashInfer {flashinfer.__version__}\n")
    print("| op | shape | tokens | FlashInfer's call | cold us | our us |\n|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    todo = [(m, case) for m in (1, 4) for case in cases(m, torch.device("cuda"), maker=Peer)]
    for m, case in sorted(todo, key=lambda pair: pair[1].op == "attention_decode"):
        ours = timed(case.make, rotation(case)) if isinstance(case, Beside) else (None, "")
        for name, make in getattr(case, "calls", {}).items():
            cold_us, error = timed(make, rotation(case))
            row = {"op": case.op, "shape": case.shape, "tokens": m, "flashinfer_call": name, "cold_us": cold_us}
            rows.append(row | {"error": error, "our_us": ours[0], "our_error": ours[1]})
            cells = [f"{us:.2f}" if us else why for us, why in ((cold_us, error), ours)]
            print(f"| {case.op} | {case.shape} | {m} | {name} | {' | '.join(cells)} |", flush=True)
            if given.out:
                given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
