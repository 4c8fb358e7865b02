"""Gates as data: one loop over flat metric names, each with a bound that is a number or a share of another number.

    {metric: latency.tps_per_user.p50, at_least: 1000}
    {metric: latency.tps_per_user.p50, at_least: 0.97 of last_good}     against the last promoted build
    {metric: latency.tps_per_user.p50, at_least: 4.0 of baseline}       against baseline.tps_per_user.p50, same run

It refuses to pass what is missing: no metric, NaN, or no baseline is MISSING, which blocks like FAIL. Only
`last_good` may be absent as a whole: the first build has nothing to compare with, and is FIRST: not a pass, but no
reason to stop either.

Run: `python -m pytest tests/tasks/test_gates.py`
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["PASS", "FAIL", "MISSING", "FIRST"]
RELATIVE = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s+of\s+(last_good|baseline)\s*")
UNITS = (
    ("_ms", "ms"),
    ("_us", "us"),
    (".us", "us"),
    ("_percent", "%"),
    ("tps", "tokens/s"),
    ("acceptance.length", "tokens/cycle"),
    ("acceptance.position", "share"),
    ("accuracy", "share"),
    ("_gib", "GiB"),
    ("_s", "s"),
)


@dataclass(frozen=True)
class GateResult:
    """One gate, judged: value and bound are what was compared; `reason` is a sentence for people."""

    metric: str
    direction: Literal["at_least", "at_most"]
    value: float | None
    bound: float | None
    asked: str
    unit: str
    state: State
    reason: str

    @property
    def blocks(self) -> bool:
        return self.state in ("FAIL", "MISSING")


def judge(
    metrics: Mapping[str, float], gates: Iterable[Mapping[str, Any]], last_good: Mapping[str, float] | None = None
) -> list[GateResult]:
    """One result per gate, in order. Raises ValueError for a gate that is not one (the schema refuses it earlier)."""
    return [_judge_one(metrics, gate, last_good) for gate in gates]


def passed(results: Iterable[GateResult]) -> bool:
    return not any(result.blocks for result in results)


def baseline_name(metric: str) -> str:
    """`latency.tps_per_user.p50` -> `baseline.tps_per_user.p50`: the same quantity on the source, in the same run."""
    return "baseline." + metric.removeprefix("latency.")


def unit_of(metric: str) -> str:
    """Of `latency.ttft_ms.p50`: ms. Empty when the name does not tell."""
    name = re.sub(r"\.p\d+$", "", metric)
    return next((unit for part, unit in UNITS if name.endswith(part) or (part[0] not in "._" and part in name)), "")


def _judge_one(
    metrics: Mapping[str, float], gate: Mapping[str, Any], last_good: Mapping[str, float] | None
) -> GateResult:
    directions = [name for name in ("at_least", "at_most") if gate.get(name) is not None]
    if len(directions) != 1 or "metric" not in gate:
        raise ValueError(f"a gate has a metric and exactly one of at_least and at_most, not {dict(gate)!r}")
    metric, direction = str(gate["metric"]), directions[0]
    asked, unit = gate[direction], unit_of(metric)
    value = _finite(metrics.get(metric))
    bound, why = _bound(asked, metric, metrics, last_good)
    tolerance = abs(float(gate.get("tolerance") or 0.0))

    def result(state: State, reason: str) -> GateResult:
        return GateResult(metric, direction, value, bound, str(asked), unit, state, reason)  # type: ignore[arg-type]

    if value is None:
        return result("MISSING", f"{metric} was not measured" if metric not in metrics else f"{metric} is not a number")
    if bound is None:
        return result("FIRST" if last_good is None and "last_good" in str(asked) else "MISSING", why)
    good = value >= bound - tolerance if direction == "at_least" else value <= bound + tolerance
    words = direction.replace("_", " ")
    return result(
        "PASS" if good else "FAIL", f"{value:.6g} {unit}, must be {words} {bound:.6g}{why}".replace(" ,", ",")
    )


def _bound(
    asked: Any, metric: str, metrics: Mapping[str, float], last_good: Mapping[str, float] | None
) -> tuple[float | None, str]:
    if isinstance(asked, (int, float)) and not isinstance(asked, bool):
        bound = _finite(asked)
        return bound, "" if bound is not None else "the bound is not a number"
    match = RELATIVE.fullmatch(str(asked))
    if not match:
        raise ValueError(
            f"{asked!r} is neither a number nor like '0.97 of last_good' or '4.0 of baseline' (gate on {metric})"
        )
    factor, of = float(match.group(1)), match.group(2)
    if of == "last_good" and last_good is None:
        return None, "no earlier good build to compare with"
    name = baseline_name(metric) if of == "baseline" else metric
    reference = _finite((metrics if of == "baseline" else last_good or {}).get(name))
    if reference is None:
        return None, f"{name} of {'this run' if of == 'baseline' else 'the last good build'} is missing"
    return factor * reference, f" ({factor:g} of {of.replace('_', ' ')} {reference:.6g})"


def _finite(value: Any) -> float | None:
    if value is None or isinstance(value, (bool, str)):
        return None
    number = float(value)
    return number if math.isfinite(number) else None
