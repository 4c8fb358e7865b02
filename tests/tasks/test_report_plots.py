"""Drawings: well-formed at any input that a build can produce, and free of overlaps where labels are placed."""

from __future__ import annotations

import xml.etree.ElementTree as xml

import pytest

from tasks.report import panels, plots, svg


def texts(drawing: str) -> list[str]:
    return [node.text or "" for node in xml.fromstring(drawing).iter("text")]


@pytest.mark.parametrize("width", [plots.WIDE, plots.NARROW])
@pytest.mark.parametrize("speed", [0.3, 38.0, 1200.0, 40_000.0])
def test_both_record_marks_are_drawn_wherever_the_build_is(width: float, speed: float) -> None:
    points = [{"profile": "p", "users": 1, "tps_user": speed, "tps_server": speed}]
    words = texts(plots.pareto({"points": points, "baseline": speed / 3}, width))
    assert "record 1,038" in words and "record 72,000" in words


def test_points_stay_inside_the_drawing() -> None:
    points = [{"profile": "p", "users": u, "tps_user": 900.0 / u, "tps_server": 900.0} for u in (1, 8, 64)]
    tree = xml.fromstring(plots.pareto({"points": points, "baseline": None}, plots.NARROW))
    dots = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in tree.iter("circle")]
    assert len(dots) == 3 and all(0 < x < plots.NARROW and 0 < y < 340 for x, y in dots)


def test_each_bar_of_the_waterfall_starts_where_the_last_ended() -> None:
    parts = [{"name": name, "group": "verify", "us": us} for name, us in (("a", 10.0), ("b", 30.0), ("c", 60.0))]
    bars = [
        (float(bar.attrib["x"]), float(bar.attrib["width"]))
        for bar in xml.fromstring(plots.waterfall({"parts": parts, "total_us": 100.0}, plots.WIDE)).iter("rect")
    ]
    assert all(abs(x + width - after) < 0.3 for (x, width), (after, _) in zip(bars, bars[1:], strict=False))


def test_many_small_parts_are_drawn_as_one() -> None:
    parts = [{"name": f"op{at}", "group": "verify", "us": float(at + 1)} for at in range(40)]
    words = texts(plots.waterfall({"parts": parts, "total_us": 820.0}, plots.WIDE))
    assert "27 smaller" in words and "op39" in words and "op0" not in words


def test_equal_values_make_a_distribution_too() -> None:
    series = {"label": "x", "unit": "ms", "better": -1, "values": [5.0] * 3, "p10": 5.0, "p50": 5.0, "p90": 5.0}
    xml.fromstring(panels.histogram(series, 228))


def test_one_layer_and_one_kind_can_be_drawn() -> None:
    rows = [{"layer": 0, "kind": "weight", "sqnr_db": 30.0, "name": "<odd & name>"}]
    xml.fromstring(plots.layer_noise({"layers": rows}, plots.NARROW))


def test_accuracy_without_a_margin_or_interval_can_be_drawn() -> None:
    xml.fromstring(plots.differences({"tasks": [{"task": "t", "difference": 0.0}], "margin": None}, plots.WIDE))


def test_one_draft_token_can_be_drawn() -> None:
    entry = {
        "domain": "code",
        "golden": [0.8],
        "positions": [{"position": 1, "rate": 0.7, "low": None, "high": None, "drafted": 0}],
    }
    assert "70" in texts(panels.acceptance(entry, None, 170))


def test_a_gate_without_figures_has_no_bar() -> None:
    assert panels.gate_bar({"measured": None, "required": 5, "verdict": "MISSING"}) == ""


def test_a_gap_in_a_trend_stays_a_gap() -> None:
    paths = list(xml.fromstring(panels.trend([1.0, 2.0, None, 3.0, 4.0])).iter("path"))
    assert len(paths) == 2


def test_crowded_labels_are_pushed_apart_and_kept_inside() -> None:
    placed = svg.spread([50.0, 51.0, 99.0, 52.0], 14, 0, 100)
    ordered = sorted(placed)
    assert all(b - a >= 14 - 1e-9 for a, b in zip(ordered, ordered[1:], strict=False)) and max(placed) <= 100


@pytest.mark.parametrize(("low", "high"), [(0, 8.02), (0.031, 0.034), (-6.5, 0.8), (0, 1e6), (3, 3)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    found = svg.ticks(low, high, 5)
    assert 1 <= len(found) <= 7 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)


def test_text_in_drawings_is_escaped() -> None:
    art = svg.Canvas(10, 10, '"<label>')
    art.text(0, 0, "<script>")
    art.dot(1, 1, 1, "dot", "</title><script>")
    assert "<script>" not in art.svg() and xml.fromstring(art.svg()) is not None


def test_one_value_far_out_does_not_press_the_others_into_a_bar() -> None:
    values = [*(10_000.0 + 100 * at for at in range(20)), 300_000.0]
    series = {
        "label": "Speed",
        "unit": "tokens/s",
        "better": 1,
        "values": values,
        "p50": 11e3,
        "p10": 10.2e3,
        "p90": 11.8e3,
    }
    drawing = panels.histogram(series, 228)
    assert drawing.count("<rect") >= 5 and "300,000" not in drawing
