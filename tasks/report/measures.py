"""From measured tables to what the report says about them: pure functions over rows, plain dicts out.

Refuses to fill gaps: what is absent comes back as None or is left out, and the page writes "not measured".
It never decides a pass either: limits, margins and verdicts are `validate`'s and are only repeated here.
Run it: `python -m pytest tests/tasks/test_report_measures.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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


# -- one cycle ---------------------------------------------------------------------------------------------------------
def cycle_parts(waterfall: Mapping[str, Any] | None, metrics: Mapping[str, float]) -> dict[str, Any] | None:
    """The parts of a cycle in microseconds, in groups; from waterfall.json, else from the `cycle.*_us` metrics."""
    waterfall = waterfall or {}
    named = _named_parts(waterfall) or {
        name[len("cycle.") : -len("_us")]: value for name, value in metrics.items() if name.startswith("cycle.") and name.endswith("_us")
    }
    parts = []
    for name, value in named.items():
        us = as_number(value)
        if us is not None and us > 0:
            parts.append({"name": _part_label(name), "group": _group(name), "us": us})
    total = as_number(first(waterfall, "cycle_us", "total_us", "us")) or as_number(metrics.get("cycle.us"))
    if not parts:
        return {"total_us": total, "parts": [], "unexplained_us": None} if total else None
    parts.sort(key=lambda part: GROUPS.index(part["group"]))  # stable: operators keep the engine's order
    explained = sum(part["us"] for part in parts)
    left = total - explained if total else None
    if left is not None and total and left > 0.01 * total:
        parts.append({"name": "not attributed", "group": "host", "us": left})
    return {"total_us": total or explained, "parts": parts, "unexplained_us": left}


def _named_parts(waterfall: Mapping[str, Any]) -> dict[str, Any]:
    """name -> microseconds, whichever of the sensible shapes the file has."""
    cycles = as_number(waterfall.get("cycles"))
    if isinstance(waterfall.get("seconds"), Mapping) and cycles:
        return {name: 1e6 * float(value) / cycles for name, value in waterfall["seconds"].items() if as_number(value) is not None}
    parts = first(waterfall, "parts", "parts_us", "bars", "groups")
    if isinstance(parts, Mapping):
        return dict(parts)
    if isinstance(parts, Sequence):
        return {str(first(row, "name", "part", "operator")): first(row, "us", "value_us", "mean_us") for row in parts if isinstance(row, Mapping)}
    return {name[: -len("_us")]: value for name, value in waterfall.items() if name.endswith("_us") and name not in ("cycle_us", "total_us")}


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
LATENCIES = (("ttft_ms", "Time to first token", "ms", -1), ("itl_ms_p50", "Time between tokens", "ms", -1), ("tps_user", "Speed per request", "tokens/s", 1))


def good_requests(rows: Rows) -> list[Row]:
    """Requests whose figures may be used: an answer that came whole."""
    return [row for row in rows if row.get("ok", row.get("status") in (None, "", "ok", 200)) not in (False, None, 0)]


def single_user(rows: Rows) -> list[Row]:
    """Those of the one-in-flight profile, which is what TPS/user is defined on."""
    return [row for row in rows if users_of(row, rows) == 1]


def users_of(row: Row, rows: Rows) -> int:
    """Users in parallel: the column, or the distinct users of the row's profile."""
    if as_number(row.get("users")):
        return int(row["users"])
    return max(1, len({other.get("user") for other in rows if other.get("profile") == row.get("profile")}))


def latency(rows: Rows | None) -> dict[str, Any] | None:
    """Distributions over the requests of one user at a time."""
    if not rows:
        return None
    good = good_requests(rows)
    alone = single_user(good) or good
    series = []
    for column, label, unit, better in LATENCIES:
        values = sorted(value for row in alone if (value := as_number(first(row, column, _OLD_NAMES.get(column, column)))) is not None)
        if values:
            marks = {f"p{q}": quantile(values, q / 100) for q in (10, 50, 90, 99)}
            series.append({"name": column, "label": label, "unit": unit, "better": better, "values": [round(v, 4) for v in values], **marks})
    counts = {"requests": len(rows), "good": len(good), "single_user": len(alone)}
    return {"series": series, **counts} if series else None


_OLD_NAMES = {"tps_user": "tps_per_user", "itl_ms_p50": "itl_ms"}


