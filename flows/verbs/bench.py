"""`kilotok bench`: the ops, the engine and one rank of a large model, measured where a device is at hand.

Refuses to invent a row: without the device it says so and exits 2. Every table names its device and is stored.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from flows.verbs.surface import DEFAULT_STORE, Surface
from specs.errors import InputError


def register(add: Surface) -> None:
    bench_ = add("bench", bench, "measure the ops, the engine, or one rank of a large model", spec=False, as_json=True)
    bench_.add_argument("what", choices=("ops", "engine", "slice"))
    bench_.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu; a slice is always on cuda")
    bench_.add_argument("--spec", metavar="SPEC", default="llama4-maverick-b200", help="whose rank 0 a slice is")
    bench_.add_argument("--bundle", type=Path, metavar="DIR", help="default: the last bundle of the store")
    bench_.add_argument("--acceptance", type=float, metavar="LENGTH", help="force this acceptance length, and say so")
    bench_.add_argument("--users", type=int, nargs="*", default=[1], metavar="N", help="requests in flight")


def bench(arguments: argparse.Namespace) -> int:
    """Print the table and keep it, with the date in its name, under `bench/` beside the store."""
    device = arguments.device or ("cuda" if arguments.what == "slice" else "cpu")
    rows = {"ops": _ops, "engine": _engine, "slice": _slice}[arguments.what](arguments, device)
    stored = Path(DEFAULT_STORE).parent / "bench" / f"{arguments.what}_{device}_{time.strftime('%Y-%m-%d')}.json"
    stored.parent.mkdir(parents=True, exist_ok=True)
    stored.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"rows": rows, "stored": str(stored)}) if arguments.as_json else f"{table(rows)}\n\n{stored}")
    return 0


def _ops(arguments: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    if device == "cuda":
        from tasks.bench import bench_ops

        return bench_ops()
    from engine_plugins.native.bench import bench_gemv

    return bench_gemv(_bundle(arguments))


def _engine(arguments: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    from engine_plugins.native.bench import bench_engine

    bundle = _bundle(arguments)
    return [
        bench_engine(bundle, users=users, acceptance=arguments.acceptance, device=device) for users in arguments.users
    ]


def _slice(arguments: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    if device != "cuda":
        raise InputError("a slice is measured on a GPU", "--device cpu", "leave --device out")
    from specs.load import load_spec
    from tasks.bench_slice import bench_slice

    path = arguments.spec if arguments.spec.endswith((".yaml", ".yml")) else f"specs/{arguments.spec}.yaml"
    return bench_slice(load_spec(Path(path), []))


def _bundle(arguments: argparse.Namespace) -> Path:
    if arguments.bundle:
        return Path(arguments.bundle)
    built = sorted(Path(arguments.store).glob("artifacts/build_engine/*/bundle.json"), key=lambda f: f.stat().st_mtime)
    if not built:
        raise InputError("no bundle in the store", arguments.store, "kilotok run specs/tiny-llama4-cpu.yaml")
    return built[-1].parent


def table(rows: list[dict[str, Any]]) -> str:
    """Columns by key, in the order of the first row; a nested record becomes `name value` pairs."""
    if not rows:
        return "nothing measured"
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(below)}" for name, below in value.items())
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)
