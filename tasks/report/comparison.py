"""Two builds on one page: which is faster, why, what it cost in accuracy, and what was different going in.

Refuses to call noise a finding: figures that moved by less than 2 % are listed last and without colour.
Run it: `kilotok report --compare A B` or `python -m tasks.report --compare BEFORE_JSON AFTER_JSON OUT_HTML`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from specs.errors import InputError
from tasks.report import lineage, plots, words
from tasks.report.collect import FORMAT
from tasks.report.findings import split_words
from tasks.report.page import environment

Report = Mapping[str, Any]
SECTIONS = (
    ("figures", "Figures"),
    ("gates", "Gates"),
    ("cycle", "One cycle"),
    ("acceptance", "Acceptance"),
    ("accuracy", "Accuracy"),
    ("inputs", "Inputs"),
)


def read_report(record: Report) -> Report:
    """The report.json of a build record; a report record is returned as it is. Raises InputError when there is none."""
    if "kilotok_report" in record:
        return record
    name = str(record.get("build") or "the build")
    if not record.get("report"):
        raise InputError(f"build {name} has no report", str(record.get("spec") or ""), "compare builds that reached it")
    path = Path(str(record["report"])).with_name("report.json")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"the report of build {name} cannot be read: {error}", str(path), "run the build again"
        ) from error
    if not isinstance(report, dict) or report.get("kilotok_report") != FORMAT:
        raise InputError(f"build {name} was reported in another format", str(path), "run the build again")
    return report


def render(before: Report, after: Report) -> str:
    """The page of the comparison; both arguments are contents of report.json."""
    compared: dict[str, Any] = {
        "before": before,
        "after": after,
        "split": lineage.speed_split(before["metrics"], after["metrics"]),
        "deltas": lineage.deltas(before["metrics"], after["metrics"]),
        "gates": _gates(before, after),
        "parts": _parts(before, after),
        "domains": _domains(before, after),
        "tasks": _tasks(before, after),
        "inputs": inputs(before, after),
    }
    art = (
        Markup(plots.responsive(lambda width: plots.part_changes(compared["parts"], width)))
        if compared["parts"]
        else None
    )
    return (
        environment()
        .get_template("compare.html.jinja")
        .render(c=compared, said=sentence(compared), sections=SECTIONS, art=art)
    )


def sentence(compared: Mapping[str, Any]) -> str:
    """What the comparison comes to."""
    split = compared["split"]
    if split is None:
        return "The change of speed cannot be taken apart: not all of its factors were measured in both builds."
    return split_words(split)


def _gates(before: Report, after: Report) -> list[dict[str, Any]]:
    """Verdicts side by side, those that differ first; the n-th gate on a metric beside the n-th, whatever its bound."""
    old, new = _by_metric(before), _by_metric(after)
    rows = [
        {
            "label": (new.get(key) or old[key])["label"],
            "metric": key[0],
            "unit": (new.get(key) or old[key])["unit"],
            "before": old.get(key),
            "after": new.get(key),
        }
        for key in {**new, **old}
    ]
    return sorted(rows, key=lambda row: (row["before"] or {}).get("verdict") == (row["after"] or {}).get("verdict"))


def _by_metric(report: Report) -> dict[tuple[str, int], Mapping[str, Any]]:
    found: dict[tuple[str, int], Mapping[str, Any]] = {}
    for gate in report["gates"]:
        found[gate["metric"], sum(key[0] == gate["metric"] for key in found)] = gate
    return found


def _parts(before: Report, after: Report) -> list[dict[str, Any]]:
    """Each part of the cycle then and now; the largest movement first."""
    old = {part["name"]: part for part in (before["cycle"] or {}).get("parts", [])}
    new = {part["name"]: part for part in (after["cycle"] or {}).get("parts", [])}
    if not old or not new:
        return []
    rows = [
        {
            "name": name,
            "group": (new.get(name) or old[name])["group"],
            "before": old.get(name, {}).get("us", 0.0),
            "after": new.get(name, {}).get("us", 0.0),
        }
        for name in {**old, **new}
    ]
    return sorted(rows, key=lambda row: -abs(row["after"] - row["before"]))[:14]


def _domains(before: Report, after: Report) -> list[dict[str, Any]]:
    old = {entry["domain"]: entry["length"] for entry in (before["acceptance"] or {}).get("domains", [])}
    new = {entry["domain"]: entry["length"] for entry in (after["acceptance"] or {}).get("domains", [])}
    return [_row(name, "tokens", 1, old.get(name), new.get(name)) for name in {**old, **new}]


def _tasks(before: Report, after: Report) -> list[dict[str, Any]]:
    old = {task["task"]: task.get("served") for task in (before["accuracy"] or {}).get("tasks", [])}
    new = {task["task"]: task.get("served") for task in (after["accuracy"] or {}).get("tasks", [])}
    return [_row(name, "%", 1, old.get(name), new.get(name)) for name in {**old, **new}]


def _row(label: str, unit: str, better: int, before: float | None, after: float | None) -> dict[str, Any]:
    """A row for the table of differences; without both values it has no direction."""
    known = before is not None and after is not None
    gap = after - before if known else 0.0  # type: ignore[operator]
    share = gap / abs(before) if known and before else None
    weight = abs(gap) if unit == "%" else abs(share or 0.0)
    judged = None if not known or weight < lineage.NOISE else (gap > 0) == (better > 0)
    return {
        "label": label,
        "unit": unit,
        "before": before,
        "after": after,
        "share": share,
        "better": judged,
        "known": known,
    }


def inputs(before: Report, after: Report) -> list[dict[str, str]]:
    """What went in differently: spec settings, packages, machine, commit, and artifacts by digest."""
    old, new = before["provenance"] or {}, after["provenance"] or {}
    rows = _different("setting", before["settings"], after["settings"])
    rows += _different("spec", _flat(old.get("spec")), _flat(new.get("spec")))
    rows += _different("package", old.get("packages"), new.get("packages"))
    rows += _different("machine", old.get("machine"), new.get("machine"))
    rows += _different(
        "commit", {"commit": str(old.get("commit", ""))[:12]}, {"commit": str(new.get("commit", ""))[:12]}
    )
    artifacts = [{row["stage"]: row["digest"][:12] for row in report["stages"]} for report in (before, after)]
    return rows + _different("artifact", *artifacts)


def _different(kind: str, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> list[dict[str, str]]:
    old, new = old or {}, new or {}
    return [
        {"kind": kind, "name": name, "before": _shown(old.get(name)), "after": _shown(new.get(name))}
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return words.listed([str(item) for item in value], 6) if value else "none"
    return "none" if value in (None, "") else str(value)


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping):
        return {
            path: leaf
            for key, child in tree.items()
            for path, leaf in _flat(child, f"{name}.{key}" if name else str(key)).items()
        }
    return {name: tree} if name else {}
