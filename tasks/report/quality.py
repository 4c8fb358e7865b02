"""Accuracy and quantization, from their tables to what the report says: pure functions over rows, plain dicts out.

Refuses to judge: margins and verdicts are `validate`'s and are only repeated here. A missing figure stays None.
Run it: `python -m pytest tests/tasks/test_report_measures.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

from tasks.report.measures import ALL, Row, Rows, quantile
from tasks.report.words import as_number, first


# -- accuracy ----------------------------------------------------------------------------------------------------------
def accuracy(
    rows: Rows | None, metrics: Mapping[str, float], rules: Mapping[str, Any], verdicts: Iterable[Row] = ()
) -> dict[str, Any] | None:
    """Source against served, by task. The interval is validate's, else a paired one from the problems."""
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
    """(source, served) per problem and task; samples of one problem are averaged: they are not independent."""
    sides: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        correct = row.get("correct")
        if correct is None or (isinstance(correct, float) and math.isnan(correct)):
            continue
        sides.setdefault((str(row.get("task")), str(row.get("id"))), {}).setdefault(str(row.get("side")), []).append(
            float(correct)
        )
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
        "problems": count,
        "source": _mean([source for source, _ in pairs]),
        "served": _mean([served for _, served in pairs]),
        "difference": difference,
        "low": min(difference, middle - half),
        "high": max(difference, middle + half),
        "lost": sum(gap < 0 for gap in gaps),
        "won": sum(gap > 0 for gap in gaps),
    }


def _from_metrics(task: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    base = "accuracy." if task == ALL else f"accuracy.{task}."
    picked = {
        "source": ("source",),
        "served": ("served",),
        "difference": ("difference",),
        "low": ("difference.low", "low", "lower", "difference_low"),
        "high": ("difference.high", "high", "upper", "difference_high"),
        "problems": ("problems", "n"),
    }
    found = {
        key: next((v for name in names if (v := as_number(metrics.get(base + name))) is not None), None)
        for key, names in picked.items()
    }
    if found["problems"] is not None:
        found["problems"] = int(found["problems"])
    return found


def _from_verdict(row: Row) -> dict[str, Any]:
    limits = {
        "low": ("low", "lower", "lower_bound", "difference_low"),
        "high": ("high", "upper", "upper_bound", "difference_high"),
        "verdict": ("verdict",),
        "needed": ("samples_needed", "needed"),
        "reason": ("reason",),
        "margin": ("margin",),
    }
    return {key: first(row, *names) for key, names in limits.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# -- quantization ------------------------------------------------------------------------------------------------------
def quantization(rows: Rows | None, worst: int = 8) -> dict[str, Any] | None:
    """Worst tensors by signal to quantization noise, the worst per layer and kind, and what saturates."""
    if not rows:
        return None
    tensors: list[dict[str, Any]] = [
        {
            "name": str(row.get("name")),
            "kind": str(row.get("kind") or "tensor"),
            "layer": layer_of(str(row.get("name"))),
            "sqnr_db": as_number(row.get("sqnr_db")),
            "scale": as_number(row.get("scale")),
            "amax": as_number(row.get("amax")),
            "saturation_share": as_number(row.get("saturation_share")),
        }
        for row in rows
    ]
    known = sorted((row for row in tensors if row["sqnr_db"] is not None), key=lambda row: row["sqnr_db"])
    layers: dict[tuple[str, int], dict[str, Any]] = {}
    for row in known:  # ascending, so the first of a layer and kind is its worst
        if row["layer"] is not None:
            layers.setdefault((row["kind"], row["layer"]), row)
    per_layer = [
        {"kind": kind, "layer": layer, "sqnr_db": row["sqnr_db"], "name": row["name"]}
        for (kind, layer), row in sorted(layers.items())
    ]
    saturating = sum((row["saturation_share"] or 0) > 0 for row in tensors)
    return {
        "tensors": len(tensors),
        "measured": len(known),
        "worst": known[:worst],
        "layers": per_layer,
        "saturating": saturating,
        "most_saturated": max(tensors, key=lambda row: row["saturation_share"] or 0) if saturating else None,
        "median_sqnr_db": quantile([row["sqnr_db"] for row in known], 0.5) if known else None,
    }


def layer_of(name: str) -> int | None:
    """model.layers.17.self_attn.q_proj -> 17."""
    parts = name.split(".")
    for before, after in zip(parts, parts[1:], strict=False):
        if before in ("layers", "blocks", "h") and after.isdigit():
            return int(after)
    return None