def throughput(rows: Rows | None) -> list[dict[str, Any]]:
    """One point per profile: median TPS/user against output tokens of all users over the profile's wall time."""
    profiles: dict[str, list[Row]] = {}
    for row in good_requests(rows or []):
        profiles.setdefault(str(row.get("profile") or "requests"), []).append(row)
    points = []
    for name, members in profiles.items():
        speeds = sorted(value for row in members if (value := as_number(first(row, "tps_user", "tps_per_user"))) is not None)
        server = _server_speed(members)
        if speeds and server:
            points.append({"profile": name, "users": users_of(members[0], members), "tps_user": quantile(speeds, 0.5), "tps_server": server})
    return sorted(points, key=lambda point: point["users"])


def _server_speed(rows: Sequence[Row]) -> float | None:
    """Tokens of all users over the wall clock; without clocks, users x median speed of a user."""
    tokens = sum(as_number(row.get("output_tokens")) or 0 for row in rows)
    spans = [(as_number(row.get("sent_s")), as_number(row.get("duration_ms"))) for row in rows]
    known = [(sent, sent + length / 1e3) for sent, length in spans if sent is not None and length is not None]
    if tokens and len(known) == len(rows):
        wall = max(end for _, end in known) - min(start for start, _ in known)
        return tokens / wall if wall > 0 else None
    speeds = sorted(value for row in rows if (value := as_number(first(row, "e2e_tps", "tps_user", "tps_per_user"))) is not None)
    return users_of(rows[0], rows) * quantile(speeds, 0.5) if speeds else None


