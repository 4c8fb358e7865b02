"""The report as one HTML page that asks nobody for anything: style inside, drawings inside, no script.

Refuses raw text: the template escapes everything that is not a drawing. Its Content-Security-Policy forbids requests.
Run it: `python -m tasks.report REPORT_JSON OUT` draws a page again from its record.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from tasks.report import panels, plots, words
from tasks.report.findings import delta_words, findings, verdict_words

HERE = Path(__file__).parent
SECTIONS = (
    ("gates", "Gates"),
    ("changes", "What changed"),
    ("speed", "Speed"),
    ("cycle", "One cycle"),
    ("acceptance", "Acceptance"),
    ("accuracy", "Accuracy"),
    ("quantization", "Quantization"),
    ("latency", "Latency"),
    ("stages", "Time and cost"),
    ("prediction", "Predicted and actual"),
    ("provenance", "Provenance"),
)


@cache
def environment() -> Environment:
    """Jinja with escaping on and undefined names as errors."""
    env = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters.update(
        figure=words.figure,
        three=words.three,
        seconds=words.seconds,
        size=words.size,
        micros=words.micros,
        money=words.money,
        meaning=words.meaning,
        delta=delta_words,
        verdict=verdict_words,
        signed=words.signed,
        number=words.as_number,
        listed=words.listed,
        plural=words.count,
        between=words.between,
        arrows=_arrows,
        tight=_tight,
        breakable=_breakable,
        named=_named,
        sentence=_sentence,
    )
    env.globals["style"] = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    return env


_UNIT = re.compile(r"(?<=\d) (?=(?:%|tokens/s|tokens|ms|µs|s|pt|dB|points)\b|%)")


def _tight(text: str) -> str:
    """A figure and its unit stay on one line."""
    return _UNIT.sub("\N{NO-BREAK SPACE}", text)


def _sentence(text: str) -> str:
    """Begins with a capital."""
    return text[:1].upper() + text[1:]


def _arrows(text: str) -> str:
    return text.replace(" -> ", " \N{RIGHTWARDS ARROW} ")


def _breakable(name: str) -> Markup:
    """A dotted name that may break after a dot or underscore and nowhere else."""
    return Markup(str(escape(name)).replace(".", ".<wbr>").replace("_", "_<wbr>"))


def _named(name: str) -> str:
    """A key as a label: cpu_isa -> CPU ISA."""
    return " ".join(part.upper() if part in ("cpu", "gpu", "isa") else part for part in name.split("_"))


def render(report: Mapping[str, Any]) -> str:
    """The page of one build."""
    said = findings(report)
    template = environment().get_template("page.html.jinja")
    return template.render(
        r=report, said=said, sections=SECTIONS, art=_drawings(report), groups=_groups(report), head=_hero(report)
    )


def _drawings(report: Mapping[str, Any]) -> dict[str, Any]:
    """Every drawing by name; None where there is nothing to draw, and the template says so."""
    cycle, accepted, accurate = report["cycle"], report["acceptance"], report["accuracy"]
    noise, spread, draft = report["quantization"], report["latency"], report["draft"]
    art: dict[str, Any] = {
        "pareto": None,
        "cycle": None,
        "strip": None,
        "differences": None,
        "layers": None,
        "curve": None,
    }
    if report["pareto"]:
        art["pareto"] = plots.responsive(lambda width: plots.pareto(report["pareto"], width))
    if cycle and cycle["parts"]:
        art["cycle"] = plots.responsive(lambda width: plots.waterfall(cycle, width))
        art["strip"] = plots.responsive(lambda width: plots.group_strip(cycle, width))
    if accurate and any(task.get("difference") is not None for task in accurate["tasks"]):
        art["differences"] = plots.responsive(lambda width: plots.differences(accurate, width))
    if noise and noise["layers"]:
        art["layers"] = plots.responsive(lambda width: plots.layer_noise(noise, width))
    if draft and len(draft["curve"]) > 1:
        art["curve"] = panels.curve(draft["curve"])
    drawings: dict[str, Any] = {name: Markup(svg) if svg else None for name, svg in art.items()}
    domains = accepted["domains"] if accepted else []
    whole = next((entry for entry in domains if entry["domain"] == "all"), None)
    domains = sorted(domains, key=lambda entry: entry is not whole)  # what all others are compared with comes first
    drawings["acceptance"] = [(entry, _domain(entry, whole)) for entry in domains]
    drawings["latency"] = [(series, _distribution(series)) for series in (spread["series"] if spread else [])]
    drawings["gates"] = [Markup(panels.gate_bar(gate)) for gate in report["gates"]]
    return drawings


def _domain(entry: Mapping[str, Any], whole: Mapping[str, Any] | None) -> Markup:
    return Markup(plots.responsive(lambda width: panels.acceptance(entry, whole, width), 228, 170))


def _distribution(series: Mapping[str, Any]) -> Markup:
    return Markup(plots.responsive(lambda width: panels.histogram(series, width), 228, 340))


def _groups(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The four groups of a cycle with their sums, in order."""
    cycle = report["cycle"]
    sums: dict[str, float] = {}
    for part in cycle["parts"] if cycle else []:
        sums[part["group"]] = sums.get(part["group"], 0.0) + part["us"]
    total = sum(sums.values()) or 1.0
    return [{"name": name, "us": us, "share": us / total} for name, us in sums.items()]


def _hero(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The equation at the top: speed, tokens per cycle, cycle time, each with its movement since then."""
    moved = {row["metric"]: row for row in (report["changes"] or {}).get("metrics", [])}
    head = report["headline"]
    terms = (
        ("tps_per_user", "latency.tps_per_user.p50", "tokens/s for one user", ""),
        ("acceptance_length", "acceptance.length", "tokens per cycle", ""),
        ("cycle_us", "cycle.us", "per cycle", "us"),
    )
    return [
        {
            "value": words.figure(head[name], unit),
            "known": head[name] is not None,
            "label": label,
            "moved": moved.get(metric),
        }
        for name, metric, label, unit in terms
    ]
