"""Where a cycle's time goes, from the engine's own counters before and after a run, and from the client's side of it.

TPS/user = acceptance length / cycle time. `cycle.us` is what the engine spent per cycle; `cycle.client_us` what a
cycle took as the user saw it; their difference, `cycle.outside_us`, is the server around the engine: HTTP, tokens to
text, scheduling.

TensorRT-LLM has no such counters: its parts come from the profiler's trace of its start (trace.py) and are those of a
profiled cycle; `cycle.us` is then the client's.

It refuses to invent parts: an engine without counters and trace gives a cycle time from the client alone.

Run: `python -m pytest tests/tasks/test_validate_waterfall.py`
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{([^}]*)\})?\s+(\S+)", re.MULTILINE)
GROUP = re.compile(r'group="([^"]*)"')
CYCLES, SECONDS = "kilotok_engine_cycles_total", "kilotok_operator_seconds_total"
NOT_IN_A_CYCLE = ("prefill", "idle")


def read_counters(prometheus: str) -> dict[str, float]:
    """`cycles`, and `seconds.<group>` of each operator group, out of a Prometheus page."""
    counters: dict[str, float] = {}
    for name, labels, value in SAMPLE.findall(prometheus):
        group = GROUP.search(labels)
        if name == CYCLES:
            counters["cycles"] = float(value)
        elif name == SECONDS and group:
            counters[f"seconds.{group.group(1)}"] = float(value)
    return counters


def waterfall(
    before: Mapping[str, float], after: Mapping[str, float], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """waterfall.json: `cycle_us`, `client_us`, `outside_us`, and `parts` [{name, us}] that add up to `cycle_us`."""
    made: dict[str, Any] = {"cycles": after.get("cycles", 0.0) - before.get("cycles", 0.0), "parts": []}
    for name, value in after.items():
        group = name.removeprefix("seconds.")
        if name.startswith("seconds.") and made["cycles"] > 0 and not group.startswith(NOT_IN_A_CYCLE):
            made["parts"].append({"name": group, "us": 1e6 * (value - before.get(name, 0.0)) / made["cycles"]})
    made["cycle_us"] = sum(part["us"] for part in made["parts"]) or None
    made["client_us"] = client_cycle_us(rows)
    made["source"] = "counters" if made["parts"] else ""
    both = made["cycle_us"] is not None and made["client_us"] is not None
    made["outside_us"] = made["client_us"] - made["cycle_us"] if both else None
    return made


def with_trace(made: Mapping[str, Any], profiled: Mapping[str, Any] | None) -> dict[str, Any]:
    """The waterfall with the parts of a profiled cycle, where the engine's counters gave none."""
    if made["parts"] or profiled is None:
        return dict(made)
    return {**made, **profiled, "outside_us": None, "source": "profiler"}


def client_cycle_us(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Decode time over cycles, as the client saw it; None without speculation counts."""
    good = [row for row in rows if row["ok"] and row["cycles"] > 0 and not math.isnan(row["tps_user"])]
    later = [row["output_tokens"] - row["first_chunk_tokens"] for row in good]
    spans = sum(tokens / row["tps_user"] for tokens, row in zip(later, good, strict=True))
    # The first token is the prefill's; chunks that came with it hold cycles that no time was measured for.
    cycles = sum(row["cycles"] * tokens / (row["output_tokens"] - 1) for tokens, row in zip(later, good, strict=True))
    return 1e6 * spans / cycles if cycles else None


def cycle_metrics(made: Mapping[str, Any]) -> dict[str, float]:
    """`cycle.us`, `cycle.client_us`, `cycle.outside_us`, `cycle.<part>_us`."""
    metrics = {f"cycle.{part['name']}_us": part["us"] for part in made["parts"]}
    named = {
        "cycle.us": made["client_us"] if made["source"] == "profiler" else made["cycle_us"] or made["client_us"],
        "cycle.client_us": made["client_us"],
        "cycle.outside_us": made["outside_us"],
    }
    return {**metrics, **{name: float(value) for name, value in named.items() if value is not None}}
