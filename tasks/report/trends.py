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
LIVE = ("latency.tps_per_user.p50", "acceptance.length", "cycle.us")
BADGES = {"unchanged": "PASS", "promoted": "PASS", "running": "FIRST"}  # of a night's state, in the report's colours
LIMIT = 60  # builds; two months of nights


def render(records: Sequence[Mapping[str, Any]], nights: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page. `records` are build records (`kilotok run --json`), `nights` the nightly's own, in any order."""
    builds = sorted(records, key=lambda record: str(record.get("build")))[-LIMIT:]
    fresh = [record for record in builds if _is_fresh(record)]
    present = {name for record in fresh for name in record.get("metrics") or {}}
    extra = sorted(name for name in present if name.startswith("acceptance.length."))
    trends = [_trend(name, fresh) for name in (*SHOWN, *extra) if name in present]
    spec = str(builds[-1].get("spec")) if builds else "no build"
    rows = [_build_row(record) for record in reversed(builds)]
    ordered = sorted(nights, key=lambda record: str(record.get("night")))[-LIMIT:]
    shown = [_night_row(record) for record in reversed(ordered)]
    spec = str(ordered[-1].get("spec")) if ordered and not builds else spec
    live = [_live(record) for record in ordered]
    trends += [{**_trend(name, live), "label": f"{meaning(name).label}, live"} for name in LIVE if _has(live, name)]
    page = environment().get_template("history.html.jinja")
    return page.render(spec=spec, trends=trends, builds=rows, nights=shown)


def _is_fresh(record: Mapping[str, Any]) -> bool:
    """A build that found its measurement in the store says nothing new."""
    return all(row.get("state") != "cached" for row in record.get("stages") or () if row.get("stage") == "validate")


def _live(record: Mapping[str, Any]) -> dict[str, Any]:
    """A night's probe as a record with one figure each: the mean of its runs."""
    runs = record.get("probes") or []
    names = set.intersection(*(set(run) for run in runs)) if runs else set()
    return {"metrics": {name: sum(run[name] for run in runs) / len(runs) for name in names}}


def _has(records: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(name in record["metrics"] for record in records)


def _night_row(record: Mapping[str, Any]) -> dict[str, Any]:
    findings = [
        {"text": str(finding["text"]), "alarm": bool(finding["alarm"]), "why": str(finding.get("why") or "")}
        for finding in record.get("findings") or []
    ]
    return {
        "night": str(record.get("night") or ""),
        "started": str(record.get("started") or ""),
        "state": str(record.get("state") or ""),
        "badge": BADGES.get(str(record.get("state")), "FAIL"),
        "seconds": as_number(record.get("seconds")),
        "commit": str((record.get("git") or {}).get("commit") or "")[:10],
        "summary": str(record.get("summary") or ""),
        "findings": findings,
        "drift": list((record.get("drift") or {}).get("what") or []),
        "moved": (record.get("drift") or {}).get("state") == "moved",
    }


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
