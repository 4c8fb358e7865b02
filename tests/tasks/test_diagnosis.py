"""Causes: each signal names its own, and where nothing stands out nothing is named. The whole thing on real faults:
test_planted_faults.py."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tasks.acceptance import acceptance_frame, golden_gap
from tasks.validate.diagnosis import diagnose
from tasks.validate.probe import DraftFit, ScaleError, _fit, nearby

ACCEPTANCE = {"acceptance.length"}
FITS = DraftFit((1, 3, 4), 0.8, (1, 3, 5), 0.8, -0.02, 0.99)
GOOD = {"acceptance.length": 3.0, "cycle.us": 500.0, "cycle.moe_us": 200.0, "cycle.outside_us": 20.0}


def causes(*given: object, **more: object) -> list[str]:
    return [cause.cause for cause in diagnose(*given, **more)]  # type: ignore[arg-type]


def test_a_wrong_scale_is_named_down_to_the_expert() -> None:
    scales = [ScaleError("layers.1.experts.down_proj, expert 2", 2.0), ScaleError("layers.0.q_proj.weight", 1.003)]
    (cause,) = diagnose({"accuracy.difference"}, {}, scales)
    assert "layers.1.experts.down_proj, expert 2 is wrong by a factor of 2.00" in cause.cause
    assert "every other weight agrees" in cause.evidence
    assert not diagnose({"accuracy.difference"}, {}, scales[1:])


@pytest.mark.parametrize(
    "fit, first, words",
    [
        (DraftFit((2, 4, 5), 0.1, (1, 3, 4), 0.7, 1.3, 0.99), 0.1, "wrong layers: it captures [2, 4, 5]"),
        (DraftFit((1, 3, 4), 0.1, (1, 3, 5), 0.12, 0.4, 0.02), 0.1, "another checkpoint"),
        (FITS, 0.2, "does not get out of the draft"),
        (DraftFit((1, 3, 4), 0.4, (1, 3, 5), 0.4, -0.1, 0.99), 0.4, "learnt too little"),
    ],
)
def test_a_draft_that_falls_short(fit: DraftFit, first: float, words: str) -> None:
    (cause,) = causes(ACCEPTANCE, {"acceptance.position.1": first}, (), fit)
    assert words in cause
    assert not diagnose({"latency.failed_requests"}, {}, (), fit)  # acceptance is not what failed


def test_a_slower_build_is_split_into_draft_engine_and_outside() -> None:
    failed = {"latency.tps_per_user.p50"}
    assert causes(failed, {**GOOD, "acceptance.length": 2.0}, last_good=GOOD) == ["the draft is accepted less"]
    slower = {**GOOD, "cycle.us": 800.0, "cycle.moe_us": 480.0, "forced.cycle_us": 800.0}
    (cause,) = diagnose(failed, slower, last_good={**GOOD, "forced.cycle_us": 500.0})
    assert cause.cause == "the engine's cycle is slower"
    assert "at forced acceptance" in cause.evidence and "most of it in moe" in cause.evidence
    assert causes(failed, {**GOOD, "cycle.outside_us": 220.0}, last_good=GOOD) == [
        "more time passes outside the engine"
    ]
    assert not diagnose(failed, {**GOOD, "cycle.us": 510.0}, last_good=GOOD)
    assert not diagnose(failed, {**GOOD, "cycle.us": 900.0})  # nothing to compare with


def read(*losses: np.ndarray) -> np.ndarray:
    return np.stack([np.stack([loss < 0.5, loss]) for loss in losses])


def test_a_better_capture_is_believed_beyond_noise_only() -> None:
    rng = np.random.default_rng(0)
    loss = rng.exponential(1.0, 2000)
    tried = [(1, 3, 4), (2, 4, 5), (0, 2, 3)]
    small = _fit(tried[0], tried, read(loss, loss - 0.05 + rng.normal(0, 0.3, 2000), loss + 1), 0.99)
    assert small.best_layers == (2, 4, 5)
    assert 0 < small.gain_nats < 0.05
    chance = _fit(tried[0], tried, read(loss, loss + rng.normal(0, 0.3, 2000), loss + 1), 0.99)
    assert chance.gain_nats < 0


def test_of_captures_that_fit_as_well_the_likeliest_mistake_is_named() -> None:
    rng = np.random.default_rng(0)
    loss = rng.exponential(1.0, 2000)
    tried = [(1, 3, 4), (2, 4, 5), (1, 3, 5)]
    better = loss - 0.2 + rng.normal(0, 0.3, 2000)
    level = _fit(tried[0], tried, read(loss, better, better - 0.001 + rng.normal(0, 0.1, 2000)), 0.99)
    assert level.best_layers == (2, 4, 5)
    clearly = _fit(tried[0], tried, read(loss, better, better - 0.2), 0.99)
    assert clearly.best_layers == (1, 3, 5)


def test_captures_tried_nearby_stay_inside_the_model() -> None:
    tried = nearby((0, 2, 3), 5)
    assert tried[0] == (0, 2, 3)
    assert (1, 3, 4) in tried and (0, 1, 3) in tried
    assert all(0 <= layer < 5 for layers in tried for layer in layers)


# -- golden curves
def counted(cycles: int, *accepted: int) -> dict[str, object]:
    return {"cycles": cycles, "accepted_by_position": list(accepted)}


def test_a_golden_curve_is_missed_beyond_noise_only() -> None:
    golden = {"code": (0.83, 0.75, 0.79)}
    on_curve = acceptance_frame([("code", counted(1000, 830, 622, 491))], 3)
    assert golden_gap(on_curve, golden)[0] < 0
    gap, where = golden_gap(acceptance_frame([("code", counted(1000, 830, 415, 328))], 3), golden)
    assert gap == pytest.approx(0.25, abs=0.03)
    assert where == "position 2 of code"
    few = acceptance_frame([("code", counted(10, 7, 5, 4))], 3)
    assert golden_gap(few, golden)[0] < 0.05  # ten cycles prove nothing against it


def test_a_curve_of_a_domain_that_was_not_measured_is_no_pass() -> None:
    gap, where = golden_gap(acceptance_frame([("code", counted(10, 7, 5, 4))], 3), {"math": (0.8,)})
    assert math.isnan(gap)
    assert where == "position 1 of math"
