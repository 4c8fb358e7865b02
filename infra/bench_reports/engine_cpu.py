"""The native engine on a CPU beside its own baseline, transformers, torch and llama.cpp: one run, one table.

What it is: every figure of the report from one process tree on one machine, best of several interleaved rounds, with
the share of the CPU that others used meanwhile. Random shapes say so, forced acceptance says so.
What it refuses to be: a claim about a GPU, or about a model's quality.
Run it: `python infra/bench_reports/engine_cpu.py --bundle DIR --source specs/models/tiny-llama4 --scratch DIR
[--llamacpp PYTHON]`; first with `--prepare`, which builds what is measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

from random_checkpoints import MAVERICK_RANK, SHAPE_7M, SHAPE_260M, write_draft, write_target  # noqa: E402

from engine_plugins.native.bench import bench_engine, bench_gemv  # noqa: E402
from engine_plugins.native.bundle import build_bundle  # noqa: E402

ROUNDS = 4


def prepare(source: Path, scratch: Path) -> None:
    """Random checkpoints and all bundles; weights of the checkpoints are deleted once packed."""
    build_bundle(source, scratch / "source", max_batch_size=8)
    for shape in (SHAPE_7M, SHAPE_260M, MAVERICK_RANK):
        for name, fp8, draft_fp8 in (("bf16", False, None), ("fp8", True, False), ("fp8 FP8 draft", True, True)):
            out = scratch / f"{shape.name} {name}"
            if (out / "bundle.json").exists() or (shape is MAVERICK_RANK and name != "fp8"):
                continue
            target = write_target(scratch / "target", shape, fp8)
            draft = None if draft_fp8 is None else write_draft(scratch / "draft", shape, draft_fp8, shape.vocab)
            build_bundle(target, out, draft=draft, draft_tokens=3 if draft else 0, max_seq_len=1024, max_batch_size=2)


def with_slots(bundle: Path, out: Path, slots: int) -> None:
    """The same bundle with another number of slots."""
    shutil.copytree(bundle, out, dirs_exist_ok=True)
    record = json.loads((out / "bundle.json").read_text())
    (out / "bundle.json").write_text(json.dumps({**record, "max_batch_size": slots}))


def others_share(call: Callable[[], None]) -> float:
    """Runs `call`; the share of this machine's CPU time that went to processes that are not ours."""

    def busy() -> float:
        fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")

    def own() -> float:
        t = os.times()
        return t.user + t.system + t.children_user + t.children_system

    before, started = busy() - own(), time.perf_counter()
    call()
    return (busy() - own() - before) / ((time.perf_counter() - started) * (os.cpu_count() or 1))


