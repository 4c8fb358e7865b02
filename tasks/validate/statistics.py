"""Paired non-inferiority: is the served model at most `margin` worse than its source, problem by problem?

Per problem the pair is (source right?, served right?). Only discordant pairs carry information: `gains` (served alone
right) and `losses` (source alone right). H0: served - source <= -margin; PASS means H0 was rejected at one-sided
`alpha`.

  statistic   Tango's score statistic for a paired difference (Statist. Med. 17:891, 1998): its variance is estimated
              under H0, so it stays sound when hardly any pair is discordant, where Wald intervals collapse to zero
  p-value     exact unconditional for n <= EXACT_LIMIT (supremum over the nuisance parameter; the score test alone
              passes 6.9% of bad models at n=52, margin 5 points), above that the score test, guarded at the sparse end
  repeats     sampled several times, a problem is one cluster: repeats of one problem are not new evidence.

It refuses a fixed threshold on the difference of two accuracies: on 200 problems, 1 point is noise.

Run: `python -m tasks.validate.statistics` judges the record's own table; tests in tests/tasks/test_statistics.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np

Verdict = Literal["PASS", "FAIL", "UNDERPOWERED"]
NORMAL = NormalDist()
EXACT_LIMIT = 400  # problems; the exact table has n^2/2 outcomes x NUISANCE_POINTS
NUISANCE_POINTS = 48
CLUSTER_MINIMUM = 20  # discordant clusters below which the cluster variance itself is not trusted


@dataclass(frozen=True)
class PairedResult:
    """One comparison, with all that a reader needs to judge it. Shares are of 1, not percent."""

    verdict: Verdict
    problems: int
    source: float
    served: float
    difference: float
    lower: float  # one-sided 1-alpha bounds on the difference
    upper: float
    p_value: float
    gains: float
    losses: float
    power: float  # of this many problems, if there is truly no difference
    samples_needed: int  # further problems for the promised power; 0 when settled
    margin: float


def score_z(gains: np.ndarray | float, losses: np.ndarray | float, n: float, difference: float) -> np.ndarray:
    """Tango's score statistic for H0: p(gain) - p(loss) = difference. Large means: better than that."""
    x, y = np.asarray(gains, float), np.asarray(losses, float)
    b = -x - y + (2 * n - x + y) * difference
    c = -y * difference * (1 - difference)
    p_loss = np.maximum((np.sqrt(np.maximum(b * b - 8 * n * c, 0)) - b) / (4 * n), 0)
    variance = n * (2 * p_loss + difference * (1 - difference))
    excess = x - y - n * difference
    with np.errstate(divide="ignore", invalid="ignore"):
        z = excess / np.sqrt(np.maximum(variance, 0))
    certain = np.where(excess > 0, np.inf, -np.inf)
    return np.where(np.abs(excess) < 1e-12, 0.0, np.where(variance <= 1e-15, certain, z))


def score_interval(gains: float, losses: float, n: int, alpha: float) -> tuple[float, float]:
    """One-sided 1-alpha bounds, both sides, by inverting the score test."""
    critical = NORMAL.inv_cdf(1 - alpha)

    def solve(target: float) -> float:
        low, high = -1 + 1e-9, 1 - 1e-9  # z falls as the hypothesised difference grows
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if score_z(gains, losses, n, middle) > target else (low, middle)
        return (low + high) / 2

    return solve(critical), solve(-critical)


@lru_cache(maxsize=4)
def exact_p_values(n: int, margin: float) -> np.ndarray:
    """[n+1, n+1] p-values by (gains, losses), exact whatever the rate of discordance. NaN where gains + losses > n."""
    gains, losses = np.nonzero(np.add.outer(np.arange(n + 1), np.arange(n + 1)) <= n)
    z = score_z(gains, losses, n, -margin)
    order = np.argsort(-np.round(z, 10), kind="stable")
    gains, losses, ranked = gains[order], losses[order], np.round(z[order], 10)
    last_of_tie = np.searchsorted(-ranked, -ranked, side="right") - 1
    lgamma = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    ways = lgamma[n] - lgamma[gains] - lgamma[losses] - lgamma[n - gains - losses]
    worst = np.zeros(len(gains))
    # p(loss) runs from margin (nothing gained) to (1 + margin) / 2; densest where data are: at few discordant pairs.
    for share in np.linspace(0, 1, NUISANCE_POINTS) ** 2:
        p_loss = margin + share * (1 - margin) / 2
        p_gain = p_loss - margin
        log_p = ways + _xlogy(losses, p_loss) + _xlogy(gains, p_gain) + _xlogy(n - gains - losses, 1 - p_loss - p_gain)
        worst = np.maximum(worst, np.cumsum(np.exp(log_p))[last_of_tie])
    table = np.full((n + 1, n + 1), np.nan)
    table[gains, losses] = np.minimum(worst, 1)
    return table


def _xlogy(count: np.ndarray, p: float) -> np.ndarray:
    return count * math.log(p) if p > 1e-300 else np.where(count > 0, -np.inf, 0.0)


