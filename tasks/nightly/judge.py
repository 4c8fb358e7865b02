"""The morning's sentences: which gates failed, which figures stepped, since when, and which input did it.

Refuses to repeat itself: a step is an alarm once, then it is only listed. Refuses to alarm on what got better.
Run it: `python -m pytest tests/tasks/nightly/test_night.py`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tasks.nightly import attribution
from tasks.nightly.attribution import ENVIRONMENT
from tasks.nightly.detection import newest_step
from tasks.nightly.history import Point, inputs_at, series
from tasks.report.words import count, figure, meaning

if TYPE_CHECKING:
    from specs.schema import Spec

WATCHED = ("latency.tps_per_user.p50", "acceptance.length", "accuracy.difference")
SOURCES = ("live", "build")
Finding = dict[str, Any]


def judge(table: sqlite3.Connection, spec: Spec, record: Mapping[str, Any], build: Mapping[str, Any]) -> list[Finding]:
    """Alarms first. `table` already holds tonight; `record` and `build` are tonight's."""
    found = [_gate(table, spec.name, record, gate) for gate in build.get("gates") or () if _failed(gate)]
    watched = dict.fromkeys([*WATCHED, *(gate.metric for gate in spec.validation.gates)])
    for metric in watched:
        found += [step for source in SOURCES if (step := _step(table, spec.name, record["night"], metric, source))]
    return sorted(found, key=lambda finding: not finding["alarm"])


def of_error(error: Mapping[str, Any], record: Mapping[str, Any]) -> Finding:
    """A night that ended before it could measure: what it was about to rebuild is what may have caused it."""
    planned = [
        {"kind": "plan", "name": row["stage"], "stage": row["stage"], "what": f"{row['stage']} {row['reason']}"}
        for row in record["plan"]
        if row["state"] == "build"
    ]
    text = " ".join(str(error.get(part) or "") for part in ("what", "where")).strip()
    return {"kind": "error", "metric": "", "source": "", "since": record["night"], "text": text, "causes": planned,
            "worse": True, "alarm": True}  # fmt: skip


def _failed(gate: Mapping[str, Any]) -> bool:
    return gate.get("verdict") not in ("PASS", "FIRST")


def _gate(table: sqlite3.Connection, name: str, record: Mapping[str, Any], gate: Mapping[str, Any]) -> Finding:
    """A gate is judged against the last build that passed: its inputs are what tonight's are compared with."""
    passed, metric = _last_pass(table, name, record["night"], "<"), str(gate["metric"])
    text = f"{meaning(metric).label}: {gate.get('reason') or gate['verdict']}"
    return _finding(table, name, "gate", metric, "build", passed, record["night"], text, worse=True, alarm=True)


def _step(table: sqlite3.Connection, name: str, night: str, metric: str, source: str) -> Finding | None:
    points = series(table, name, metric, source)
    step = newest_step([point.values for point in points])
    if step is None:
        return None
    words = meaning(metric)
    since, good = points[step.at].night, points[step.at - 1].night
    better = words.better or 1
    worse = (step.change < 0) == (better > 0)
    near, far = sorted((abs(step.low), abs(step.high)))
    text = (
        f"{words.label} ({source}) {'fell' if step.change < 0 else 'rose'} {_share(step.change, step.relative)} "
        f"({_share(near, step.relative)} to {_share(far, step.relative)}), from "
        f"{figure(step.before, words.unit)} to {figure(step.after, words.unit)}, since {since}"
    )
    alarm = worse and points[-1].night == night and not _told(table, name, metric, source, points[: step.at + 2])
    found = _finding(table, name, "step", metric, source, good, since, text, worse=worse, alarm=alarm)
    return {**found, "step": step.to_dict()}


def _finding(
    table: sqlite3.Connection, name: str, kind: str, metric: str, source: str, good: str | None, since: str, text: str,
    *, worse: bool, alarm: bool,
) -> Finding:  # fmt: skip
    before, after = (_inputs(table, name, night or "", source) for night in (good, since))
    found = attribution.causes(before, after, metric)
    return {"kind": kind, "metric": metric, "source": source, "good": good, "since": since, "text": text,
            "causes": [cause.to_dict() for cause in found], "why": attribution.words(found) if good else "first build",
            "worse": worse, "alarm": alarm}  # fmt: skip


def _inputs(table: sqlite3.Connection, name: str, night: str, source: str) -> dict[str, dict[str, str]]:
    """What went into what was measured: a build's own inputs; of what is live, those of the last build that passed."""
    tonight = inputs_at(table, name, night)
    if source == "build":
        return tonight
    passed = _last_pass(table, name, night, "<=")
    return {**inputs_at(table, name, passed or ""), ENVIRONMENT: tonight.get(ENVIRONMENT, {})}


def _last_pass(table: sqlite3.Connection, name: str, night: str, relation: str) -> str | None:
    found = table.execute(
        f"SELECT MAX(night) FROM nights WHERE spec = ? AND verdict = 'PASS' AND night {relation} ?", (name, night)
    ).fetchone()[0]
    return None if found is None else str(found)


def _told(table: sqlite3.Connection, name: str, metric: str, source: str, near: Sequence[Point]) -> bool:
    """Whether an earlier night already raised this alarm; the night a step is dated to may shift by one."""
    nights = [point.night for point in near[-3:]]
    marks = ", ".join("?" for _ in nights)
    return bool(
        table.execute(
            f"SELECT 1 FROM alarms WHERE spec = ? AND metric = ? AND source = ? AND since IN ({marks})",
            (name, metric, source, *nights),
        ).fetchone()
    )


def _share(value: float, relative: bool) -> str:
    return f"{100 * abs(value):.1f} {'%' if relative else 'points'}"


def summary(record: Mapping[str, Any]) -> str:
    """The night in one line."""
    state, parts = record["state"], []
    if state == "unchanged":
        parts.append("unchanged: nothing was built")
    elif state == "promoted":
        parts.append(f"promoted: {_rebuilt(record)}")
    elif state == "kept":
        parts.append(f"kept what was live: {_rebuilt(record)}")
    else:
        parts.append(state)
    parts += _alarms(record["findings"])
    if record.get("unmeasured"):
        parts.append(f"what is live was not measured: {record['unmeasured']}")
    if (record["drift"] or {}).get("state") == "moved":
        parts.append(f"the source moved: {count(len(record['drift']['what']), 'difference')}, kilotok lock takes them")
    return "; ".join(parts)


def _alarms(findings: Sequence[Finding]) -> list[str]:
    """A phrase for each cause: one changed input fails many gates at once, and the page lists them all."""
    by_cause: dict[str, list[str]] = {}
    for finding in findings:
        if finding["alarm"]:
            by_cause.setdefault(str(finding.get("why") or ""), []).append(" ".join(str(finding["text"]).split()))
    phrases = []
    for why, texts in by_cause.items():
        more = f" and {count(len(texts) - 1, 'figure')} more" if len(texts) > 1 else ""
        phrases.append(f"{texts[0]}{more}" + (f" ({why})" if why else ""))
    return phrases


def _rebuilt(record: Mapping[str, Any]) -> str:
    """What made tonight build: the first stage's own reason."""
    first = next((row for row in record["plan"] if row["state"] == "build"), None)
    return f"{first['stage']} {first['reason']}" if first else "started again"
