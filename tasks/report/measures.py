"""From measured tables to what the report says about them: pure functions over rows, plain dicts out.

Refuses to fill gaps: what is absent comes back as None or is left out, and the page writes "not measured".
It never decides a pass either: limits, margins and verdicts are `validate`'s and are only repeated here.
Run it: `python -m pytest tests/tasks/test_report_measures.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

from tasks.report.words import as_number, first

Row = Mapping[str, Any]
Rows = Sequence[Row]

ALL = "all"  # validate's name for the whole, in tasks and in domains

# One cycle reads as four groups, in the order in which the time passes.
GROUPS = ("draft", "verify", "sampling", "host")
_GROUP_WORDS = {
    "draft": ("draft",),
    "sampling": ("sampl", "accept", "reject"),
    "host": ("host", "gap", "schedul", "python", "overhead", "other"),
}


_NOT_PARTS = ("cycle.client_us", "cycle.outside_us")  # the same cycle seen from outside


# -- one cycle ---------------------------------------------------------------------------------------------------------
def cycle_parts(waterfall: Mapping[str, Any] | None, metrics: Mapping[str, float]) -> dict[str, Any] | None:
    """The parts of a cycle in microseconds, in groups; from waterfall.json, else from the `cycle.*_us` metrics."""
    waterfall = waterfall or {}
    named = _named_parts(waterfall) or {
        name[len("cycle.") : -len("_us")]: value
        for name, value in metrics.items()
        if name.startswith("cycle.") and name.endswith("_us") and name not in _NOT_PARTS
    }
    parts: list[dict[str, Any]] = []
    for name, value in named.items():
        us = as_number(value)
        if us is not None and us > 0:
            parts.append({"name": _part_label(name), "group": _group(name), "us": us})
    total = as_number(first(waterfall, "cycle_us", "total_us", "us")) or as_number(metrics.get("cycle.us"))
    if not parts:
        return {"total_us": total, "parts": [], "unexplained_us": None, "source": ""} if total else None
    parts.sort(key=lambda part: GROUPS.index(part["group"]))  # stable: operators keep the engine's order
    explained = sum(part["us"] for part in parts)
    left = total - explained if total else None
    if left is not None and total and left > 0.01 * total:
        parts.append({"name": "not attributed", "group": "host", "us": left})
    source = str(waterfall.get("source") or "counters")
    return {"total_us": total or explained, "parts": parts, "unexplained_us": left, "source": source}


def _named_parts(waterfall: Mapping[str, Any]) -> dict[str, Any]:
    """name -> microseconds, whichever of the sensible shapes the file has."""
    cycles = as_number(waterfall.get("cycles"))
    if isinstance(waterfall.get("seconds"), Mapping) and cycles:
        return {
            name: 1e6 * float(value) / cycles
            for name, value in waterfall["seconds"].items()
            if as_number(value) is not None
        }
    parts = first(waterfall, "parts", "parts_us", "bars", "groups")
    if isinstance(parts, Mapping):
        return dict(parts)
    if isinstance(parts, Sequence):
        return {
            str(first(row, "name", "part", "operator")): first(row, "us", "value_us", "mean_us")
            for row in parts
            if isinstance(row, Mapping)
        }
    return {
        name[: -len("_us")]: value
        for name, value in waterfall.items()
        if name.endswith("_us") and name not in ("cycle_us", "total_us", "client_us", "outside_us")
    }


def _group(name: str) -> str:
    low = name.lower()
    for group, hints in _GROUP_WORDS.items():
        if any(low.startswith(hint) or f".{hint}" in low or f"_{hint}" in low for hint in hints):
            return group
    return "verify"


def _part_label(name: str) -> str:
    for prefix in ("verify.", "verify_", "host.", "sampling.", "draft.", "cycle."):
        if name.startswith(prefix) and len(name) > len(prefix):
            head = "draft " if prefix == "draft." else ""
            return head + name[len(prefix) :].replace("_", " ")
    return name.removesuffix("_us").replace("_", " ")


def headline(metrics: Mapping[str, float], cycle: Mapping[str, Any] | None) -> dict[str, Any]:
    """TPS/user = acceptance length / cycle time, and how far the measured speed is from that product."""
    tps, length = as_number(metrics.get("latency.tps_per_user.p50")), as_number(metrics.get("acceptance.length"))
    cycle_us = as_number(metrics.get("cycle.us")) or (as_number(cycle.get("total_us")) if cycle else None)
    baseline = as_number(metrics.get("baseline.tps_per_user.p50"))
    implied = 1e6 * length / cycle_us if length and cycle_us else None
    return {
        "tps_per_user": tps,
        "acceptance_length": length,
        "cycle_us": cycle_us,
        "implied_tps": implied,
        "outside_engine_share": 1 - tps / implied if tps and implied else None,
        "baseline_tps": baseline,
        "speedup": tps / baseline if tps and baseline else None,
    }


# -- requests ----------------------------------------------------------------------------------------------------------
LATENCIES = (
    ("ttft_ms", "Time to first token", "ms", -1),
    ("itl_ms_p50", "Time between tokens", "ms", -1),
    ("tps_user", "Speed per request", "tokens/s", 1),
)


def good_requests(rows: Rows) -> list[Row]:
    """Requests whose figures may be used: an answer that came whole."""
    return [row for row in rows if row.get("ok", row.get("status") in (None, "", "ok", 200)) not in (False, None, 0)]


def single_user(rows: Rows) -> list[Row]:
    """Those of the one-in-flight profiles, which is what TPS/user is defined on."""
    profiles: dict[str, list[Row]] = {}
    for row in rows:
        profiles.setdefault(str(row.get("profile")), []).append(row)
    return [
        row
        for name, members in profiles.items()
        if users_of(members) == 1 and not name.startswith("open_loop")
        for row in members
    ]


def users_of(members: Rows) -> int:
    """Users in parallel in one profile: the column where there is one, else the distinct users."""
    column = as_number(members[0].get("users"))
    return int(column) if column else max(1, len({row.get("user") for row in members}))


def latency(rows: Rows | None) -> dict[str, Any] | None:
    """Distributions over the requests of one user at a time."""
    if not rows:
        return None
    good = good_requests(rows)
    alone = single_user(good) or good
    series = []
    for column, label, unit, better in LATENCIES:
        values = sorted(
            value
            for row in alone
            if (value := as_number(first(row, column, _OLD_NAMES.get(column, column)))) is not None
        )
        if values:
            marks = {f"p{q}": quantile(values, q / 100) for q in (10, 50, 90, 99)}
            series.append(
                {
                    "name": column,
                    "label": label,
                    "unit": unit,
                    "better": better,
                    "values": [round(v, 4) for v in values],
                    **marks,
                }
            )
    counts = {"requests": len(rows), "good": len(good), "single_user": len(alone)}
    return {"series": series, **counts} if series else None


_OLD_NAMES = {"tps_user": "tps_per_user", "itl_ms_p50": "itl_ms"}


def throughput(rows: Rows | None) -> list[dict[str, Any]]:
    """One point per profile: median TPS/user against output tokens of all users over the profile's wall time."""
    profiles: dict[str, list[Row]] = {}
    for row in good_requests(rows or []):
        profiles.setdefault(str(row.get("profile") or "requests"), []).append(row)
    points: list[dict[str, Any]] = []
    for name, members in profiles.items():
        if name.startswith("open_loop"):
            continue  # arrivals by the clock: there is no number of users to put it at
        speeds = sorted(
            value for row in members if (value := as_number(first(row, "tps_user", "tps_per_user"))) is not None
        )
        server = _server_speed(members)
        if speeds and server:
            points.append(
                {
                    "profile": name,
                    "users": users_of(members),
                    "tps_user": quantile(speeds, 0.5),
                    "tps_server": server,
                }
            )
    return sorted(points, key=lambda point: point["users"])