def p_values(gains: np.ndarray | int, losses: np.ndarray | int, n: int, margin: float) -> np.ndarray:
    """One-sided p-values of H0 for whole counts, one sample per problem. Vectorised."""
    gains, losses = np.asarray(gains, int), np.asarray(losses, int)
    if n <= EXACT_LIMIT:
        return exact_p_values(n, margin)[gains, losses]
    z = score_z(gains, losses + 0.5, n, -margin)  # half a step of the lattice: without it the size reaches 5.1%
    normal = np.vectorize(lambda value: NORMAL.cdf(-value), otypes=[float])(z)
    return np.maximum(normal, _sparse_corner(np.maximum(losses - gains, 0), n, margin))


def _sparse_corner(net_losses: np.ndarray, n: int, margin: float) -> np.ndarray:
    """P(Binomial(n, margin) <= net losses): the exact tail where nothing is ever gained, where normal tails are too
    thin.
    """
    reach = int(np.max(net_losses, initial=0))
    counts = np.arange(reach + 1)
    log_ways = math.lgamma(n + 1) - np.array([math.lgamma(k + 1) + math.lgamma(n - k + 1) for k in counts])
    tail = np.cumsum(np.exp(log_ways + counts * math.log(margin) + (n - counts) * math.log1p(-margin)))
    return tail[net_losses]


def planning_problems(margin: float, alpha: float, power: float, discordance: float) -> int:
    """The usual normal formula, (z_alpha + z_power)^2 * discordance / margin^2: quick, and optimistic for small n."""
    z = NORMAL.inv_cdf(1 - alpha) + NORMAL.inv_cdf(power)
    return math.ceil(z * z * discordance / margin**2)


