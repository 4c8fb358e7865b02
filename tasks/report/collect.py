"""Gather: every earlier stage's artifact into one JSON-able record, the content of report.json.

The page, the Markdown and the model card are functions of this record and of nothing else, so a report can be
drawn again or compared years later. Refuses to stop at a missing or broken file: it is named in `notes` and its
section is null.
Run it: `python -m tasks.report REPORT_JSON OUT` draws a record again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.job import Job
from tasks.report import lineage, measures, quality, trust
from tasks.report.words import as_number, count, figure, first, listed, meaning, signed

FORMAT = 1
MAX_VALUES = 400  # of one distribution kept in the record; a histogram shows no more


def collect(job: Job) -> dict[str, Any]:
    """The record. Never raises for what a stage left out."""
    files = Files(job.inputs)
    summary = files.json("validate", "summary.json") or {}
    outcome = files.json("validate", "verdict.json") or {}
    receipts = [dict(row) for row in given(job, "receipts") or []]
    metrics = _metrics(summary, outcome, receipts)
    last_good = given(job, "last_good") or None
    manifests = lineage.manifests(job.inputs)
    rules = (job.spec.get("validate") or {}).get("accuracy") or {}
    gates = _gates(files.json("validate", "gates.json") or outcome.get("gates") or summary.get("gates") or [])
    cycle = measures.cycle_parts(files.json("validate", "waterfall.json"), metrics)
    requests = files.table("validate", "requests.parquet")
    verdict = _verdict(outcome, summary, gates)
    report = {
        "kilotok_report": FORMAT,
        "spec": job.spec.get("name") or "unnamed",
        "build": given(job, "build") or "",
        "created": _created(manifests),
        "verdict": verdict,
        "gates": gates,
        "remarks": _remarks(outcome),
        "causes": trust.causes(outcome),
        "metrics": metrics,
        "headline": measures.headline(metrics, cycle),
        "pareto": _pareto(requests, metrics),
        "cycle": cycle,
        "acceptance": measures.acceptance(
            files.table("validate", "acceptance.parquet"), metrics, files.json("validate", "golden.json")
        ),
        "accuracy": quality.accuracy(
            files.table("validate", "problems.parquet"), metrics, rules, _accuracy_verdicts(outcome)
        ),
        "quantization": quality.quantization(files.table("quantize", "layers.parquet")),
        "latency": measures.latency(requests),
        "loads": trust.loads(metrics),
        "engine_alone": trust.engine_alone(metrics),
        "grounds": trust.grounds(metrics),
        "draft": _draft(files),
        "stages": lineage.stages(receipts, given(job, "prediction") or {}),
        "prediction": _prediction(job, metrics, receipts),
        "changes": lineage.changed(last_good, receipts, manifests, metrics),
        "provenance": lineage.provenance(manifests, receipts),
        "settings": _settings(job),
        "notes": files.notes,
    }
    report["reason"] = sentence(report)
    return plain(report)


def given(job: Job, name: str) -> Any:
    """What the run tells about itself: receipts, last_good, build, prediction."""
    return job.extra.get(name, job.spec.get(name))


class Files:
    """Reads what is there and notes what is not."""

    def __init__(self, inputs: Mapping[str, Path]) -> None:
        self.inputs, self.notes = inputs, []  # type: tuple[Mapping[str, Path], list[str]]

    def json(self, stage: str, name: str) -> Any:
        """The parsed file or None."""
        path = self._path(stage, name)
        if path is None:
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            self.notes.append(f"{stage}/{name} could not be read: {error}")
            return None

    def table(self, stage: str, name: str) -> list[dict[str, Any]] | None:
        """The rows of a Parquet file or None."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self._path(stage, name)
        if path is None:
            return None
        try:
            return pq.read_table(path).to_pylist()
        except (OSError, pa.ArrowException) as error:
            self.notes.append(f"{stage}/{name} could not be read: {error}")
            return None

    def _path(self, stage: str, name: str) -> Path | None:
        folder = self.inputs.get(stage)
        return folder / name if folder is not None and (folder / name).is_file() else None


# What only a measurement of the served candidate may say; the draft's own training figures have names like these.
_MEASURED = ("latency.", "acceptance.", "accuracy.", "cycle.", "baseline.", "client.")


