"""Steps are found within two nights, noise raises no alarm: by simulation on recorded noise.

Run it: `python -m pytest tests/tasks/nightly/test_detection.py`.
"""

from __future__ import annotations

import math

import pytest

from tasks.nightly.detection import MIN_BEFORE, newest_step, noise
from tests.tasks.nightly.recorded import factors, own_size

LEVEL, NIGHTS, SERIES = 1000.0, 40, 30
EXCLUSIVE = 0.005  # of one night on a node that nobody shares
STEP = 0.97


def nights(count: int, seed: int, size: float | None = None, step_at: int = -1, by: float = STEP) -> list[list[float]]:
    """A series on recorded noise, with a step if asked."""
    return [
        [LEVEL * value * (by if 0 <= step_at <= at else 1.0) for value in runs]
        for at, runs in enumerate(factors(count, seed, size))
    ]


def false_alarms(size: float | None) -> int:
    """Series, of SERIES, in which any of the NIGHTS mornings would have seen a step where there is none."""
    found = 0
    for seed in range(SERIES):
        series = nights(NIGHTS, seed, size)
        found += any(newest_step(series[:end]) for end in range(MIN_BEFORE, NIGHTS + 1))
    return found


@pytest.mark.parametrize("size", [None, EXCLUSIVE], ids=["as recorded", "of an exclusive node"])
def test_noise_raises_no_alarm(size: float | None) -> None:
    assert false_alarms(size) <= 2  # of 30 series of 40 nights: less than one false alarm a year and figure


def test_a_step_of_three_percent_is_found_on_its_second_night() -> None:
    found = [newest_step(nights(22, seed, EXCLUSIVE, step_at=20)) for seed in range(SERIES)]
    hits = [step for step in found if step and step.at in (19, 20) and step.change < 0]
    assert len(hits) >= 0.9 * SERIES
    assert sum(step.low <= STEP - 1 <= step.high for step in hits) >= 0.9 * len(hits)


def test_on_the_recording_machine_a_step_of_seven_times_its_noise_is_found() -> None:
    """3 % is out of reach where a night differs by more: the noise decides, and the step that is found follows it."""
    by = math.exp(-7 * own_size())
    found = [newest_step(nights(22, seed, None, step_at=20, by=by)) for seed in range(SERIES)]
    assert sum(bool(step and step.at in (19, 20)) for step in found) >= 0.9 * SERIES


def test_one_outlier_is_no_step() -> None:
    series = nights(20, 1, EXCLUSIVE)
    series[19] = [700.0, 702.0]
    assert newest_step(series) is None


def test_one_bad_night_in_the_middle_is_no_step() -> None:
    series = nights(20, 1, EXCLUSIVE)
    series[12] = [700.0, 702.0]
    assert newest_step(series) is None


def test_a_step_up_has_its_sign() -> None:
    step = newest_step(nights(24, 3, EXCLUSIVE, step_at=20, by=1.05))
    assert step and 0 < step.low < step.change < step.high


def test_figures_that_repeat_exactly_still_have_steps() -> None:
    step = newest_step([[2.75]] * 10 + [[2.60]] * 2)
    assert step and step.at == 10 and step.change == pytest.approx(2.60 / 2.75 - 1)


def test_shares_around_zero_are_compared_in_points() -> None:
    step = newest_step([[0.0]] * 10 + [[-0.05]] * 2)
    assert step and not step.relative and step.change == pytest.approx(-0.05)


def test_less_than_a_percent_is_not_told() -> None:
    assert newest_step([[1000.0]] * 10 + [[995.0]] * 3) is None


def test_too_few_nights_say_nothing() -> None:
    assert newest_step([[1000.0]] * 4 + [[500.0]] * 2) is None


def test_noise_is_not_inflated_by_a_step() -> None:
    assert noise([[0.0]] * 10 + [[1.0]] * 10) < 0.01


def test_noise_sees_what_differs_between_runs_of_one_night() -> None:
    assert noise([[0.0, 0.1]] * 10) == pytest.approx(0.05)
