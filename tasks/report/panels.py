"""The small drawings, made to stand side by side: acceptance by position, distributions, a training curve, gate bars.

Refuses axes that differ between panels that are compared. Each is narrow enough for two to fit on a phone.
Run it: `python -m tasks.report REPORT_JSON OUT` draws a page again from its record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.report.svg import Canvas, linear, ticks, width_of
from tasks.report.words import three

OUTLIER = 1.0  # widths of the middle four fifths beyond which a value no longer stretches the axis


def acceptance(entry: Mapping[str, Any], everything: Mapping[str, Any] | None, width: float) -> str:
    """Chance that draft token i is accepted when the one before it was; all domains behind, golden dashed."""
    points, height = entry["positions"], 140.0
    last = max(point["position"] for point in points)
    x, y = linear(1, max(last, 2), 40, width - 24), linear(0, 1, height - 22, 12)
    art = Canvas(width, height, f"Acceptance by position, {entry['domain']}")
    for share in (0, 0.5, 1):
        art.line(30, y(share), width - 4, y(share), "grid")
        art.text(25, y(share) + 4, f"{100 * share:.0f}", "tick", "end")
    for point in points:
        art.text(x(point["position"]), height - 6, str(point["position"]), "tick", "middle")
    compared: dict[int, float] = {}
    if everything is not None and everything is not entry:
        compared = {point["position"]: point["rate"] for point in everything["positions"]}
        art.path([(x(at), y(rate)) for at, rate in compared.items()], "series s-faint", "all domains")
    if entry.get("golden"):
        golden = dict(enumerate(entry["golden"][:last], 1))
        art.path([(x(at), y(rate)) for at, rate in golden.items()], "series s-golden", "golden curve")
        compared = {at: max(rate, compared.get(at, 0.0)) for at, rate in golden.items()}
    art.path([(x(point["position"]), y(point["rate"])) for point in points], "series s-draft")
    for point in points:
        _rate(art, point, x(point["position"]), y, under=compared.get(point["position"], 0.0) > point["rate"] + 0.005)
    return art.svg()


def _rate(art: Canvas, point: Mapping[str, Any], px: float, y: Any, under: bool) -> None:
    """A dot with its whisker; the figure goes to the side where no other line runs."""
    tip = f"draft token {point['position']}: {100 * point['rate']:.1f} %"
    if point.get("low") is not None:
        tip += f" ({100 * point['low']:.1f} to {100 * point['high']:.1f} %, {point['drafted']:,} drafted)"
        art.line(px, y(point["low"]), px, y(point["high"]), "whisker", tip)
    art.dot(px, y(point["rate"]), 3.5, "dot f-draft", tip)
    art.text(px, y(point["rate"]) + (17 if under else -8), f"{100 * point['rate']:.0f}", "small strong", "middle")


def histogram(series: Mapping[str, Any], width: float, height: float = 124) -> str:
    """Counts per bin; the median and the bad tail are drawn as lines. What lies far out is counted in the end bins: one
    value must not press all others into a single bar."""
    far = OUTLIER * ((series["p90"] - series["p10"]) or abs(series["p50"]) or 1.0)
    values = [min(max(value, series["p10"] - far), series["p90"] + far) for value in series["values"]]
    low, high = min(values), max(values)
    bins = max(6, min(24, round(2 * len(values) ** 0.5)))
    span = (high - low) or abs(low) * 0.1 or 1.0
    low, high = low - 0.02 * span, high + 0.02 * span
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    x, y = linear(low, high, 4, width - 4), linear(0, max(counts), height - 22, 22)
    art = Canvas(width, height, f"{series['label']}: distribution over {len(values)} requests")
    step = (width - 8) / bins
    for at, count in enumerate(counts):
        if count:
            start, end = (low + edge * (high - low) / bins for edge in (at, at + 1))
            tip = f"{three(start)} to {three(end)} {series['unit']}: {count}"
            art.rect(4 + at * step, y(count), step - 1, height - 22 - y(count), "f-soft", tip, 1)
    art.line(4, height - 22, width - 4, height - 22, "base")
    for tick in ticks(low, high, 4):
        words = f"{tick:,g}"
        half = width_of(words, 11) / 2
        art.text(min(max(x(tick), half), width - half), height - 7, words, "tick", "middle")
    tail = series["p10"] if series["better"] > 0 else series["p90"]
    art.line(
        x(series["p50"]),
        18,
        x(series["p50"]),
        height - 22,
        "mark-mid",
        f"median {three(series['p50'])} {series['unit']}",
    )
    art.line(x(tail), 14, x(tail), height - 22, "mark-tail", f"slowest tenth {three(tail)} {series['unit']}")
    words = f"slowest tenth {three(tail)}"
    right = x(tail) + len(words) * 6 < width
    art.text(x(tail) if right else width - 4, 10, words, "small halo", "start" if right else "end")
    return art.svg()


def curve(points: Sequence[Mapping[str, float]], width: float = 228, height: float = 110) -> str:
    """Loss against step."""
    steps, losses = [point["step"] for point in points], [point["loss"] for point in points]
    x, y = linear(min(steps), max(steps), 30, width - 8), linear(0, max(losses) * 1.05, height - 20, 8)
    art = Canvas(width, height, "Training loss of the draft")
    for tick in ticks(0, max(losses), 3):
        art.line(30, y(tick), width - 8, y(tick), "grid")
        art.text(25, y(tick) + 4, f"{tick:g}", "tick", "end")
    for tick in ticks(min(steps), max(steps), 3):
        art.text(x(tick), height - 5, f"{tick:,.0f}", "tick", "middle")
    art.path([(x(step), y(loss)) for step, loss in zip(steps, losses, strict=True)], "series s-draft")
    art.dot(x(steps[-1]), y(losses[-1]), 3.5, "dot f-draft", f"step {steps[-1]:,.0f}: loss {three(losses[-1])}")
    art.text(x(steps[-1]) - 4, y(losses[-1]) - 8, three(losses[-1]), "small strong", "end")
    return art.svg()


def gate_bar(gate: Mapping[str, Any], width: float = 76) -> str:
    """Where the figure stands: a shaft from zero to the measured value, a tick at what was asked for."""
    measured, required = gate["measured"], gate["required"]
    if measured is None or not required or measured < 0 or required < 0:
        return ""
    x = linear(0, 2, 0, width)
    share = min(measured / required, 2)
    art = Canvas(width, 14, f"{measured / required:.2f} times what was asked for")
    art.rect(0, 4.5, width, 5, "f-track", radius=2.5)
    art.rect(
        0,
        4.5,
        x(share),
        5,
        "f-good" if gate["verdict"] == "PASS" else "f-bad",
        f"{measured / required:.2f} x what was asked for",
        2.5,
    )
    art.line(x(1), 0.5, x(1), 13.5, "asked", "what was asked for")
    return art.svg("gatebar")


def trend(values: Sequence[float | None], width: float = 150, height: float = 34, limit: float | None = None) -> str:
    """A sparkline over builds, oldest first; gaps are builds that measured nothing."""
    known = [value for value in values if value is not None] + ([limit] if limit is not None else [])
    if not known:
        return ""
    low, high = min(known), max(known)
    x, y = linear(0, max(1, len(values) - 1), 4, width - 6), linear(low, high, height - 6, 6)
    art = Canvas(width, height, f"{len(values)} builds")
    if limit is not None:
        art.line(0, y(limit), width, y(limit), "limit", f"asked: {three(limit)}")
    segment: list[tuple[float, float]] = []
    for at, value in enumerate([*values, None]):
        if value is not None:
            segment.append((x(at), y(value)))
        elif segment:
            art.path(segment, "series s-verify")
            segment = []
    for at, value in enumerate(values):
        if value is not None:
            art.dot(x(at), y(value), 3 if at == len(values) - 1 else 1.8, "f-verify", three(value))
    return art.svg()
