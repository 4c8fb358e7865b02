"""The report as Markdown, for Git, Slack and Prefect's artifacts: verdict, gates, figures, changes, time.

Refuses HTML and drawings: what needs a picture is one sentence here.
Run it: `python -m tasks.report REPORT_JSON OUT` draws a record again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.report.findings import delta_words, findings, verdict_words
from tasks.report.words import figure, money, seconds, signed, size


def render(report: Mapping[str, Any]) -> str:
    """The whole text."""
    said = findings(report)
    word, _, glyph = verdict_words(report["verdict"])
    build = f", build {clean(report['build'])}" if report["build"] else ""
    lines = [
        f"# {glyph} {word}: {clean(report['spec'])}{build}",
        "",
        clean(report["reason"]),
        "",
        *_causes(report),
        clean(said["speed"]),
        "",
    ]
    lines += _section(
        "Gates",
        "" if report["gates"] else said["gates"],
        ("Gate", "Measured", "Required", "Margin", "Verdict"),
        [_gate(gate) for gate in report["gates"]],
    )
    lines += [f"- {clean(text)}" for text in report["remarks"]] + ([""] if report["remarks"] else [])
    moved = (report["changes"] or {}).get("metrics", [])[:8]
    changes = [
        (row["label"], figure(row["before"], row["unit"]), figure(row["after"], row["unit"]), delta_words(row))
        for row in moved
    ]
    lines += _section("What changed", said["changes"], ("Figure", "Then", "Now", "Change"), changes)
    lines += [
        f"- {clean(row['stage'])}: {clean(row['what'])}" for row in (report["changes"] or {}).get("inputs", [])[:12]
    ]
    lines += [""] if lines[-1] else []
    lines += _section("One cycle", said["cycle"])
    lines += _section("Acceptance", said["acceptance"], *_acceptance(report))
    lines += _section(
        "Accuracy", said["accuracy"], ("Task", "Source", "Served", "Difference", "Verdict"), _accuracy(report)
    )
    for name, title in (("quantization", "Quantization"), ("latency", "Latency")):
        lines += _section(title, said[name])
    stages = [
        (
            row["stage"],
            row["state"],
            seconds(row["seconds"]),
            size(row["size_bytes"]) if row["size_bytes"] else "",
            "" if row.get("cost") is None else money(row["cost"], row["currency"]),
            row["reason"],
        )
        for row in report["stages"]
    ]
    lines += _section("Time and cost", said["stages"], ("Stage", "State", "Time", "Size", "Cost", "Why"), stages)
    lines += _section("Predicted and actual", said["prediction"])
    lines += _section("Provenance", said["provenance"])
    return "\n".join(lines).rstrip() + "\n"


def _causes(report: Mapping[str, Any]) -> list[str]:
    said = [[clean(row[name]) for name in ("cause", "evidence", "fix")] for row in report.get("causes") or ()]
    return [line for cause, *rest in said for line in (f"**Likely cause:** {cause}. {'. '.join(rest)}.", "")]


def _gate(gate: Mapping[str, Any]) -> tuple[str, ...]:
    sign = {"at_least": "≥ ", "at_most": "≤ "}.get(gate["op"], "")
    if gate["margin"] is None:
        margin = ""
    elif gate["unit"] in ("%", "points"):
        margin = f"{signed(100 * gate['margin'], 1)} pt"
    else:
        margin = (
            f"{signed(100 * gate['margin_share'], 1)} %"
            if gate["margin_share"] is not None
            else signed(gate["margin"], 2)
        )
    word, _, glyph = verdict_words(gate["verdict"])
    asked = sign + figure(gate["required"], gate["unit"]) if gate["required"] is not None else gate["asked"]
    return (gate["label"], figure(gate["measured"], gate["unit"]), asked, margin, f"{glyph} {word}")


def _acceptance(report: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    domains = (report["acceptance"] or {}).get("domains", [])
    last = max((point["position"] for entry in domains for point in entry["positions"]), default=0)
    rows = []
    for entry in domains:
        by_position = {point["position"]: figure(point["rate"], "%") for point in entry["positions"]}
        rows.append((entry["domain"], figure(entry["length"]), *(by_position.get(at, "") for at in range(1, last + 1))))
    return ("Domain", "Tokens per cycle", *(f"Token {at}" for at in range(1, last + 1))), rows


def _accuracy(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    tasks = (report["accuracy"] or {}).get("tasks", [])
    return [
        (
            task["task"],
            figure(task.get("source"), "%"),
            figure(task.get("served"), "%"),
            figure(task.get("difference"), "points"),
            verdict_words(str(task["verdict"]).upper())[0] if task.get("verdict") else "not judged",
        )
        for task in tasks
    ]


def _section(title: str, said: str, header: Sequence[str] = (), rows: Sequence[Sequence[str]] = ()) -> list[str]:
    lines = [f"## {title}", ""]
    lines += [clean(said), ""] if said else []
    if rows:
        lines += [table_row(header), "|" + " --- |" * len(header), *(table_row(row) for row in rows), ""]
    return lines


def table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(clean(cell) for cell in cells) + " |"


def clean(text: Any) -> str:
    """One line that cannot break a table or open a tag."""
    flat = " ".join(str(text).split())
    for char in "\\`<>|[]":
        flat = flat.replace(char, f"\\{char}" if char not in "<>" else {"<": "&lt;", ">": "&gt;"}[char])
    return flat.replace(" -&gt; ", " \N{RIGHTWARDS ARROW} ")
