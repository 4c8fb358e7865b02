"""How fast the engine is here: tokens/s, the cycle by operator group, and the GEMV against the memory's speed.

What it is: raw engine figures, without HTTP. Every line says what was forced (acceptance, threads, instruction set).
What it refuses to be: a claim about a model; with --acceptance the drafts are accepted by decree, and it says so.
Run it: `python -m engine_plugins.native.bench --bundle DIR [--acceptance 2.5] [--users 16] [--device cuda] [--ops]`.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine_plugins.native.backend import DEVICES
from engine_plugins.native.engine import Engine, SamplingParams
from engine_plugins.native.layout import to_bfloat16
from engine_plugins.native.native_backend import ISA_CODES, NativeBackend


def bench_engine(
    bundle: Path,
    *,
    users: int = 1,
    tokens: int = 256,
    prompt_tokens: int = 64,
    acceptance: float | None = None,
    threads: int | None = None,
    isa: str | None = None,
    speculate: bool = True,
    rounds: int = 12,
    row_budget: int = 16,
    fused: bool = True,
    device: str = "cpu",
) -> dict[str, Any]:
    """Best of `rounds`: decode tokens/s (prefill excluded by counting from the first token), and the cycle's split."""
    engine = Engine(
        bundle,
        threads=threads,
        isa=isa,
        speculate=speculate,
        forced_acceptance=acceptance,
        verify_digests=False,
        row_budget=row_budget,
        fused=fused,
        device=device,
    )
    rng = np.random.default_rng(0)  # new prompts in every round: none of them is in a cache already
    best: dict[str, Any] = {"tokens_per_s": 0.0}
    try:
        for _ in range(rounds):
            prompts = [rng.integers(3, engine.config.vocab_size, prompt_tokens).tolist() for _ in range(users)]
            result = _round(engine, prompts, SamplingParams(max_tokens=tokens, ignore_eos=True))
            best = max(best, result, key=lambda r: r["tokens_per_s"])
        return {
            **best,
            "users": users,
            "forced_acceptance": acceptance,
            "threads": engine.counters().get("threads"),
            "isa": engine.counters()["isa"],
            "draft_tokens": engine.draft_tokens,
            "fused": fused,
            **{name: engine.counters()[name] for name in ("device", "served") if name in engine.counters()},
        }
    finally:
        engine.close()


