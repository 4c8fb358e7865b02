"""The native engine on one NVIDIA GPU: cycle and tokens/s of the demo's bundle and of random shapes, in one table.

What it is: each row is one bundle and one way of serving it, the best of a few rounds; forced acceptance says so. GB/s
are the bytes of weights that a cycle must read by the time the device was busy. `--profile` adds the device time of a
cycle by kernel.
What it refuses to be: a claim about a model's quality, or a table without a GPU (`--device cuda-reference` runs the
script through, for its own test).
Run it: `python infra/bench_reports/engine_gpu.py --bundle DIR --scratch DIR [--shapes 260M 1B rank] [--profile]`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import numpy as np  # noqa: E402
from random_checkpoints import MAVERICK_RANK, SHAPE_260M, Shape, write_draft, write_target  # noqa: E402

from engine_plugins.native.bench import bench_engine  # noqa: E402
from engine_plugins.native.bundle import build_bundle  # noqa: E402
from engine_plugins.native.checkpoint import Tensors  # noqa: E402
from engine_plugins.native.engine import Engine, SamplingParams  # noqa: E402

SHAPE_1B = Shape("Llama 3.2 1B's shape", 2048, 16, 32, 8, 64, 8192, 128256)
SHAPES = {"260M": SHAPE_260M, "1B": SHAPE_1B, "rank": MAVERICK_RANK}
WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("acceptance forced to 2.5", {"acceptance": 2.5}),
    ("no speculation", {"speculate": False}),
)


def prepare(shape: Shape, scratch: Path, plugins: Path | None, fp8: bool) -> Path:
    """A bundle of random weights with a BF16 draft; the checkpoints are deleted."""
    out = scratch / f"{shape.name} {'FP8' if fp8 else 'BF16'}"
    if not (out / "bundle.json").exists():
        target = write_target(scratch / "target", shape, fp8)
        draft = write_draft(scratch / "draft", shape, False, min(32000, shape.vocab))
        build_bundle(target, out, draft=draft, draft_tokens=3, max_seq_len=2048, max_batch_size=2)
        shutil.rmtree(target), shutil.rmtree(draft)
    if plugins:
        shutil.copytree(plugins, out / "plugins", dirs_exist_ok=True)
    return out


def bytes_of(bundle: Path, draft_passes: int) -> int | None:
    """Weights that a cycle reads; None with experts, of which it reads those that are chosen."""
    target = Tensors(bundle / "weights.safetensors")
    if any(".experts." in name for name in target.names()):
        return None
    total = sum(target.raw(name).nbytes for name in target.names() if name != "embed" and "_pad" not in name)
    if not draft_passes:
        return total
    draft = Tensors(bundle / "draft.safetensors")
    sizes = {name: draft.raw(name).nbytes for name in draft.names() if name != "draft.embed" and "_pad" not in name}
    once = sizes.pop("draft.fc")
    head = 0 if "draft.lm_head" in sizes else target.raw("lm_head").nbytes
    return total + once + draft_passes * (sum(sizes.values()) + head)


def rows_of(name: str, bundle: Path, device: str, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """One row per way of serving."""
    rows = []
    for way, options in WAYS:
        if way != "no speculation" and not (bundle / "draft.safetensors").exists():
            continue
        r = bench_engine(bundle, device=device, tokens=tokens, rounds=rounds, **options)
        read = bytes_of(bundle, r["draft_tokens"])
        busy = r["split_us"].get("device", 0.0)
        speed = read / busy * 1e-3 if read and busy else None
        rows.append({"row": f"{name}, {way}", **r, "gb_per_s": speed, "bytes_per_cycle": read})
        print_row(rows[-1])
    return rows


def print_row(r: dict[str, Any]) -> None:
    split = r["split_us"]
    print(
        f"{r['row'][:52]:52s} {r['tokens_per_s']:8.0f} tok/s  cycle {r['cycle_us']:7.0f} us  "
        f"device {split.get('device', 0):7.0f}  host {split.get('host', 0):5.0f}  k={r['draft_tokens']} "
        f"length {r['acceptance_length']:.2f}  {r['gb_per_s'] or 0:6.0f} GB/s  TTFT {r['ttft_ms']:.1f} ms",
        flush=True,
    )


def profile(name: str, bundle: Path, device: str) -> dict[str, float]:
    """Microseconds of device time per cycle by kernel, over 64 cycles of one user."""
    from torch.profiler import ProfilerActivity, profile

    engine = Engine(bundle, device=device, verify_digests=False, forced_acceptance=2.5)
    try:
        prompt = np.random.default_rng(1).integers(3, engine.config.vocab_size, 64).tolist()
        engine.submit(prompt, SamplingParams(max_tokens=1000, ignore_eos=True))
        for _ in range(8):
            engine.step()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(64):
                engine.step()
    finally:
        engine.close()
    by_kernel: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in seen.key_averages():
        by_kernel[event.key] += event.self_device_time_total / 64
        calls[event.key] += event.count
    print(f"{name}: {sum(by_kernel.values()):.0f} us of kernels in {sum(calls.values()) / 64:.0f} launches a cycle")
    for key, us in by_kernel.most_common(16):
        print(f"  {us:8.1f} us  {calls[key] / 64:6.1f} x  {key[:96]}")
    return dict(by_kernel)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="the demo's bundle")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--plugins", type=Path, help="what engine_plugins.ops.compile wrote; without it Triton serves")
    parser.add_argument("--shapes", nargs="*", default=["260M", "1B"], choices=SHAPES)
    parser.add_argument("--bf16", nargs="*", default=[], choices=SHAPES, help="these in BF16 too, the baseline")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON of all rows")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    bundles: dict[str, Path] = {}
    if args.bundle:
        bundles["demo"] = args.scratch / "demo"
        shutil.copytree(args.bundle, bundles["demo"], dirs_exist_ok=True)
        if args.plugins:
            shutil.copytree(args.plugins, bundles["demo"] / "plugins", dirs_exist_ok=True)
    results: dict[str, Any] = {"rows": [], "kernels": {}}
    for name, fp8 in [*((name, True) for name in args.shapes), *((name, False) for name in args.bf16)]:
        started = time.perf_counter()
        made = prepare(SHAPES[name], args.scratch, args.plugins, fp8)
        bundles[made.name] = made
        print(f"{made.name}: made in {time.perf_counter() - started:.0f} s", flush=True)
    for name, bundle in bundles.items():
        results["rows"] += rows_of(name, bundle, args.device, args.tokens, args.rounds)
        if args.profile:
            results["kernels"][name] = profile(name, bundle, args.device)
        if args.out:  # after each bundle: a run that is cut short still leaves its rows
            args.out.write_text(json.dumps(results, indent=1))
    first = results["rows"][0]
    print(f"{first.get('device')}, {first['isa']}; served by {json.dumps(first.get('served'))}")


if __name__ == "__main__":
    main()
