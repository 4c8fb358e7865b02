"""How figures and metric names read."""

from __future__ import annotations

import math

import pytest

from tasks.report import words


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1038.4, "tokens/s", "1,038 tokens/s"),
        (2.613, "tokens", "2.61 tokens"),
        (0.8766, "%", "87.7 %"),
        (-0.0123, "points", "\N{MINUS SIGN}1.2 pt"),
        (0.00001, "points", "0.0 pt"),
        (2401.0, "us", "2.40 ms"),
        (71.4, "s", "71.4 s"),
        (245.0, "s", "4 min 05 s"),
        (14.2e6, "bytes", "13.5 MiB"),
        (0.0, "ms", "0 ms"),
        (None, "ms", "not measured"),
        (math.nan, "%", "not measured"),
        (math.inf, "", "not measured"),
        (True, "", "not measured"),
        ("PASS", "", "not measured"),
    ],
)
def test_figures(value: object, unit: str, text: str) -> None:
    assert words.figure(value, unit) == text


@pytest.mark.parametrize(
    ("metric", "label", "better"),
    [
        ("latency.tps_per_user.p50", "Median speed for one user", 1),
        ("latency.tps_per_user.code.p50", "Median speed for one user in code", 1),
        ("latency.ttft_ms.p99", "Time to first token, 99th percentile", -1),
        ("acceptance.length.code", "Tokens per cycle in code", 1),
        ("acceptance.position.2", "Draft token 2 accepted", 1),
        ("accuracy.gpqa_diamond.served", "Accuracy of gpqa diamond, served model", 1),
        ("accuracy.difference", "Accuracy, served minus source", 1),
        ("cycle.lm_head_us", "Cycle: lm head", -1),
        ("somebodys.own_metric", "somebodys.own metric", 0),
    ],
)
def test_metric_names_in_words(metric: str, label: str, better: int) -> None:
    found = words.meaning(metric)
    assert (found.label, found.better) == (label, better)


def test_a_range_names_its_unit_once() -> None:
    assert words.between(270, 420, "tokens/s") == "270 to 420 tokens/s"
    assert words.between(900, 1200, "us") == "900 µs to 1.20 ms"


def test_lists_are_cut_with_a_count() -> None:
    assert words.listed(["a"]) == "a" and words.listed(["a", "b", "c"]) == "a, b and c"
    assert words.listed(list("abcde")) == "a, b, c and 2 more"
