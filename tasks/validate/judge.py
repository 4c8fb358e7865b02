"""From figures to the verdict: the spec's gates, validate's own, the accuracy test, and the files that say so.

Leaves gates.json, verdict.json (with causes and findings) and summary.json in the artifact.

It refuses to weigh: every gate blocks alone, and what was not measured blocks too.

Run: `python -m pytest tests/tasks/test_validate.py`
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tasks.validate.gates import GateResult, judge, passed
from tasks.validate.paired import ALL_TASKS
from tasks.validate.selftest import ERROR_LIMIT_PERCENT
from tasks.validate.statistics import PairedResult

USAGE_LIMIT_PERCENT = 2.0
CAPTURE_LIMIT_NATS = 0.1  # healthy heads fit a layer nearby better by up to 0.014, one capture early costs 0.28
SCALE_LIMIT_PERCENT = 10.0  # FP8 moves a tensor's least-squares scale by well under 1%


@dataclass
class Evidence:
    """What was measured, before anyone judges it."""

    metrics: dict[str, float]
    results: Mapping[str, PairedResult]
    golden: bool = False  # there is a curve to hold the acceptance to
    findings: dict[str, dict[str, int]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def judge_all(evidence: Evidence, settings: Mapping[str, Any], last_good: Mapping[str, float] | None) -> Judgement:
    """Every gate, and the one word."""
    accuracy = settings["accuracy"]
    gates = [{name: value for name, value in gate.items() if value is not None} for gate in settings["gates"] or ()]
    results = judge(evidence.metrics, [*gates, *own_gates(settings, evidence)], last_good)
    rows = [gate_row(result) for result in results if result.state != "FIRST"]
    remarks = [f"{result.metric}: {result.reason}" for result in results if result.state == "FIRST"]
    overall = evidence.results[ALL_TASKS]
    row = accuracy_row(overall)
    only_warn = overall.verdict == "UNDERPOWERED" and accuracy.get("underpowered") == "warn"
    if only_warn:
        remarks.append(row["reason"])
    else:
        rows.append(row)
    verdict = "PASS" if passed(results) else "FAIL"
    if overall.verdict == "FAIL" or (overall.verdict == "UNDERPOWERED" and verdict == "PASS" and not only_warn):
        verdict = overall.verdict
    return Judgement(verdict, rows, remarks)


@dataclass(frozen=True)
class Judgement:
    """`verdict` is PASS, FAIL or UNDERPOWERED; `gates` are rows of gates.json."""

    verdict: str
    gates: list[dict[str, Any]]
    remarks: list[str]

    @property
    def failed(self) -> set[str]:
        return {row["metric"] for row in self.gates if row["verdict"] != "PASS"}


def own_gates(settings: Mapping[str, Any], evidence: Evidence) -> list[dict[str, Any]]:
    """Without these the other figures mean nothing, so no spec can leave them out."""
    margin = settings["accuracy"]["margin"]
    gates: list[dict[str, Any]] = [
        {"metric": "client.error_percent", "at_most": ERROR_LIMIT_PERCENT},
        {"metric": "latency.failed_requests", "at_most": 0},
        {"metric": "latency.usage_error_percent", "at_most": USAGE_LIMIT_PERCENT},
        {"metric": "bundle.scale_error_percent", "at_most": SCALE_LIMIT_PERCENT},
    ]
    # A source that is right on fewer problems than the margin has nothing to lose: any model would pass.
    gates += [
        {"metric": f"accuracy.{task}.source", "at_least": margin}
        for task, result in evidence.results.items()
        if task != ALL_TASKS and result.source < margin
    ]
    if "draft.capture_gain_nats" in evidence.metrics:
        gates.append({"metric": "draft.capture_gain_nats", "at_most": CAPTURE_LIMIT_NATS})
    if evidence.golden:
        gates.append({"metric": "acceptance.golden_gap", "at_most": settings["acceptance"]["tolerance"]})
    return gates


def gate_row(result: GateResult) -> dict[str, Any]:
    return {
        "metric": result.metric,
        "op": result.direction,
        "measured": result.value,
        "required": result.bound,
        "asked": result.asked,
        "unit": result.unit,
        "verdict": result.state,
        "reason": result.reason,
    }


def accuracy_row(overall: PairedResult) -> dict[str, Any]:
    reason = (
        f"{100 * overall.difference:+.1f} points against the source on {overall.problems} problems "
        f"(one-sided limits {100 * overall.lower:+.1f} and {100 * overall.upper:+.1f}, p = {overall.p_value:.3g})"
    )
    if overall.verdict == "UNDERPOWERED":
        reason += f"; too few to tell at a margin of {100 * overall.margin:g} points"
        reason += f": {overall.samples_needed} more problems needed"
    return {
        "metric": "accuracy.difference",
        "op": "at_least",
        "measured": overall.difference,
        "required": -overall.margin,
        "asked": "non-inferiority",
        "unit": "share",
        "kind": "accuracy",
        "verdict": overall.verdict,
        "reason": reason,
    }


def write_verdict(out: Path, evidence: Evidence, said: Judgement, causes: Sequence[Mapping[str, str]]) -> None:
    accuracy = {task: asdict(result) for task, result in evidence.results.items()}
    record = {
        "verdict": said.verdict,
        "gates": said.gates,
        "warnings": [*said.remarks, *evidence.remarks],
        "causes": list(causes),
        "overall": accuracy.pop(ALL_TASKS),
        "accuracy": accuracy,
        "findings": evidence.findings,
    }
    finite = {name: value for name, value in sorted(evidence.metrics.items()) if math.isfinite(value)}
    (out / "gates.json").write_text(json.dumps(said.gates, indent=1))
    (out / "verdict.json").write_text(json.dumps(record, indent=1))
    (out / "summary.json").write_text(json.dumps({"verdict": said.verdict, **finite}, indent=1))
