"""The model card of a build: README.md with the front matter a Hub reads, made from receipts and measurements alone.

Refuses claims nobody measured: a figure that is missing reads "not measured", a build that did not pass says so first.
Run it: `python -m tasks.report REPORT_JSON OUT` draws a record again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from tasks.report.findings import findings, source_of, verdict_words
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
    origin = source_of(report)
    front = yaml.safe_dump(_front_matter(report, origin), sort_keys=False, allow_unicode=True)
    lines = ["---", front.rstrip(), "---", "", f"# {clean(report['spec'])}", "", *_opening(report, origin)]
    figures = [(meaning(name), report["metrics"].get(name)) for name in _FIGURES]
    lines += _section(
        "Measured", said["speed"], ("Figure", "Value"), [(m.label, figure(v, m.unit)) for m, v in figures]
    )
    rows = [
        (t["task"], figure(t.get("source"), "%"), figure(t.get("served"), "%"), figure(t.get("difference"), "points"))
        for t in (report["accuracy"] or {}).get("tasks", [])
    ]
    lines += _section("Accuracy", said["accuracy"], ("Task", "Source", "Served", "Difference"), rows)
    lines += _section("Speculation", said["acceptance"]) + _section("Quantization", said["quantization"])
    digests = [(row["stage"], f"sha256:{row['digest']}" if row["digest"] else "none") for row in report["stages"]]
    machine = [
        (name.replace("_", " "), value)
        for name, value in (report["provenance"] or {}).get("machine", {}).items()
        if value not in ("", "none") and name != "host"
    ]
    lines += _section("How it was built", said["provenance"], ("Stage or machine", "Is"), [*digests, *machine])
    lines += _section("Limits", "The figures hold for the machine, prompts and settings above, and for no others.")
    return "\n".join(lines)


def _opening(report: Mapping[str, Any], origin: str) -> list[str]:
    word = verdict_words(report["verdict"])[0]
    warning = [f"> **Not for release.** Verdict: {word}. {clean(report['reason'])}", ""]
    source = f" of {clean(origin.removeprefix('hf://'))}" if origin else ""
    backend = clean(report["settings"].get("backend", "unknown"))
    what = f"FP8 checkpoint{source} with an EAGLE-3 draft, built and measured by kilotok for the `{backend}` engine."
    verdict = f"Verdict of build {clean(report['build'] or 'unnumbered')}: **{word}**. {clean(report['reason'])}"
    return [*(warning if report["verdict"] != "PASS" else []), what, "", verdict, ""]


def _section(title: str, said: str, header: Sequence[str] = (), rows: Sequence[Sequence[str]] = ()) -> list[str]:
    table = [table_row(header), "|" + " --- |" * len(header), *(table_row(row) for row in rows), ""] if rows else []
    return [f"## {title}", "", clean(said), "", *table]


def _front_matter(report: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """What the Hub parses: relation to the source model, and each served accuracy as a result."""
    tags = ["fp8", "eagle3", "speculative-decoding"]
    front: dict[str, Any] = {"library_name": "kilotok", "pipeline_tag": "text-generation", "tags": tags}
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
