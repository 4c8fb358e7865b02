"""The model card of a build: README.md with the front matter a Hub reads, made from receipts and measurements alone.

Refuses claims nobody measured: a figure that is missing reads "not measured", a build that did not pass says so first.
Run it: `python -m tasks.report REPORT_JSON OUT` draws a record again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from tasks.report.findings import findings, verdict_words
from tasks.report.markdown import clean, table_row
from tasks.report.words import figure, meaning

_FIGURES = (
    "latency.tps_per_user.p50",
    "latency.ttft_ms.p50",
    "latency.itl_ms.p50",
    "acceptance.length",
    "cycle.us",
    "baseline.tps_per_user.p50",
)


def render(report: Mapping[str, Any]) -> str:
    """The whole card."""
    said = findings(report)
    word = verdict_words(report["verdict"])[0]
    origin = (report["settings"] or {}).get("model_source") or _spec_value(report, "model", "source")
    lines = [
        "---",
        yaml.safe_dump(_front_matter(report, origin), sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {clean(report['spec'])}",
        "",
    ]
    if report["verdict"] != "PASS":
        lines += [f"> **Not for release.** Verdict: {word}. {clean(report['reason'])}", ""]
    source = f" of {clean(origin.removeprefix('hf://'))}" if origin else ""
    backend = clean(report["settings"].get("backend", "unknown"))
    lines += [
        f"FP8 checkpoint{source} with an EAGLE-3 draft, built and measured by kilotok for the `{backend}` engine.",
        "",
        f"Verdict of build {clean(report['build'] or 'unnumbered')}: **{word}**. {clean(report['reason'])}",
        "",
        "## Measured",
        "",
        table_row(("Figure", "Value")),
        "| --- | --- |",
    ]
    lines += [
        table_row((meaning(name).label, figure(report["metrics"].get(name), meaning(name).unit))) for name in _FIGURES
    ]
    lines += ["", clean(said["speed"]), "", "## Accuracy", "", clean(said["accuracy"]), ""]
    tasks = (report["accuracy"] or {}).get("tasks", [])
    if tasks:
        lines += [table_row(("Task", "Source", "Served", "Difference")), "| --- | --- | --- | --- |"]
        lines += [
            table_row(
                (
                    t["task"],
                    figure(t.get("source"), "%"),
                    figure(t.get("served"), "%"),
                    figure(t.get("difference"), "points"),
                )
            )
            for t in tasks
        ]
        lines += [""]
    lines += [
        "## Speculation",
        "",
        clean(said["acceptance"]),
        "",
        "## Quantization",
        "",
        clean(said["quantization"]),
        "",
    ]
    lines += ["## How it was built", "", clean(said["provenance"]), ""]
    machine = (report["provenance"] or {}).get("machine", {})
    lines += [
        f"- {clean(name.replace('_', ' '))}: {clean(value)}"
        for name, value in machine.items()
        if value not in ("", "none") and name != "host"
    ]
    lines += ["", table_row(("Stage", "Artifact digest")), "| --- | --- |"]
    lines += [
        table_row((row["stage"], f"sha256:{row['digest']}" if row["digest"] else "none")) for row in report["stages"]
    ]
    lines += [
        "",
        "## Limits",
        "",
        "The figures hold for the machine, prompts and settings above.",
        "Speculation changes speed, not answers: greedy output is the same without it.",
        "",
    ]
    return "\n".join(lines)


def _front_matter(report: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """What the Hub parses: relation to the source model, and each served accuracy as a result."""
    front: dict[str, Any] = {"library_name": "kilotok", "tags": ["fp8", "eagle3", "speculative-decoding"]}
    if origin.startswith("hf://"):
        front["base_model"] = "/".join(origin.removeprefix("hf://").split("/")[:2])
        front["base_model_relation"] = "quantized"
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": task["task"], "type": task["task"]},
            "metrics": [{"type": "accuracy", "value": round(task["served"], 4), "verified": False}],
        }
        for task in (report["accuracy"] or {}).get("tasks", [])
        if task.get("served") is not None and task["task"] != "all"
    ]
    if results and report["verdict"] == "PASS":  # a Hub shows these as the model's figures
        front["model-index"] = [{"name": report["spec"], "results": results}]
    return json.loads(json.dumps(front))


def _spec_value(report: Mapping[str, Any], section: str, name: str) -> str:
    spec = (report["provenance"] or {}).get("spec") or {}
    return str((spec.get(section) or {}).get(name) or "")
