"""The recorded noise as the tests use it: residuals of real nights, resampled, at the size that is asked for.

See record_noise.py for how it was recorded. Scaling keeps the shape (tails, two runs of one night alike) and sets the
size, because the size belongs to a machine and the shape is what fools a detector.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

RECORDED = Path(__file__).parent / "noise_tiny_cpu.json"
METRIC = "cycle.us"


def residuals(metric: str = METRIC) -> list[list[float]]:
    """Per night the log of each run over the median of all runs."""
    nights = [[night[metric] for night in runs] for runs in json.loads(RECORDED.read_text())["nights"]]
    middle = statistics.median(value for runs in nights for value in runs)
    return [[math.log(value / middle) for value in runs] for runs in nights]


def own_size(metric: str = METRIC) -> float:
    """Standard deviation of a night's mean, as recorded."""
    return statistics.stdev(sum(runs) / len(runs) for runs in residuals(metric))


def factors(nights: int, seed: int, size: float | None = None) -> list[list[float]]:
    """Multiplicative noise for `nights` nights; `size` is the standard deviation of a night, None as recorded."""
    chosen = random.Random(seed).choices(residuals(), k=nights)
    scale = 1.0 if size is None else size / own_size()
    return [[math.exp(scale * value) for value in runs] for runs in chosen]
