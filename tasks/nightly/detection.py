"""Did a figure step to another level, or is that noise? Change points by the `ruptures` library, in units of noise.

A night is a few runs of one thing. Their spread is what the stopwatch does (the A/A noise), the jitter from night to
night is what the machine does; the larger of the two is the noise. A step counts when ruptures' PELT pays its penalty,
when it is not one outlier's doing, and when its interval leaves zero and the smallest change worth a morning.

Refuses to guess from fewer than MIN_BEFORE nights, and to alarm on the first night: one night is a figure, two are a
level. Run it: `python -m pytest tests/tasks/nightly/test_detection.py`; `kilotok history SPEC` shows what it finds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

MIN_BEFORE, MIN_AFTER = 6, 2  # nights of the old level and of the new one
WINDOW = 60  # nights looked at: two months
PENALTY = 20.0  # of one more change point, in squared noise; the test simulates what it costs in false alarms
NOISE_AT_LEAST = 0.001  # greedy figures repeat exactly; without a floor any change of them would be infinite
WORTH_TELLING = 0.01  # 1 %, or a point of a share: smaller steps are recorded by the history, not told
CONFIDENCE = 0.99


@dataclass(frozen=True)
class Step:
    """The newest change of level. Shares are of the old level (or absolute, for figures that may be zero)."""

    at: int  # index of the first night of the new level
    before: float
    after: float
    change: float
    low: float
    high: float
    noise: float  # standard deviation of one night's figure, in the unit of `change`
    nights: int  # of the new level
    relative: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def noise(nights: Sequence[Sequence[float]]) -> float:
    """Standard deviation of one night's value: the A/A noise or the jitter between nights, whichever is larger.

    `nights` are lists of runs. The jitter is from the differences of neighbours, which one step does not inflate: the
    size that four fifths of them do not exceed. Half of them would miss a machine that changes between two speeds.
    """
    import numpy as np

    repeated = [runs for runs in nights if len(runs) > 1]
    within = [float(np.var(runs, ddof=1)) / len(runs) for runs in repeated]
    values = np.array([_value(runs) for runs in nights])
    jumps = np.abs(np.diff(values))
    jitter = float(np.quantile(jumps, 0.8)) / (1.2816 * math.sqrt(2)) if len(jumps) else 0.0
    return max(math.sqrt(float(np.median(within))) if within else 0.0, jitter, NOISE_AT_LEAST)


def newest_step(nights: Sequence[Sequence[float]]) -> Step | None:
    """The newest change of level in a series of nights, oldest first, each a list of runs; None when there is none."""
    import numpy as np

    shown = list(nights)[-WINDOW:]
    first = len(nights) - len(shown)
    if len(shown) < MIN_BEFORE + MIN_AFTER:
        return None
    relative = all(value > 0 for runs in shown for value in runs)
    scaled = [[math.log(value) for value in runs] if relative else list(runs) for runs in shown]
    sigma = noise(scaled)
    values = np.array([_value(runs) for runs in scaled])
    at = _segments(values / sigma)
    if at is None:
        return None
    old, new = values[at[0] : at[1]], values[at[1] :]
    if len(old) < MIN_BEFORE or not _is_level(old, new):
        return None
    low, size, high = _interval(old, new, sigma)
    if low < 0 < high or abs(size) < WORTH_TELLING:
        return None
    back = math.exp if relative else float
    change, low, high = (math.expm1(x) if relative else x for x in (size, low, high))
    before, after = (back(float(np.median(part))) for part in (old, new))
    return Step(first + at[1], before, after, change, low, high, sigma, len(new), relative)


def _value(runs: Sequence[float]) -> float:
    return sum(runs) / len(runs)


def _segments(values: Any) -> tuple[int, int] | None:
    """(begin of the last segment but one, begin of the last one), or None for a single level."""
    import ruptures

    found = ruptures.Pelt(model="l2", min_size=MIN_AFTER, jump=1).fit(values.reshape(-1, 1)).predict(pen=PENALTY)
    return None if len(found) < 2 else (found[-3] if len(found) > 2 else 0, found[-2])


def _is_level(old: Any, new: Any) -> bool:
    """Squared error is impressed by one outlier; a level needs three quarters of its nights beyond the middle."""
    import numpy as np

    size = float(np.mean(new) - np.mean(old))
    beyond = (new - np.mean(old)) / size >= 0.5 if size else np.zeros(len(new), bool)
    return int(beyond.sum()) >= 0.75 * len(new)


def _interval(old: Any, new: Any, sigma: float) -> tuple[float, float, float]:
    """(low, size, high) of the difference of medians, whose error is 1.25 times that of means."""
    import numpy as np
    from scipy.stats import t

    size = float(np.median(new) - np.median(old))
    error = 1.2533 * sigma * math.sqrt(1 / len(old) + 1 / len(new))
    wide = float(t.ppf(0.5 + CONFIDENCE / 2, len(old) + len(new) - 2)) * error
    return size - wide, size, size + wide
