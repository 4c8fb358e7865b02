"""A few SVG elements as text, escaped; colours are CSS classes, so one drawing serves light, dark and paper.

Refuses to be a chart library: no layout, no state but a list of strings. `plots.py` draws with it.
Run it: `python -m pytest tests/tasks/test_report_plots.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

CHAR = 0.56  # width of an average character in ems, for the few places that must know


class Canvas:
    """Collects elements; `svg()` closes the drawing."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self.parts: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, kind: str, tip: str = "", radius: float = 2
    ) -> None:
        self._add(
            "rect",
            kind,
            tip,
            f'x="{n(x)}" y="{n(y)}" width="{n(max(width, 0.5))}" height="{n(height)}" rx="{n(radius)}"',
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str, tip: str = "") -> None:
        self._add("line", kind, tip, f'x1="{n(x1)}" y1="{n(y1)}" x2="{n(x2)}" y2="{n(y2)}"')

    def dot(self, x: float, y: float, radius: float, kind: str, tip: str = "") -> None:
        self._add("circle", kind, tip, f'cx="{n(x)}" cy="{n(y)}" r="{n(radius)}"')

    def path(self, points: Sequence[tuple[float, float]], kind: str, tip: str = "", closed: bool = False) -> None:
        steps = " ".join(f"{'M' if at == 0 else 'L'}{n(x)} {n(y)}" for at, (x, y) in enumerate(points))
        self._add("path", kind, tip, f'd="{steps}{"Z" if closed else ""}"')

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start", turn: float = 0) -> None:
        where = f' text-anchor="{anchor}"' if anchor != "start" else ""
        rotated = f' transform="rotate({n(turn)} {n(x)} {n(y)})"' if turn else ""
        named = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text x="{n(x)}" y="{n(y)}"{named}{where}{rotated}>{escape(words)}</text>')

    def _add(self, tag: str, kind: str, tip: str, geometry: str) -> None:
        body = f"><title>{escape(tip)}</title></{tag}>" if tip else "/>"
        self.parts.append(f'<{tag} class="{kind}" {geometry}{body}')

    def svg(self, kind: str = "") -> str:
        named = f' class="{kind}"' if kind else ""
        size = f'viewBox="0 0 {n(self.width)} {n(self.height)}" width="{n(self.width)}" height="{n(self.height)}"'
        return f'<svg{named} {size} role="img" aria-label="{escape(self.label)}">{"".join(self.parts)}</svg>'


def n(value: float) -> str:
    """A coordinate with at most one decimal: the page is mailed."""
    return f"{value:.1f}".removesuffix(".0")


def linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Data to pixels."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Data to pixels on a log axis."""
    scale = linear(math.log10(low), math.log10(high), start, end)
    return lambda value: scale(math.log10(max(value, 1e-300)))


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round values inside [low, high]: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10 ** math.floor(math.log10(span / wanted))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= wanted)
    return [step * index for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high]; with fewer than three of them also their 2 and 5 times."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.floor(math.log10(high) + 1e-9) + 1)]
    inside = [value for value in powers if value >= low * (1 - 1e-9)]
    if len(inside) > 2:
        return inside
    return [value for power in powers for value in (power, 2 * power, 5 * power) if low * (1 - 1e-9) <= value <= high]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Label positions at least `gap` apart and as near to the wanted ones as a sweep in both directions makes them."""
    order = sorted(range(len(wanted)), key=lambda at: wanted[at])
    placed = [0.0] * len(wanted)
    floor = low
    for at in order:
        placed[at] = max(wanted[at], floor)
        floor = placed[at] + gap
    ceiling = high
    for at in reversed(order):
        placed[at] = min(placed[at], ceiling)
        ceiling = placed[at] - gap
    return placed


def width_of(words: str, size: float) -> float:
    """About how wide a text is drawn."""
    return len(words) * size * CHAR
