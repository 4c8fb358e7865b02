"""From two sides' answers to verdicts: pair them by problem, test all and each task, and know when enough was asked.

`all` decides, with one exception: a task shown to be worse than the margin fails the whole, however good the others.

Early stop: the served side answers first. Only where it is wrong can it lose against the source, so the source is asked
there first; a PASS is settled once no open problem can be a loss that matters. What was not asked counts the way that
speaks against the verdict, so no figure is better than it would have been.

It refuses a problem that only one side answered.

Run: `python -m pytest tests/tasks/test_paired.py`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from specs.errors import StageFailed
from tasks.tables import check
from tasks.validate.statistics import PairedResult, compare, score_interval, settled
from tasks.validate.tables import Problems

ALL_TASKS = "all"
ROUNDS = 4  # over the problems that the served side has right
Rows = Sequence[Mapping[str, Any]]
Key = tuple[str, str]  # task, id


def problems_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """problems.parquet, checked."""
    return check(pd.DataFrame(list(rows), columns=list(Problems.to_schema().columns)), Problems, "problems.parquet")


def paired_arrays(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """(source, served) as [problem, sample], in the order of the problems.

    Raises StageFailed when one side lacks a problem.
    """
    sides = []
    for name in ("source", "served"):
        wide = frame[frame["side"] == name].pivot(index=["task", "id"], columns="sample", values="correct")
        sides.append(wide.sort_index())
    source, served = sides
    if not source.index.equals(served.index) or source.isna().to_numpy().any() or served.isna().to_numpy().any():
        odd = source.index.symmetric_difference(served.index)
        named = f", first {odd[0]}" if len(odd) else ""
        raise StageFailed(
            f"source and served did not answer the same problems{named}", "problems.parquet", "run validate again"
        )
    return source.to_numpy(float), served.to_numpy(float)


def verdicts(frame: pd.DataFrame, margin: float, alpha: float, power: float) -> dict[str, PairedResult]:
    """The paired test over all problems (`all`) and by task.

    `all` decides, with one exception: a task shown to be worse than the margin (alpha shared among the tasks) fails the
    whole, however good the others are. Short of that a task alone is UNDERPOWERED, not FAIL: four tasks tested at
    power 0.8 would fail every second good model.
    """
    tasks = sorted(frame["task"].unique())
    results = {ALL_TASKS: compare(*paired_arrays(frame), margin=margin, alpha=alpha, power=power)}
    for task in tasks:
        result = compare(*paired_arrays(frame[frame["task"] == task]), margin=margin, alpha=alpha, power=power)
        shown_worse = score_interval(result.gains, result.losses, result.problems, alpha / len(tasks))[1] < -margin
        if result.verdict != "PASS":
            result = replace(result, verdict="FAIL" if shown_worse else "UNDERPOWERED")
        if result.verdict == "FAIL":
            results[ALL_TASKS] = replace(results[ALL_TASKS], verdict="FAIL", samples_needed=0)
        results[task] = result
    return results


def accuracy_metrics(results: Mapping[str, PairedResult]) -> dict[str, float]:
    """`accuracy.<task>.{source,served,difference,low,high,problems}`; `accuracy.difference` and the like over all."""
    metrics: dict[str, float] = {}
    for task, result in results.items():
        prefix = "accuracy" if task == ALL_TASKS else f"accuracy.{task}"
        values = {
            "source": result.source,
            "served": result.served,
            "difference": result.difference,
            "low": result.lower,
            "high": result.upper,
            "problems": float(result.problems),
        }
        metrics.update({f"{prefix}.{name}": value for name, value in values.items()})
    return metrics


def ask_until_settled(
    served: Rows, ask: Callable[[list[Key]], list[dict[str, Any]]], margin: float, alpha: float
) -> tuple[list[dict[str, Any]], str]:
    """Rows of the source, all of them or as many as settle the verdict, and which one they settled ("" for none)."""
    right = {(row["task"], row["id"]): row["correct"] > 0 for row in served}
    wrong = [key for key, good in right.items() if not good]
    rest = [key for key, good in right.items() if good]
    size = -(-len(rest) // ROUNDS)
    rounds = [wrong, *(rest[start : start + size] for start in range(0, len(rest), size or 1))]
    rows: list[dict[str, Any]] = []
    for keys in rounds:
        if keys:
            rows += ask(keys)
        if len(rows) < len(right) and (said := _settled(right, rows, margin, alpha)):
            return rows, said
    return rows, ""


def _settled(right: Mapping[Key, bool], source: Rows, margin: float, alpha: float) -> str:
    """The verdict over all, once neither it nor the guard of a single task can change."""
    known = {(row["task"], row["id"]): row["correct"] > 0 for row in source}
    tallies: dict[str, np.ndarray] = {}  # by task: gains, losses, may still gain, may still lose, problems
    for key, good in right.items():
        asked = key in known
        tallies.setdefault(key[0], np.zeros(5, int))[:] += (
            asked and good and not known[key], asked and known[key] and not good, good and not asked,
            not good and not asked, 1,
        )  # fmt: skip
    gains, losses, may_gain, may_lose, total = (int(n) for n in sum(tallies.values(), np.zeros(5, int)))
    said = settled(gains, losses, may_gain, may_lose, total, margin, alpha)
    safe = all(
        score_interval(int(t[0]), int(t[1] + t[3]), int(t[4]), alpha / len(tallies))[1] >= -margin
        for t in tallies.values()
    )
    return said if said != "PASS" or safe else ""


def fill_unasked(source: Rows, served: Rows, said: str) -> list[dict[str, Any]]:
    """The source's rows for problems it was not asked, counted against `said`: ties for a PASS, gains for a FAIL."""
    known = {(row["task"], row["id"]) for row in source}
    return [
        {**row, "side": "source", "answer": "", "correct": row["correct"] if said == "PASS" else 0.0}
        for row in served
        if (row["task"], row["id"]) not in known
    ]
