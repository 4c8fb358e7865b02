"""The page of engine_cpu.py: targets first, then every row.

What it refuses to be: a measurement; it only divides. A target that is missed says by how much.
Run it: engine_cpu.py imports it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from random_checkpoints import SHAPE_7M, SHAPE_260M

COMMAND = "python infra/bench_reports/engine_cpu.py --bundle DEMO --scratch DIR --llamacpp PYTHON"
REAL = "real acceptance"
MEANING = """
What the words mean. **Unfused**: the same C++ engine, threads, SIMD tiles and bits, each operator its own pass over
memory and its own join (`engine_plugins/native/cpp/unfused.h`). **Forced acceptance**: drafts are computed and verified
as always, and accepted by decree; weights are random where a shape is named. **Read**: the same bytes through plain
vector loads by the same threads. **16 users** in the engine alone force acceptance 2.5 too, as far as anything is still
drafted. **Over HTTP** the server, the client of `validate` and the engine share the CPUs; prompts are the held-out
ones, the draft is the one that the demo trained, and one user's cycle is acceptance over tokens/s. A figure is the best
of several rounds, the rounds of different rows interleaved.
"""


def _machine() -> str:
    lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout.splitlines()
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    flags = set(found.get("Flags", "").split())
    isa = [f for f in ("avx2", "f16c", "avx512f", "avx512_bf16", "avx512_vbmi", "amx_tile") if f in flags]
    return f"{found.get('Model name', '?').strip()}, {found.get('CPU(s)', '?').strip()} CPUs, {' '.join(isa)}"


def _targets(r: dict[str, Any]) -> list[tuple[str, float, float, str]]:
    """Name, measured, wanted, unit."""
    speed = {name: row["tokens_per_s"] for name, row in r["rows"].items()}
    http = speed[f"demo over HTTP: FP8, k=3, fused, {REAL}"]
    demo, big = speed["demo: FP8, k=3, fused, acceptance forced to 2.5"], SHAPE_260M.name
    unfused, cpp = speed["demo: BF16, no speculation, unfused"], r["llamacpp"]
    gemv = {(g["isa"], g["weights"], g["rows"]): g["share_of_read"] for g in r["gemv"]}
    many, many_http = (r["rows"][f"demo with 16 slots{how}"] for how in (": 16 users", f" over HTTP: 16 users, {REAL}"))
    best = max(isa for isa, _, _ in gemv)
    rows = [
        ("demo over HTTP, one user, real draft", http, 1000, " tokens/s"),
        ("demo, acceptance 2.5, over BF16 unfused without speculation", demo / unfused, 4, "x"),
        ("demo over HTTP, over that baseline over HTTP", http / speed["demo over HTTP: BF16, unfused"], 4, "x"),
        ("demo over HTTP, over transformers.generate", http / speed["transformers.generate, BF16"], 8, "x"),
        ("16 users on 8 slots, over one user", speed["demo: 16 users"] / demo, 3, "x"),
        ("16 users on 16 slots, over one user", speed["demo with 16 slots: 16 users"] / demo, 3, "x"),
        ("the same, slowest user over the mean user", many["slowest_user_share"], 0.8, "x"),
        ("16 users on 16 slots over HTTP, over one user over HTTP", many_http["tokens_per_s"] / http, 3, "x"),
        ("the same, slowest user over the mean user", many_http["slowest_user_share"], 0.8, "x"),
        (f"FP8 GEMV of a plain read, {best}", 100 * gemv[best, "fp8", 1], 85, "%"),
        ("FP8 GEMV of a plain read, avx2", 100 * gemv["avx2", "fp8", 1], 85, "%"),
    ]
    for shape, wanted in ((SHAPE_7M.name, 1.5), (big, 2.0)) if cpp else ():
        for draft in ("BF16", "FP8"):
            ours = speed[f"{shape}: FP8, {draft} draft, acceptance forced to 2.5"]
            rows.append(
                (f"{shape}, {draft} draft, over llama.cpp Q8_0", ours / cpp[f"{shape} Q8_0 tokens_per_s"], wanted, "x")
            )
    rows.append(("slowest fused op, over its parts in torch", min(o["factor"] for o in r["ops"]), 1, "x"))
    return rows


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def render(r: dict[str, Any]) -> str:
    """Markdown of one run."""
    out = [f"# Engine on a CPU, {r['date']}", "", f"{_machine()}; {r['threads']} threads. `{COMMAND}`", ""]
    out += [f"Other processes used {100 * r['others_cpu_share']:.0f}% of the CPU time during the run.", MEANING]
    targets = [
        [
            name,
            f"{value:,.2f}{unit}" if value < 100 else f"{value:,.0f}{unit}",
            f"{wanted:,}{unit}",
            "yes" if value >= wanted else "**no**",
        ]
        for name, value, wanted, unit in _targets(r)
    ]
    out += ["## Targets", "", *_table(["what", "measured", "wanted", "reached"], targets)]
    rows = [
        [
            name,
            f"{x['tokens_per_s']:,.0f}",
            f"{x.get('acceptance_length', 1.0):.2f}",
            f"{x.get('cycle_us', 0):,.0f}",
            _split(x),
        ]
        for name, x in r["rows"].items()
    ]
    out += ["## Engine", "", *_table(["row", "tokens/s", "acceptance", "cycle us", "us by operator group"], rows)]
    if r["llamacpp"]:
        rows = [[name, f"{value:,.1f}"] for name, value in r["llamacpp"].items()]
        out += [f"## llama.cpp (llama-cpp-python {r['llamacpp_version']})", "", *_table(["row", "per second"], rows)]
    rows = [
        [
            g["isa"],
            g["weights"],
            str(g["rows"]),
            f"{g['gb_per_s']:.1f}",
            f"{g['read_gb_per_s']:.1f}",
            f"{100 * g['share_of_read']:.0f}%",
        ]
        for g in r["gemv"]
    ]
    out += ["## GEMV 4096 x 4096, weights far larger than the cache", ""]
    out += _table(["path", "weights", "rows", "GB/s", "read GB/s", "of the read"], rows)
    rows = [[o["op"], str(o["M"]), f"{o['us']:,.1f}", f"{o['torch_us']:,.1f}", f"{o['factor']:.1f}x"] for o in r["ops"]]
    out += ["## Fused ops of one Maverick TP8 rank (FP8 weights) beside the sum of their parts in torch (BF16)", ""]
    return "\n".join([*out, *_table(["group, per layer", "rows", "us", "torch us", "factor"], rows)]) + "\n"


def _split(row: dict[str, Any]) -> str:
    return ", ".join(f"{group} {us:.0f}" for group, us in row.get("split_us", {}).items() if us >= 0.5)


def main() -> None:
    """Render a stored engine_cpu.json again."""
    import json
    import sys

    print(render(json.loads(Path(sys.argv[1]).read_text())))


if __name__ == "__main__":
    main()