def _round(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> dict[str, Any]:
    begin = time.perf_counter()
    requests = [engine.submit(p, params) for p in prompts]
    while any(not r.output_ids for r in requests):
        engine.step()
    first, done_before = time.perf_counter(), sum(len(r.output_ids) for r in requests)
    before, ends = engine.counters(), dict.fromkeys((r.id for r in requests), first)
    while engine.has_work:
        events = engine.step()
        ends.update((e.request_id, time.perf_counter()) for e in events if e.finish_reason)
    seconds, after = time.perf_counter() - first, engine.counters()
    produced, cycles = sum(len(r.output_ids) for r in requests) - done_before, after["cycles"] - before["cycles"]
    accepted = sum(sum(r.accepted_by_position) for r in requests)
    with_drafts = max(1, sum(r.cycles for r in requests))
    groups = after.get("seconds_by_group", {})
    split = {g: 1e6 * (s - before["seconds_by_group"][g]) / max(1, cycles) for g, s in groups.items()}
    return {
        "tokens_per_s": produced / seconds,
        "ttft_ms": 1e3 * (first - begin),
        "cycle_us": 1e6 * seconds / max(1, cycles),
        "step_us": 1e6 * (after["seconds"] - before["seconds"]) / max(1, cycles),
        "acceptance_length": 1 + accepted / with_drafts,
        "slowest_user_share": _slowest_share(list(ends.values()), begin),
        "split_us": split,
    }


def _slowest_share(ends: list[float], begin: float) -> float:
    """Speed from submit to end of the last user over the mean user's: 1 when all end together, 0 when one starves."""
    speeds = [1.0 / (end - begin) for end in ends]
    return min(speeds) / (sum(speeds) / len(speeds))


def bench_gemv(
    bundle: Path, *, n: int = 4096, k: int = 4096, copies: int = 64, threads: int | None = None, isa: str | None = None
) -> list[dict[str, Any]]:
    """GB/s of weights for 1, 4 and 16 rows, FP8 and BF16, rotating over `copies` matrices, beside a plain read of
    them."""
    engine = Engine(bundle, threads=threads, isa=isa, verify_digests=False)
    backend = engine.backend
    assert isinstance(backend, NativeBackend), "the reference has no kernels"
    lib, handle, rows = backend._lib, backend._handle, []
    rng = np.random.default_rng(0)
    try:
        for dtype in ("fp8", "bf16"):
            size = n * k * (1 if dtype == "fp8" else 2)
            if dtype == "fp8":
                data = rng.integers(0, 0x70, n * k, dtype=np.uint8)
            else:
                data = to_bfloat16(rng.normal(size=n * k).astype(np.float32))
            scale = np.ones(n, np.float32)
            matrices = [
                lib.kt_gemm_new(handle, data.ctypes.data, 0 if dtype == "fp8" else 1, n, k, scale.ctypes.data, 1.0)
                for _ in range(copies if dtype == "fp8" else copies // 2)
            ]
            calls: dict[int, Any] = {0: lambda matrix: lib.kt_read(handle, matrix)}  # 0 rows: the plain read
            for m in (1, 4, 8):  # as far as the scratch reaches
                x, y = rng.normal(size=(m, k)).astype(np.float32), np.zeros((m, n), np.float32)
                if lib.kt_gemm(handle, matrices[0], x.ctypes.data, m, y.ctypes.data) == 0:
                    calls[m] = partial(_gemm, lib, handle, x, y)
            seconds = _interleaved(calls, matrices)
            rows += [
                {
                    "op": "gemm_low_latency",
                    "weights": dtype,
                    "rows": m,
                    "n": n,
                    "k": k,
                    "gb_per_s": size / seconds[m] / 1e9,
                    "read_gb_per_s": size / seconds[0] / 1e9,
                    "share_of_read": seconds[0] / seconds[m],
                    "isa": backend.counters()["isa"],
                }
                for m in calls
                if m
            ]
    finally:
        engine.close()
    return rows


def _gemm(lib: Any, handle: int, x: np.ndarray, y: np.ndarray, matrix: int) -> None:
    lib.kt_gemm(handle, matrix, x.ctypes.data, len(x), y.ctypes.data)


def _interleaved(calls: dict[int, Any], matrices: list[int]) -> dict[int, float]:
    """Best mean of each call over twelve passes, in turn: a busy neighbour then slows all of them, not one."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(12):
        for name, call in calls.items():
            start = time.perf_counter()
            for matrix in matrices:
                call(matrix)
            best[name] = min(best[name], (time.perf_counter() - start) / len(matrices))
    return best


def _print_engine(r: dict[str, Any]) -> None:
    forced = f"forced acceptance {r['forced_acceptance']}" if r["forced_acceptance"] else "real acceptance"
    print(
        f"{r['tokens_per_s']:9.0f} tokens/s   {r['users']} user(s), {forced}, {r['isa']}, "
        f"{r.get('device') or str(r['threads']) + ' threads'}, "
        f"k={r['draft_tokens']}, acceptance {r['acceptance_length']:.2f}, cycle {r['cycle_us']:.0f} us "
        f"({r['step_us']:.0f} us below Python's scheduler), TTFT {r['ttft_ms']:.1f} ms"
    )
    print("          us/cycle: " + ", ".join(f"{g} {us:.0f}" for g, us in r["split_us"].items() if us >= 0.5))
    if "served" in r:
        print("          served by: " + ", ".join(f"{op} {'+'.join(by)}" for op, by in sorted(r["served"].items())))


def main() -> None:
    """Print one block per measurement."""
    parser = argparse.ArgumentParser(description="Measure the native engine.")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--users", type=int, nargs="*", default=[1])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument(
        "--acceptance", type=float, help="accept drafts by decree, this many tokens per cycle on average"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--isa", choices=[isa for isa in ISA_CODES if isa])
    parser.add_argument(
        "--row-budget", type=int, default=16, help="slots * (1 + drafts) at most; more drafts cost more"
    )
    parser.add_argument("--no-speculation", action="store_true")
    parser.add_argument("--no-fusion", action="store_true", help="one operator at a time, for comparison")
    parser.add_argument("--ops", action="store_true", help="GEMV against memory bandwidth")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--rounds", type=int, default=12, help="the best of so many counts")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    if args.ops:
        results += bench_gemv(args.bundle, threads=args.threads, isa=args.isa)
    else:
        results += [
            bench_engine(
                args.bundle,
                users=u,
                tokens=args.tokens,
                prompt_tokens=args.prompt_tokens,
                acceptance=args.acceptance,
                threads=args.threads,
                isa=args.isa,
                speculate=not args.no_speculation,
                row_budget=args.row_budget,
                fused=not args.no_fusion,
                device=args.device,
                rounds=args.rounds,
            )
            for u in args.users
        ]
    if args.json:
        print(json.dumps(results, indent=1))
        return
    for r in results:
        if "op" in r:
            print(
                f"{r['op']} {r['weights']:5s} M={r['rows']:2d} {r['n']}x{r['k']} {r['isa']}: "
                f"{r['gb_per_s']:6.1f} GB/s, "
                f"{100 * r['share_of_read']:.0f}% of a plain read ({r['read_gb_per_s']:.1f})"
            )
        else:
            _print_engine(r)


if __name__ == "__main__":
    main()
