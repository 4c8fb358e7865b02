"""Gates: what is missing is never a pass."""

from __future__ import annotations

import math

import pytest

from tasks.validate.gates import judge, passed, unit_of

TPS = "latency.tps_per_user.p50"


@pytest.mark.parametrize(
    "gate, value, state",
    [
        ({"at_least": 1000}, 1000.0, "PASS"),
        ({"at_least": 1000}, 999.9, "FAIL"),
        ({"at_most": 1000}, 1000.0, "PASS"),
        ({"at_most": 1000}, 1000.1, "FAIL"),
        ({"at_least": 1000, "at_most": None}, 1200, "PASS"),
        ({"at_least": 1000, "tolerance": 5}, 996.0, "PASS"),
        ({"at_least": 0}, math.nan, "MISSING"),
        ({"at_most": 1}, math.inf, "MISSING"),
        ({"at_least": 0}, None, "MISSING"),
        ({"at_least": 0}, True, "MISSING"),
        ({"at_least": math.nan}, 1.0, "MISSING"),
    ],
)
def test_a_bound(gate: dict, value: float, state: str) -> None:
    (result,) = judge({TPS: value}, [{"metric": TPS, **gate}])
    assert result.state == state
    assert result.blocks == (state != "PASS")
    assert result.reason


def test_a_metric_that_nobody_measured_blocks() -> None:
    results = judge({}, [{"metric": TPS, "at_least": 0}])
    assert (results[0].state, passed(results)) == ("MISSING", False)


def test_relative_to_the_last_good_build() -> None:
    gate = {"metric": TPS, "at_least": "0.97 of last_good"}
    assert judge({TPS: 970.0}, [gate], {TPS: 1000.0})[0].state == "PASS"
    assert judge({TPS: 969.0}, [gate], {TPS: 1000.0})[0].state == "FAIL"
    assert judge({TPS: 969.0}, [gate], {"other": 1.0})[0].state == "MISSING"
    assert judge({TPS: 969.0}, [gate], {TPS: math.nan})[0].state == "MISSING"


def test_the_first_build_has_nothing_to_compare_with() -> None:
    results = judge({TPS: 5.0}, [{"metric": TPS, "at_least": "0.97 of last_good"}], None)
    assert results[0].state == "FIRST"
    assert passed(results)
    unmeasured = judge({}, [{"metric": TPS, "at_least": "0.97 of last_good"}], None)
    assert unmeasured[0].state == "MISSING"


def test_relative_to_the_baseline_of_the_same_run() -> None:
    gate = {"metric": TPS, "at_least": "4.0 of baseline"}
    assert judge({TPS: 1000.0, "baseline.tps_per_user.p50": 250.0}, [gate])[0].state == "PASS"
    assert judge({TPS: 1000.0, "baseline.tps_per_user.p50": 251.0}, [gate])[0].state == "FAIL"
    assert judge({TPS: 1000.0}, [gate], {"baseline.tps_per_user.p50": 1.0})[0].state == "MISSING"


@pytest.mark.parametrize(
    "gate",
    [
        {"metric": TPS},
        {"metric": TPS, "at_least": 1, "at_most": 2},
        {"at_least": 1},
        {"metric": TPS, "at_least": "fast"},
    ],
)
def test_what_is_not_a_gate_is_refused(gate: dict) -> None:
    with pytest.raises(ValueError, match="gate|neither"):
        judge({TPS: 1.0}, [gate])


@pytest.mark.parametrize(
    "metric, unit",
    [
        (TPS, "tokens/s"),
        ("latency.ttft_ms.p50", ""),
        ("cycle.us", "us"),
        ("cycle.moe_us", "us"),
        ("client.error_percent", "%"),
        ("acceptance.length.code", "tokens/cycle"),
        ("accuracy.code.served", "share"),
    ],
)
def test_units(metric: str, unit: str) -> None:
    assert unit_of(metric) == (unit or "ms")