def _server_speed(rows: Sequence[Row]) -> float | None:
    """Tokens of all users over the wall clock; without clocks, users x median speed of a user."""
    tokens = sum(as_number(row.get("output_tokens")) or 0 for row in rows)
    spans = [(as_number(row.get("sent_s")), as_number(row.get("duration_ms"))) for row in rows]
    known = [(sent, sent + length / 1e3) for sent, length in spans if sent is not None and length is not None]
    if tokens and len(known) == len(rows):
        wall = max(end for _, end in known) - min(start for start, _ in known)
        return tokens / wall if wall > 0 else None
    speeds = sorted(
        value for row in rows if (value := as_number(first(row, "e2e_tps", "tps_user", "tps_per_user"))) is not None
    )
    return users_of(rows) * quantile(speeds, 0.5) if speeds else None


def quantile(ordered: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics, as numpy's default."""
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


# -- acceptance --------------------------------------------------------------------------------------------------------
def acceptance(
    rows: Rows | None, metrics: Mapping[str, float], golden: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Per domain: tokens per cycle and the chance of each draft token given that the one before was accepted."""
    domains: dict[str, list[dict[str, Any]]] = {}
    for row in rows or []:
        drafted, accepted = as_number(row.get("drafted")), as_number(row.get("accepted"))
        rate = as_number(row.get("rate"))
        rate = accepted / drafted if rate is None and drafted and accepted is not None else rate
        if rate is None:
            continue
        low, high = wilson(accepted or 0, drafted) if drafted else (None, None)
        point = {"position": int(row["position"]), "rate": rate, "low": low, "high": high, "drafted": int(drafted or 0)}
        domains.setdefault(str(row.get("domain") or ALL), []).append(point)
    if not domains:
        points: list[dict[str, Any]] = [
            {"position": int(name.rsplit(".", 1)[1]), "rate": value, "low": None, "high": None, "drafted": 0}
            for name, value in metrics.items()
            if name.startswith("acceptance.position.") and name.count(".") == 2 and as_number(value) is not None
        ]
        if not points:
            return None
        domains[ALL] = points
    found = []
    for domain, points in domains.items():
        points.sort(key=lambda point: point["position"])
        name = "acceptance.length" if domain == ALL else f"acceptance.length.{domain}"
        measured = as_number(metrics.get(name))
        length = measured if measured is not None else chain_length(points)
        found.append({"domain": domain, "length": length, "positions": points, "golden": _golden(golden, domain)})
    found.sort(key=lambda entry: (entry["domain"] == ALL, entry["length"]))
    return {"domains": found, "length": as_number(metrics.get("acceptance.length"))}


def chain_length(points: Sequence[Row]) -> float:
    """1 + a1 + a1 a2 + ...: what conditional rates make of a chain of drafts."""
    total, reached = 1.0, 1.0
    for point in points:
        reached *= point["rate"]
        total += reached
    return total


def _golden(golden: Mapping[str, Any] | None, domain: str) -> list[float] | None:
    curve = (golden or {}).get(domain)
    return [float(value) for value in curve] if isinstance(curve, Sequence) and not isinstance(curve, str) else None


def wilson(hits: float, trials: float, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a share; honest at 0 and 1, where the textbook one has no width."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = hits / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)
