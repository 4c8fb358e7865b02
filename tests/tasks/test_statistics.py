"""The paired test: sizes and power by simulation and by hand, and the record's own table."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.validate import statistics as paired

RUNS = 10_000
MARGIN, ALPHA, POWER = 0.05, 0.05, 0.8


def simulate(n: int, p_gain: float, p_loss: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.random.default_rng(seed).multinomial(n, [p_gain, p_loss, 1 - p_gain - p_loss], size=RUNS)
    return pairs[:, 0], pairs[:, 1]


def pass_rate(n: int, margin: float, p_gain: float, p_loss: float, seed: int = 7) -> float:
    return float(np.mean(paired.p_values(*simulate(n, p_gain, p_loss, seed), n, margin) <= ALPHA))


@pytest.mark.parametrize("n, margin", [(52, 0.05), (64, 0.05), (256, 0.05), (256, 0.02), (1000, 0.02), (3000, 0.01)])
@pytest.mark.parametrize("p_gain", [0.0, 0.01, 0.05, 0.2])
def test_false_passes_at_the_margin_stay_within_alpha(n: int, margin: float, p_gain: float) -> None:
    monte_carlo = 3 * (ALPHA * (1 - ALPHA) / RUNS) ** 0.5
    assert pass_rate(n, margin, p_gain, p_gain + margin) <= ALPHA + monte_carlo


@pytest.mark.parametrize("margin, discordance", [(0.05, 0.06), (0.05, 0.02), (0.02, 0.03), (0.1, 0.1), (0.01, 0.06)])
def test_the_required_problems_have_the_promised_power(margin: float, discordance: float) -> None:
    n = paired.required_problems(margin, ALPHA, POWER, discordance)
    monte_carlo = 3 * (POWER * (1 - POWER) / RUNS) ** 0.5
    assert pass_rate(n, margin, discordance / 2, discordance / 2) >= POWER - monte_carlo


def test_the_exact_p_value_is_the_binomial_one_when_nothing_differs() -> None:
    # With no discordant pair the worst case is p(loss) = margin, p(gain) = 0: nothing lost in n tries.
    assert paired.p_values(0, 0, 64, MARGIN) == pytest.approx(0.95**64, rel=0.02)


def test_the_score_test_alone_would_pass_too_often() -> None:
    assert paired.score_z(0, 0, 52, -MARGIN) > paired.NORMAL.inv_cdf(1 - ALPHA)
    assert 0.95**52 > 0.069
    assert paired.p_values(0, 0, 52, MARGIN) > ALPHA


def test_repeats_of_a_problem_are_not_new_evidence() -> None:
    source = np.ones((10, 8))
    assert paired.compare(source, source, MARGIN, ALPHA, POWER).verdict == "UNDERPOWERED"  # 10 problems, not 80


def test_clustered_false_pass_rate() -> None:
    # The shift is lost to clipping at 1, so the true difference is measured first, and the margin set to it.
    hard = np.random.default_rng(1).beta(0.3, 0.3, size=400_000)
    true_loss = float(np.mean(np.clip(hard, 0, 1) - np.clip(hard - 0.08, 0, 1)))
    rng, passed, runs = np.random.default_rng(5), 0, 1000
    for _ in range(runs):
        p = rng.beta(0.3, 0.3, size=100)
        source = rng.random((100, 4)) < p[:, None]
        served = rng.random((100, 4)) < np.clip(p - 0.08, 0, 1)[:, None]
        passed += paired.compare(source, served, true_loss, ALPHA, POWER).verdict == "PASS"
    assert passed / runs <= ALPHA + 3 * (ALPHA * (1 - ALPHA) / runs) ** 0.5


def test_verdicts() -> None:
    right = np.ones(256)
    assert paired.compare(right, right, MARGIN, ALPHA, POWER).verdict == "PASS"
    broken = right.copy()
    broken[:40] = 0
    assert paired.compare(right, broken, MARGIN, ALPHA, POWER).verdict == "FAIL"
    few = paired.compare(right[:30], right[:30], MARGIN, ALPHA, POWER)
    assert few.verdict == "UNDERPOWERED"
    assert few.samples_needed > 0
    again = np.ones(30 + few.samples_needed)
    assert paired.compare(again, again, MARGIN, ALPHA, POWER).verdict == "PASS"


def test_bounds_and_verdict_agree() -> None:
    for losses in (0, 1, 3, 6, 9, 15):
        served = np.ones(128)
        served[:losses] = 0
        result = paired.compare(np.ones(128), served, MARGIN, ALPHA, POWER)
        assert (result.lower >= -MARGIN) == (result.verdict == "PASS")
        assert result.lower <= result.difference <= result.upper


def test_what_does_not_pair_up_is_refused() -> None:
    with pytest.raises(ValueError, match="pair up"):
        paired.compare(np.ones(5), np.ones(6), MARGIN, ALPHA, POWER)
    with pytest.raises(ValueError, match="NaN"):
        paired.compare(np.ones(5), np.array([1, 1, np.nan, 1, 1]), MARGIN, ALPHA, POWER)


def test_stopping_early_never_changes_the_outcome() -> None:
    """Whatever order the problems come in, what `settled` says is what all of them say."""
    rng, said_early = np.random.default_rng(3), 0
    for p_loss in (0.0, 0.02, 0.1, 0.3):
        served = rng.random(128) < 0.7
        source = np.where(rng.random(128) < p_loss, ~served, served)
        final = paired.compare(source, served, MARGIN, ALPHA, POWER).verdict
        order = np.argsort(served, kind="stable")  # the served model's wrong answers first
        for done in range(1, 129):
            seen, left = order[:done], order[done:]
            gains, losses = (int((served[seen] & ~source[seen]).sum()), int((source[seen] & ~served[seen]).sum()))
            said = paired.settled(
                gains, losses, int(served[left].sum()), int((~served[left]).sum()), 128, MARGIN, ALPHA
            )
            assert said in ("", final)
            said_early += bool(said) and done < 128
    assert said_early > 100


# -- the record: BF16 -> FP8, as published
RECORD = paired.RECORD


def test_a_one_point_threshold_misjudges_the_record() -> None:
    """It calls two of the four a regression; none is further from zero than its own noise, and none proves anything."""
    flagged = [name for name, (_, source, served) in RECORD.items() if source - served > 0.01]
    assert flagged == ["livecodebench", "math500"]
    for n, source, served in RECORD.values():
        z = (served - source) / ((source * (1 - source) + served * (1 - served)) / n) ** 0.5
        assert abs(z) < 0.65


@pytest.mark.parametrize("name", RECORD)
def test_the_record_is_underpowered_at_one_point(name: str) -> None:
    pairs = paired.paired_example(*RECORD[name], 0.06)  # 6% of pairs differ by chance between two precisions
    result = paired.compare(*pairs, 0.01, ALPHA, POWER)
    assert result.verdict == "UNDERPOWERED"
    assert result.samples_needed > 2500


def test_the_planning_formula_gives_the_known_sizes() -> None:
    assert [paired.planning_problems(margin, 0.05, 0.8, 0.06) for margin in (0.01, 0.015, 0.02)] == [3710, 1649, 928]


def test_a_fixed_threshold_flags_equal_models() -> None:
    """Two identical models, 6% discordance, MATH-500: one time in six a 1-point rule cries regression."""
    gains, losses = simulate(500, 0.03, 0.03, seed=11)
    assert np.mean((losses - gains) / 500 > 0.01) > 0.15