def quantile(ordered: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics, as numpy's default."""
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


# -- acceptance --------------------------------------------------------------------------------------------------------
def acceptance(rows: Rows | None, metrics: Mapping[str, float], golden: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
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
        points = [{"position": int(name.rsplit(".", 1)[1]), "rate": value, "low": None, "high": None, "drafted": 0} for name, value in metrics.items()
                  if name.startswith("acceptance.position.") and as_number(value) is not None]  # fmt: skip
        if not points:
            return None
        domains[ALL] = points
    found = []
    for domain, points in domains.items():
        points.sort(key=lambda point: point["position"])
        name = "acceptance.length" if domain == ALL else f"acceptance.length.{domain}"
        measured = as_number(metrics.get(name))
        length = measured if measured is not None else chain_length(points)
        found.append({"domain": domain, "length": length, "positions": points,
                      "golden": _golden(golden, domain)})  # fmt: skip
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


# -- accuracy ----------------------------------------------------------------------------------------------------------
def accuracy(rows: Rows | None, metrics: Mapping[str, float], rules: Mapping[str, Any], verdicts: Iterable[Row] = ()) -> dict[str, Any] | None:
    """Source against served, by task. The interval is validate's where it wrote one, else a paired one from the problems."""
    alpha = as_number(rules.get("alpha")) or 0.05
    judged = {str(row.get("task")): row for row in verdicts}
    names = {name.split(".")[1] for name in metrics if name.startswith("accuracy.") and name.count(".") >= 2}
    if "accuracy.difference" in metrics:
        names.add(ALL)
    pairs = _pairs(rows or [])
    tasks = []
    for task in sorted(names | set(pairs) | set(judged), key=lambda name: (name == ALL, name)):
        entry = _from_pairs(pairs.get(task, []), alpha)
        entry.update({key: value for key, value in _from_metrics(task, metrics).items() if value is not None})
        entry.update({key: value for key, value in _from_verdict(judged.get(task, {})).items() if value is not None})
        if entry.get("source") is not None or entry.get("served") is not None:
            tasks.append({"task": task, **entry})
    margin = as_number(rules.get("margin"))
    return {"tasks": tasks, "margin": margin, "alpha": alpha, "power": as_number(rules.get("power"))} if tasks else None


def _pairs(rows: Rows) -> dict[str, list[tuple[float, float]]]:
    """(source, served) per problem and task; several samples of one problem are averaged, since they are not independent."""
    sides: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        correct = row.get("correct")
        if correct is None or (isinstance(correct, float) and math.isnan(correct)):
            continue
        sides.setdefault((str(row.get("task")), str(row.get("id"))), {}).setdefault(str(row.get("side")), []).append(float(correct))
    found: dict[str, list[tuple[float, float]]] = {}
    for (task, _), both in sides.items():
        if "source" in both and "served" in both:
            found.setdefault(task, []).append((_mean(both["source"]), _mean(both["served"])))
    return found


def _from_pairs(pairs: Sequence[tuple[float, float]], alpha: float) -> dict[str, Any]:
    """Rates, their difference and its two-sided 1 - 2 alpha interval: its lower end is the one-sided limit at alpha."""
    count = len(pairs)
    if not count:
        return {"problems": 0, "source": None, "served": None, "difference": None, "low": None, "high": None}
    gaps = [served - source for source, served in pairs]
    # One lost and one won problem are added, so that equal answers do not make an interval of no width.
    padded = [*gaps, 1.0, -1.0]
    middle = _mean(padded)
    spread = math.sqrt(sum((gap - middle) ** 2 for gap in padded) / len(padded))
    half = NormalDist().inv_cdf(1 - alpha) * spread / math.sqrt(len(padded))
    difference = _mean(gaps)
    return {
        "problems": count, "source": _mean([source for source, _ in pairs]), "served": _mean([served for _, served in pairs]),
        "difference": difference, "low": min(difference, middle - half), "high": max(difference, middle + half),
        "lost": sum(gap < 0 for gap in gaps), "won": sum(gap > 0 for gap in gaps),
    }  # fmt: skip


def _from_metrics(task: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    base = "accuracy." if task == ALL else f"accuracy.{task}."
    picked = {"source": ("source",), "served": ("served",), "difference": ("difference",), "low": ("difference.low", "low", "lower", "difference_low"),
              "high": ("difference.high", "high", "upper", "difference_high"), "problems": ("problems", "n")}  # fmt: skip
    found = {key: next((v for name in names if (v := as_number(metrics.get(base + name))) is not None), None) for key, names in picked.items()}
    if found["problems"] is not None:
        found["problems"] = int(found["problems"])
    return found


def _from_verdict(row: Row) -> dict[str, Any]:
    limits = {"low": ("low", "lower", "lower_bound", "difference_low"), "high": ("high", "upper", "upper_bound", "difference_high"),
              "verdict": ("verdict",), "needed": ("samples_needed", "needed"), "reason": ("reason",), "margin": ("margin",)}  # fmt: skip
    return {key: first(row, *names) for key, names in limits.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# -- quantization ------------------------------------------------------------------------------------------------------
def quantization(rows: Rows | None, worst: int = 8) -> dict[str, Any] | None:
    """Worst tensors by signal to quantization noise, the worst per layer and kind, and what saturates."""
    if not rows:
        return None
    tensors = [
        {"name": str(row.get("name")), "kind": str(row.get("kind") or "tensor"), "layer": layer_of(str(row.get("name"))),
         "sqnr_db": as_number(row.get("sqnr_db")), "scale": as_number(row.get("scale")), "amax": as_number(row.get("amax")),
         "saturation_share": as_number(row.get("saturation_share"))}
        for row in rows
    ]  # fmt: skip
    known = sorted((row for row in tensors if row["sqnr_db"] is not None), key=lambda row: row["sqnr_db"])
    layers: dict[tuple[str, int], dict[str, Any]] = {}
    for row in known:  # ascending, so the first of a layer and kind is its worst
        if row["layer"] is not None:
            layers.setdefault((row["kind"], row["layer"]), row)
    per_layer = [{"kind": kind, "layer": layer, "sqnr_db": row["sqnr_db"], "name": row["name"]} for (kind, layer), row in sorted(layers.items())]
    saturating = sum((row["saturation_share"] or 0) > 0 for row in tensors)
    return {
        "tensors": len(tensors), "measured": len(known), "worst": known[:worst], "layers": per_layer, "saturating": saturating,
        "most_saturated": max(tensors, key=lambda row: row["saturation_share"] or 0) if saturating else None,
        "median_sqnr_db": quantile([row["sqnr_db"] for row in known], 0.5) if known else None,
    }  # fmt: skip


def layer_of(name: str) -> int | None:
    """model.layers.17.self_attn.q_proj -> 17."""
    parts = name.split(".")
    for before, after in zip(parts, parts[1:]):
        if before in ("layers", "blocks", "h") and after.isdigit():
            return int(after)
    return None
