"""All builds of a spec on one page: how each figure moved from night to night, and how every build ended.

Refuses to hide failures: a build without figures is a gap in the line and a row in the table.
Run it: `python -m tasks.report --history BUILDS_FOLDER OUT_HTML` (a store keeps them in `records/builds/NAME`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tasks.report import panels
from tasks.report.page import environment
from tasks.report.words import as_number, first, meaning

SHOWN = (
    "latency.tps_per_user.p50",
    "acceptance.length",
    "cycle.us",
    "latency.ttft_ms.p50",
    "accuracy.difference",
    "baseline.tps_per_user.p50",
)
LIMIT = 60  # builds; two months of nights


def render(records: Sequence[Mapping[str, Any]]) -> str:
    """The page. `records` are build records (`kilotok run --json`) in any order."""
    builds = sorted(records, key=lambda record: str(record.get("build")))[-LIMIT:]
    present = {name for record in builds for name in record.get("metrics") or {}}
    extra = sorted(name for name in present if name.startswith("acceptance.length."))
    trends = [_trend(name, builds) for name in (*SHOWN, *extra) if name in present]
    spec = str(builds[-1].get("spec")) if builds else "no build"
    rows = [_build_row(record) for record in reversed(builds)]
    return environment().get_template("history.html.jinja").render(spec=spec, trends=trends, builds=rows)


def _trend(name: str, builds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = [as_number((record.get("metrics") or {}).get(name)) for record in builds]
    known = [value for value in values if value is not None]
    words = meaning(name)
    return {
        "label": words.label,
        "unit": words.unit,
        "now": values[-1],
        "best": max(known) if words.better >= 0 else min(known),
        "svg": Markup(panels.trend(values, limit=_limit(name, builds[-1]))),
    }


def _limit(name: str, record: Mapping[str, Any]) -> float | None:
    """What the newest build's gate asks of this figure."""
    gates = [gate for gate in record.get("gates") or [] if gate.get("metric") == name]
    return as_number(first(gates[0], "required", "bound")) if gates else None


def _build_row(record: Mapping[str, Any]) -> dict[str, Any]:
    error = record.get("error") or {}
    verdict = str(record.get("verdict") or "")
    metrics = record.get("metrics") or {}
    return {
        "build": str(record.get("build") or ""),
        "started": str(record.get("started") or ""),
        "seconds": as_number(record.get("seconds")),
        "verdict": "FAIL" if verdict == "FAILED" else verdict,
        "what": str(error.get("what") or ""),
        "speed": as_number(metrics.get("latency.tps_per_user.p50")),
        "built": sum(row.get("state") == "built" for row in record.get("stages") or []),
    }