def engine_rows(bundle: Path, scratch: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name of a row -> its measurement."""
    source = scratch / "source"
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "demo: FP8, k=3, fused, acceptance forced to 2.5": lambda: bench_engine(bundle, acceptance=2.5, rounds=8),
        "demo: the same on AVX2": lambda: bench_engine(bundle, acceptance=2.5, isa="avx2", rounds=4),
        "demo: FP8, no speculation, fused": lambda: bench_engine(bundle, speculate=False, rounds=8),
        "demo: BF16, no speculation, fused": lambda: bench_engine(source, speculate=False, rounds=8),
        "demo: BF16, no speculation, unfused": lambda: bench_engine(source, speculate=False, fused=False, rounds=8),
        "demo: 16 users": lambda: bench_engine(bundle, users=16, acceptance=2.5, rounds=3),
        "demo with 16 slots: 16 users": lambda: bench_engine(scratch / "demo16", users=16, acceptance=2.5, rounds=3),
    }
    for shape, tokens, rounds in ((SHAPE_7M, 256, 8), (SHAPE_260M, 48, 3)):
        options: dict[str, Any] = {"tokens": tokens, "rounds": rounds}
        for name, path, more in (
            ("FP8, BF16 draft, acceptance forced to 2.5", "fp8", {"acceptance": 2.5}),
            ("FP8, FP8 draft, acceptance forced to 2.5", "fp8 FP8 draft", {"acceptance": 2.5}),
            ("FP8, no speculation", "fp8", {"speculate": False}),
            ("BF16, no speculation", "bf16", {"speculate": False}),
        ):
            where = scratch / f"{shape.name} {path}"
            run[f"{shape.name}: {name}"] = lambda w=where, m=more, o=options: bench_engine(w, **o, **m)
    return run


def op_rows(scratch: Path, threads: int) -> list[dict[str, Any]]:
    """Each operator group of the Maverick rank, per layer, against the sum of its parts in torch."""
    import torch
    from torch_parts_cpu import part_times

    torch.set_num_threads(threads)
    s, bundle = MAVERICK_RANK, scratch / f"{MAVERICK_RANK.name} fp8"
    per_layer = {"norms": s.layers, "qkv": s.layers, "attention": s.layers, "o": s.layers, "dense_mlp": s.layers // 2}
    per_layer |= {"moe": s.layers // 2, "lm_head": 1, "sampling": 1}
    rows = []
    for tokens, options in ((1, {"speculate": False}), (4, {"acceptance": 2.5})):
        ours = bench_engine(bundle, tokens=128, prompt_tokens=128, rounds=3, **options)["split_us"]
        theirs = part_times(s, tokens)
        for group, count in per_layer.items():
            us = ours[group] / count
            rows.append({"op": group, "M": tokens, "us": us, "torch_us": theirs[group], "factor": theirs[group] / us})
    return rows


def over_http(bundle: Path, *flags: str, users: int = 1, requests: int = 32) -> dict[str, float]:
    """Real prompts, drafts and ends, through the client that `validate` uses. One user: the median answer's tokens
    after the first chunk per second; more: all tokens per second from the first request to the last token."""
    from tasks.edges.service import free_port, http_status
    from tasks.validate.client import Ask, Endpoint, token_counter
    from tasks.validate.load import parallel_users

    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    argv = [sys.executable, "-m", "engine_plugins.native.server", "--bundle", str(bundle), "--port", url.split(":")[-1]]
    server = subprocess.Popen([*argv, "--served-model-name", "m", *flags], stderr=subprocess.DEVNULL, cwd=ROOT)
    lines = (ROOT / "specs/models/tiny-llama4/heldout.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[:: max(1, len(lines) // requests)][:requests]]
    try:
        while http_status(f"{url}/health") != 200:
            if server.poll() is not None:
                raise SystemExit(f"the server of {bundle} ended with {server.returncode}")
            time.sleep(0.1)
        endpoint = Endpoint(url, "m", token_counter(bundle / "tokenizer.json"))
        rows = parallel_users(endpoint, [Ask(str(i), p, max_tokens=128) for i, p in enumerate(prompts)], users)
    finally:
        server.terminate()
        server.wait(20)
    ends = [row["sent_s"] + row["duration_ms"] / 1e3 for row in rows]
    seconds = max(ends) - min(row["sent_s"] for row in rows)
    each = [sum(row["usage_tokens"] for row in rows if row["user"] == user) / seconds for user in range(users)]
    speeds = [row["tps_user"] for row in rows if row["tps_user"] == row["tps_user"]]
    found = {"tokens_per_s": statistics.median(speeds) if users == 1 else sum(each)}
    found["acceptance_length"] = 1 + sum(row["accepted"] for row in rows) / max(1, sum(row["cycles"] for row in rows))
    if users == 1:
        return {**found, "cycle_us": 1e6 * found["acceptance_length"] / found["tokens_per_s"]}
    return {**found, "slowest_user_share": min(each) / statistics.mean(each)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures; interleaved rounds, the best of each row."""
    from torch_parts_cpu import transformers_tokens_per_s

    results: dict[str, Any] = {"rows": {}, "llamacpp": {}}
    with_slots(args.bundle, args.scratch / "demo16", 16)

    def keep(name: str, row: dict[str, Any]) -> None:
        known = results["rows"].get(name)
        results["rows"][name] = row if known is None or row["tokens_per_s"] > known["tokens_per_s"] else known

    for _ in range(ROUNDS):
        for name, run in engine_rows(args.bundle, args.scratch).items():
            keep(name, run())
        keep("demo over HTTP: FP8, k=3, fused, real acceptance", over_http(args.bundle))
        many = over_http(args.scratch / "demo16", users=16, requests=160)
        keep("demo with 16 slots over HTTP: 16 users, real acceptance", many)
        keep("demo over HTTP: BF16, unfused", over_http(args.scratch / "source", "--no-speculation", "--no-fusion"))
        if args.llamacpp:
            argv = [
                str(args.llamacpp),
                str(HERE / "llamacpp_cpu.py"),
                str(args.scratch / "gguf"),
                "--threads",
                str(args.threads),
            ]
            found = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
            results["llamacpp_version"] = found.pop("version")
            for name, row in found.items():
                for figure, value in row.items():
                    results["llamacpp"][f"{name} {figure}"] = max(
                        value, results["llamacpp"].get(f"{name} {figure}", 0.0)
                    )
    keep("transformers.generate, BF16", {"tokens_per_s": transformers_tokens_per_s(str(args.source), args.threads)})
    results["gemv"] = [r for isa in (None, "avx2") for r in bench_gemv(args.bundle, isa=isa)]
    results["ops"] = op_rows(args.scratch, args.threads)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True, help="the demo's bundle")
    parser.add_argument("--source", type=Path, default=ROOT / "specs/models/tiny-llama4")
    parser.add_argument("--scratch", type=Path, required=True, help="about 3 GB of random checkpoints and bundles")
    parser.add_argument("--llamacpp", type=Path, help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prepare", action="store_true")
    args = parser.parse_args()
    if args.prepare:
        prepare(args.source, args.scratch)
        if args.llamacpp:
            subprocess.run([args.llamacpp, HERE / "llamacpp_cpu.py", args.scratch / "gguf", "--prepare"], check=True)
        return
    from engine_cpu_page import render

    results: dict[str, Any] = {}
    share = others_share(lambda: results.update(measure(args)))
    results |= {"others_cpu_share": share, "date": datetime.date.today().isoformat(), "threads": args.threads}
    (args.scratch / "engine_cpu.json").write_text(json.dumps(results, indent=1))
    page = HERE / f"engine_cpu_{results['date']}.md"
    page.write_text(render(results))
    print(page)


if __name__ == "__main__":
    main()