def _metrics(
    summary: Mapping[str, Any], outcome: Mapping[str, Any], receipts: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Every finite figure under its dotted name; validate's own word comes last and wins."""
    found: dict[str, float] = {}
    sources = [(receipt.get("stage"), receipt.get("metrics")) for receipt in receipts]
    sources += [("validate", outcome.get("metrics")), ("validate", summary.get("metrics")), ("validate", summary)]
    for stage, source in sources:
        for name, value in (source or {}).items():
            number = None if isinstance(value, (str, Mapping, list)) else as_number(value)
            if number is not None and (stage == "validate" or not str(name).startswith(_MEASURED)):
                found[str(name)] = number
    return dict(sorted(found.items()))


# -- gates and verdict -------------------------------------------------------------------------------------------------
_OPS = {
    "at_least": ("at_least", 1),
    ">=": ("at_least", 1),
    "ge": ("at_least", 1),
    "min": ("at_least", 1),
    "at_most": ("at_most", -1),
    "<=": ("at_most", -1),
    "le": ("at_most", -1),
    "max": ("at_most", -1),
}


def _gates(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per gate, failures first. What is not exactly PASS is not a pass, and a pass needs a figure."""
    found = []
    for row in rows:
        metric = str(row.get("metric") or row.get("name") or "unnamed")
        op, sign = _OPS.get(str(first(row, "op", "direction")), ("", 0))
        measured, required = as_number(first(row, "measured", "value")), as_number(first(row, "required", "bound"))
        margin = sign * (measured - required) if measured is not None and required is not None and sign else None
        words = meaning(metric)
        found.append(
            {
                "metric": metric,
                "label": words.label,
                "unit": words.unit,
                "op": op,
                "measured": measured,
                "required": required,
                "asked": _relative(row.get("asked")),
                "margin": margin,
                "margin_share": margin / abs(required) if margin is not None and required else None,
                "verdict": _gate_verdict(row, measured),
                "reason": str(row.get("reason") or ""),
            }
        )
    order = {"FAIL": 0, "MISSING": 1, "UNDERPOWERED": 2, "FIRST": 3, "PASS": 4}
    return sorted(found, key=lambda gate: order[gate["verdict"]])


def _relative(asked: Any) -> str:
    """The words of a relative bound; a plain number is its own bound and needs none."""
    return "" if asked is None or as_number(asked) is not None else str(asked).replace("_", " ")


def _gate_verdict(row: Mapping[str, Any], measured: float | None) -> str:
    """FIRST has nothing to compare with yet: not a pass, and no reason to stop."""
    said = str(first(row, "verdict", "state") or "").upper()
    if said == "PASS" and measured is None:
        return "MISSING"
    return said if said in ("PASS", "FAIL", "UNDERPOWERED", "FIRST") else "MISSING"


def _verdict(outcome: Mapping[str, Any], summary: Mapping[str, Any], gates: Sequence[Mapping[str, Any]]) -> str:
    """Validate's word; a PASS beside a gate that is not a pass, or without any gate, is not repeated."""
    said = str(first(outcome, "verdict") or first(summary, "verdict") or "").upper()
    if said == "PASS":
        said_by_gates = {gate["verdict"] for gate in gates}
        if "PASS" in said_by_gates and said_by_gates <= {"PASS", "FIRST"}:
            return "PASS"
        return "FAIL" if "FAIL" in said_by_gates else "NOT MEASURED"
    return said if said in ("FAIL", "UNDERPOWERED") else "NOT MEASURED"


def sentence(report: Mapping[str, Any]) -> str:
    """Why, in one sentence."""
    gates = report["gates"]
    by_verdict = {
        name: [gate for gate in gates if gate["verdict"] == name]
        for name in ("PASS", "FAIL", "UNDERPOWERED", "MISSING")
    }
    if not gates:
        return "No gate was evaluated, so nothing can be said and nothing was promoted."
    if report["verdict"] == "PASS":
        closest = min(
            (gate for gate in gates if gate["margin_share"] is not None),
            key=lambda gate: gate["margin_share"],
            default=None,
        )
        tail = f"; the closest is {_lower(closest['label'])}, {_distance(closest)}" if closest else ""
        good = len(by_verdict["PASS"])
        holds = "The one gate holds" if good == 1 else f"All {good} gates hold"
        waiting = (
            f"; {count(len(gates) - good, 'gate')} had no earlier build to compare with" if good < len(gates) else ""
        )
        return f"{holds}{tail}{waiting}."
    parts = []
    if by_verdict["FAIL"]:
        worst = by_verdict["FAIL"][0]
        parts.append(
            f"{count(len(by_verdict['FAIL']), 'gate')} of {len(gates)} failed: {_shortfall(worst)}"
            + _others(by_verdict["FAIL"])
        )
    if by_verdict["UNDERPOWERED"]:
        parts.append(
            f"{listed([_lower(gate['label']) for gate in by_verdict['UNDERPOWERED']])} needs more samples to tell"
        )
    if by_verdict["MISSING"]:
        parts.append(f"{listed([_lower(gate['label']) for gate in by_verdict['MISSING']])} was not measured")
    text = "; ".join(parts or ["validate gave no verdict"])
    return f"{text[:1].upper()}{text[1:]}."


def _others(gates: Sequence[Mapping[str, Any]]) -> str:
    return f" (also {listed([_lower(gate['label']) for gate in gates[1:]])})" if len(gates) > 1 else ""


def _shortfall(gate: Mapping[str, Any]) -> str:
    measured, required = figure(gate["measured"], gate["unit"]), figure(gate["required"], gate["unit"])
    if gate["measured"] is None or gate["required"] is None:
        return gate["reason"] or _lower(gate["label"])
    bound = "at least" if gate["op"] == "at_least" else "at most"
    return f"{_lower(gate['label'])} is {measured}, {bound} {required} was asked"


def _distance(gate: Mapping[str, Any]) -> str:
    side = "above" if gate["op"] == "at_least" else "below"
    if gate["unit"] in ("%", "points"):
        return f"{100 * gate['margin']:.1f} points {side} what is asked"
    return f"{signed(100 * gate['margin_share'], 1).lstrip('+')} % {side} what is asked"


def _lower(label: str) -> str:
    return label[:1].lower() + label[1:]


def _accuracy_verdicts(outcome: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """validate's verdict by task, and over all of them."""
    rows = outcome.get("accuracy") or {}
    overall = outcome.get("overall")
    judged = {**rows, **({measures.ALL: overall} if overall else {})} if isinstance(rows, Mapping) else {}
    return [{"task": task, **row} for task, row in judged.items() if isinstance(row, Mapping)]


def _remarks(outcome: Mapping[str, Any]) -> list[str]:
    """Warnings, and what the client found odd about the replies of each side."""
    remarks = [str(text) for text in outcome.get("warnings") or []]
    for side, found in (outcome.get("findings") or {}).items():
        if isinstance(found, Mapping):
            remarks += [
                f"{side}: {count(int(n), 'reply', 'replies')} {trust.finding_words(name)}"
                for name, n in found.items()
                if n
            ]
    return remarks


# -- the rest ----------------------------------------------------------------------------------------------------------
def _pareto(requests: Sequence[Mapping[str, Any]] | None, metrics: Mapping[str, float]) -> dict[str, Any] | None:
    points = measures.throughput(requests)
    speed = as_number(metrics.get("latency.tps_per_user.p50"))
    if not points and speed:
        points = [{"profile": "one user", "users": 1, "tps_user": speed, "tps_server": speed}]
    return {"points": points, "baseline": as_number(metrics.get("baseline.tps_per_user.p50"))} if points else None


def _draft(files: Files) -> dict[str, Any] | None:
    """The training curve, thinned to what a small plot can show."""
    rows = files.table("train_draft", "curve.parquet") or []
    points = [(as_number(row.get("step")), as_number(row.get("loss"))) for row in rows]
    points = [(step, loss) for step, loss in points if step is not None and loss is not None]
    summary = files.json("train_draft", "summary.json") or {}
    answers = files.json("synthesize", "summary.json") or {}
    every = max(1, len(points) // 120)
    curve = [{"step": step, "loss": loss} for step, loss in points[::every]]
    facts = {
        key: value
        for key, value in {**answers, **summary}.items()
        if isinstance(value, (int, float, str)) and not isinstance(value, bool)
    }
    return {"curve": curve, "facts": facts} if curve or facts else None


def _prediction(
    job: Job, metrics: Mapping[str, float], receipts: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]] | None:
    """Predicted beside actual: figures by metric name, and seconds by stage for the stages that were built."""
    prediction = given(job, "prediction") or {}
    rows = []
    figures: Mapping[str, Any] = prediction.get("metrics") or {}
    for name, value in figures.items():
        entry = value if isinstance(value, Mapping) else {"predicted": value}
        words = meaning(name)
        rows.append(
            {
                "name": name,
                "label": words.label,
                "unit": words.unit,
                "predicted": as_number(first(entry, "predicted", "value", "p50")),
                "low": as_number(entry.get("low")),
                "high": as_number(entry.get("high")),
                "actual": as_number(metrics.get(name)),
            }
        )
    taken = {row.get("stage"): as_number(row.get("seconds")) for row in receipts if row.get("state") == "built"}
    for stage, value in (prediction.get("stages") or {}).items():
        entry = value if isinstance(value, Mapping) else {"predicted": value}
        rows.append(
            {
                "name": f"seconds.{stage}",
                "label": f"Time of {stage}",
                "unit": "s",
                "predicted": as_number(first(entry, "predicted", "seconds")),
                "low": as_number(entry.get("low")),
                "high": as_number(entry.get("high")),
                "actual": taken.get(stage),
            }
        )
    return [row for row in rows if row["predicted"] is not None] or None


def _settings(job: Job) -> dict[str, Any]:
    """The few lines of the spec that a reader needs beside the figures."""
    engine, draft = job.spec.get("engine") or {}, job.spec.get("draft") or {}
    latency = (job.spec.get("validate") or {}).get("latency") or {}
    picked = {
        "backend": engine.get("backend"),
        "tensor_parallel": engine.get("tensor_parallel"),
        "draft_tokens": engine.get("draft_tokens"),
        "plugins": engine.get("plugins"),
        "draft_method": draft.get("method"),
        "profile": latency.get("profile"),
    }
    return {key: value for key, value in picked.items() if value not in (None, [], "")}


def _created(manifests: Mapping[str, Mapping[str, Any]]) -> str:
    return max((str(manifest.get("created") or "") for manifest in manifests.values()), default="")


def plain(value: Any) -> Any:
    """JSON that every reader accepts: no NaN, no infinity, no numpy, no long tails of values."""
    if isinstance(value, Mapping):
        return {str(key): plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [
            plain(child)
            for child in (value if len(value) <= 4 * MAX_VALUES else value[:: math.ceil(len(value) / MAX_VALUES)])
        ]
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    return as_number(value) if as_number(value) is not None else (None if isinstance(value, float) else str(value))