def required_problems(margin: float, alpha: float, power: float, discordance: float) -> int:
    """Problems for this module's test to pass a truly equal model with `power`, when `discordance` of pairs differ by
    chance.
    """
    n = max(planning_problems(margin, alpha, power, discordance), math.ceil(math.log(alpha) / math.log1p(-margin)))
    while expected_power(n, margin, alpha, discordance) < power:
        n += max(1, n // 32)
    return n


def expected_power(n: int, margin: float, alpha: float, discordance: float) -> float:
    """Power of n problems against a truly equal model; exact for n <= EXACT_LIMIT."""
    if discordance <= 0:
        return float(p_values(0, 0, n, margin) <= alpha)
    if n > EXACT_LIMIT:
        null = max(2 * _null_loss(discordance, margin) - margin * (1 + margin), 0.0)
        return NORMAL.cdf(
            (margin * math.sqrt(n) - NORMAL.inv_cdf(1 - alpha) * math.sqrt(null)) / math.sqrt(discordance)
        )
    most = most_losses(n, margin, alpha)
    losses = np.arange(most.max() + 1) if most.max() >= 0 else np.zeros(0, int)
    gains, losses = np.nonzero(losses[None, :] <= most[:, None])
    inside = gains + losses <= n
    gains, losses = gains[inside], losses[inside]
    same = n - gains - losses
    lgamma = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    ways = lgamma[n] - lgamma[gains] - lgamma[losses] - lgamma[same]
    return float(np.exp(ways + _xlogy(gains + losses, discordance / 2) + _xlogy(same, 1 - discordance)).sum())


@lru_cache(maxsize=1024)
def most_losses(n: int, margin: float, alpha: float) -> np.ndarray:
    """[n+1] by gains: the most losses that still pass, -1 for none. A summary that is cheap to keep for many n."""
    return (exact_p_values(n, margin) <= alpha).sum(axis=1) - 1


def _null_loss(discordance: float, margin: float) -> float:
    """The p(loss) that the score statistic fits under H0 to data of an equal model (its limit for large n)."""
    b = -discordance - 2 * margin
    c = discordance / 2 * margin * (1 + margin)
    return (math.sqrt(max(b * b - 8 * c, 0.0)) - b) / 4


def compare(source: np.ndarray, served: np.ndarray, margin: float, alpha: float, power: float) -> PairedResult:
    """The verdict on `source` and `served`: correctness by [problem] or [problem, sample], 0 or 1 each.

    PASS   H0 (worse by the margin or more) is rejected.
    FAIL   not passed, and either worse than the margin is shown (upper bound below it), or the power was there.
    UNDERPOWERED   neither: `samples_needed` further problems would give the promised power at the discordance seen.
    Raises ValueError when the sides do not pair up.
    """
    source, served = _by_problem(source), _by_problem(served)
    if source.shape[0] != served.shape[0] or not len(source):
        raise ValueError(f"sides do not pair up: {source.shape[0]} and {served.shape[0]} problems")
    if not (np.isfinite(source).all() and np.isfinite(served).all()):
        raise ValueError("a problem has no result on one side (NaN): that is not an answer")
    n = len(source)
    change = served.mean(axis=1) - source.mean(axis=1)
    gains, losses = float(np.maximum(change, 0).sum()), float(np.maximum(-change, 0).sum())
    if max(source.shape[1], served.shape[1]) == 1:
        p_value = float(p_values(round(gains), round(losses), n, margin))
        lower, upper = score_interval(gains, losses, n, alpha)
    else:
        p_value, lower, upper = _clustered(change, gains, losses, margin, alpha)
    # The bounds are of the score test, the verdict of the exact one: at the margin itself the verdict's word counts.
    lower = max(lower, -margin) if p_value <= alpha else min(lower, -margin)
    # Half a discordant pair each way: "none seen in n" is not "none".
    discordance = (gains + losses + 1) / (n + 1)
    have = expected_power(n, margin, alpha, discordance)
    needed = required_problems(margin, alpha, power, discordance)
    verdict: Verdict = "UNDERPOWERED"
    if p_value <= alpha:
        verdict = "PASS"
    elif upper < -margin or n >= needed:
        verdict = "FAIL"
    return PairedResult(
        verdict, n, float(source.mean()), float(served.mean()), float(change.mean()), lower, upper, p_value,
        gains, losses, have, max(needed - n, 1) if verdict == "UNDERPOWERED" else 0, margin,
    )  # fmt: skip


def _by_problem(correct: np.ndarray) -> np.ndarray:
    correct = np.asarray(correct, float)
    return correct[:, None] if correct.ndim == 1 else correct


def _clustered(
    change: np.ndarray, gains: float, losses: float, margin: float, alpha: float
) -> tuple[float, float, float]:
    """Repeats: each problem is one cluster, its mean change one observation in [-1, 1].

    With enough discordant clusters the variance between clusters is used (score form: about the null value). With
    few, the score statistic on the summed changes: for |d| <= 1, E d^2 <= E |d|, so its variance is an upper bound
    and the test valid.
    """
    n = len(change)
    lower, upper = score_interval(gains, losses, n, alpha)
    bounding = float(score_z(gains, losses, n, -margin))
    p_value = max(
        NORMAL.cdf(-bounding), float(_sparse_corner(np.asarray(math.ceil(max(losses - gains, 0))), n, margin))
    )
    if np.count_nonzero(change) >= CLUSTER_MINIMUM:
        spread = float(np.sqrt(np.mean((change - change.mean()) ** 2) / (n - 1)))
        reach = NORMAL.inv_cdf(1 - alpha) * (1 + 1 / n) * spread
        lower, upper = float(change.mean()) - reach, float(change.mean()) + reach
        about_null = float(np.sqrt(np.sum((change + margin) ** 2)))
        p_value = NORMAL.cdf(-float(np.sum(change + margin)) / about_null)
    return p_value, lower, upper


def settled(
    gains: int, losses: int, may_gain: int, may_lose: int, total: int, margin: float, alpha: float
) -> Literal["PASS", "FAIL", ""]:
    """The verdict that no further answer can change, or "": stopping then costs no alpha.

    `may_gain` and `may_lose` are the pairs still open, by which way they can fall: a problem the served model has
    wrong can never become a loss, one it has right never a gain.
    """
    if p_values(gains, losses + may_lose, total, margin) <= alpha:
        return "PASS"
    if score_interval(gains + may_gain, losses, total, alpha)[1] < -margin:
        return "FAIL"
    return ""


def main() -> None:
    """The record's published table, judged as a fixed 1-point threshold does and as this module does."""
    print("Llama 4 Maverick, BF16 -> FP8 as published; one pass each, 6% of pairs differing by chance, margin 1 point")
    print(f"{'':14}{'BF16':>7}{'FP8':>7}{'points':>8}  {'1-point rule':13} {'unpaired z':>10}  paired test")
    for name, (n, source, served) in RECORD.items():
        result = compare(*paired_example(n, source, served, 0.06), margin=0.01, alpha=0.05, power=0.8)
        z = (served - source) / math.sqrt((source * (1 - source) + served * (1 - served)) / n)
        rule = "regression" if source - served > 0.01 else "fine"
        said = f"{result.verdict}, {result.samples_needed:,} more problems needed"
        print(f"{name:14}{source:7.3f}{served:7.3f}{100 * (served - source):+8.1f}  {rule:13} {z:+10.2f}  {said}")


# BF16 -> FP8 as published on 22 May 2025: problems, source, served.
RECORD = {
    "livecodebench": (315, 0.397, 0.383),
    "aime24": (30, 0.39, 0.40),
    "gpqa_diamond": (198, 0.671, 0.686),
    "math500": (500, 0.889, 0.876),
}


def paired_example(n: int, source: float, served: float, discordance: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that have these two accuracies' difference and this share of discordant problems."""
    net = round((served - source) * n)
    discordant = max(round(discordance * n), abs(net))
    gains, losses = (discordant + net) // 2, (discordant - net) // 2
    left, right = np.zeros(n), np.zeros(n)
    left[:losses], right[losses : losses + gains] = 1, 1
    return left, right


if __name__ == "__main__":
    main()
