"""Plain words, units and directions for flat metric names, and how a figure is written.

Refuses to judge: a direction only says which way is better when two builds are compared; verdicts are `validate`'s.
Run it: `python -m pytest tests/tasks/test_report_words.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Meaning:
    """What a metric is called, its unit, and which way is better (+1 up, -1 down, 0 neither)."""

    label: str
    unit: str = ""
    better: int = 0


# First match wins. A backslash group becomes part of the label.
_MEANINGS: tuple[tuple[str, Meaning], ...] = (
    (r"latency\.parallel_(\d+)\.tps_server", Meaning(r"Speed of the server with \1 users", "tokens/s", 1)),
    (r"latency\.parallel_(\d+)\.tps_per_user\.(\w+)", Meaning(r"Speed for one of \1 users, \2", "tokens/s", 1)),
    (r"latency\.parallel_(\d+)\.e2e_tps\.(\w+)", Meaning(r"Speed end to end for one of \1 users, \2", "tokens/s", 1)),
    (r"latency\.parallel_(\d+)\.ttft_ms\.(\w+)", Meaning(r"Time to first token with \1 users, \2", "ms", -1)),
    (r"latency\.parallel_(\d+)\.itl_ms\.(\w+)", Meaning(r"Time between tokens with \1 users, \2", "ms", -1)),
    (
        r"latency\.open_loop_(\w+)\.ttft_intended_ms\.(\w+)",
        Meaning(r"Wait at \1 arrivals/s, \2", "ms", -1),
    ),
    (r"latency\.open_loop_(\w+)\.tps_server", Meaning(r"Speed of the server at \1 arrivals/s", "tokens/s", 1)),
    (
        r"latency\.open_loop_(\w+)\.tps_per_user\.(\w+)",
        Meaning(r"Speed at \1 arrivals/s, \2", "tokens/s", 1),
    ),
    (r"forced\.tps_per_user\.(\w+)", Meaning(r"Speed of the engine alone, \1", "tokens/s", 1)),
    (r"forced\.cycle_us", Meaning("Time of one cycle at forced acceptance", "us", -1)),
    (r"forced\.acceptance_length", Meaning("Tokens per cycle, forced", "tokens", 0)),
    (r"witness\.tps_per_user\.p50", Meaning("Speed for one user by the witness", "tokens/s", 1)),
    (r"witness\.tps_per_user\.difference", Meaning("Disagreement of the witness", "%", -1)),
    (r"acceptance\.golden_gap", Meaning("Furthest below the golden curve", "points", -1)),
    (r"draft\.capture_gain_nats", Meaning("Fit of the draft to other layers, above its own", "nats", -1)),
    (r"bundle\.scale_error_percent", Meaning("Scale of the served weights, furthest off", "percent", -1)),
    (r"latency\.failed_requests", Meaning("Failed requests", "", -1)),
    (r"latency\.usage_error_percent", Meaning("Error of the server's token counts", "percent", -1)),
    (r"baseline\.ttft_ms\.(\w+)", Meaning(r"Time to first token of the source, \1", "ms", -1)),
    (r"baseline\.itl_ms\.(\w+)", Meaning(r"Time between tokens of the source, \1", "ms", -1)),
    (r"baseline\.e2e_tps\.(\w+)", Meaning(r"Speed end to end of the source, \1", "tokens/s", 1)),
    (r"quantize\.sqnr_db\.min", Meaning("Signal to noise of the noisiest tensor", "dB", 1)),
    (r"quantize\.sqnr_db\.weights_mean", Meaning("Signal to noise of the weights, mean", "dB", 1)),
    (r"quantize\.saturation_share\.max", Meaning("Largest share of saturated values", "%", -1)),
    (r"train_draft\.loss", Meaning("Training loss of the draft", "", -1)),
    (r"latency\.tps_per_user\.(\w+)", Meaning(r"Speed for one user, \1", "tokens/s", 1)),
    (r"latency\.tps_per_user\.(.+)\.(\w+)", Meaning(r"Speed for one user in \1, \2", "tokens/s", 1)),
    (r"latency\.e2e_tps\.(\w+)", Meaning(r"Speed end to end, \1", "tokens/s", 1)),
    (r"latency\.tps_per_server(?:\.(\w+))?", Meaning(r"Speed of the whole server", "tokens/s", 1)),
    (r"latency\.ttft_ms\.(\w+)", Meaning(r"Time to first token, \1", "ms", -1)),
    (r"latency\.itl_ms\.(\w+)", Meaning(r"Time between tokens, \1", "ms", -1)),
    (r"baseline\.tps_per_user\.(\w+)", Meaning(r"Speed of the source, \1", "tokens/s", 1)),
    (r"speedup", Meaning("Gain from speculation", "x", 1)),
    (r"acceptance\.length", Meaning("Tokens per cycle", "tokens", 1)),
    (r"acceptance\.length\.(.+)", Meaning(r"Tokens per cycle in \1", "tokens", 1)),
    (r"acceptance\.position\.(\d+)", Meaning(r"Draft token \1 accepted", "%", 1)),
    (r"acceptance\.position\.(\d+)\.(.+)", Meaning(r"Draft token \1 accepted in \2", "%", 1)),
    (r"accuracy\.source", Meaning("Accuracy, source model", "%", 1)),
    (r"accuracy\.served", Meaning("Accuracy, served model", "%", 1)),
    (r"accuracy\.difference", Meaning("Accuracy, served minus source", "points", 1)),
    (r"accuracy\.(?:(.+)\.)?(?:low|high|problems)", Meaning(r"", "", 0)),
    (r"accuracy\.(.+)\.source", Meaning(r"Accuracy of \1, source model", "%", 1)),
    (r"accuracy\.(.+)\.served", Meaning(r"Accuracy of \1, served model", "%", 1)),
    (r"accuracy\.(.+)\.difference", Meaning(r"Accuracy of \1, served minus source", "points", 1)),
    (r"cycle\.us", Meaning("Time of one cycle", "us", -1)),
    (r"cycle\.client_us", Meaning("Time of one cycle as the user sees it", "us", -1)),
    (r"cycle\.outside_us", Meaning("Time of one cycle outside the engine", "us", -1)),
    (r"cycle\.(.+)_us", Meaning(r"Cycle: \1", "us", -1)),
    (r"client\.error_percent", Meaning("Error of our own stopwatch", "percent", -1)),
    (r"quantize\.sqnr_db\.(\w+)", Meaning(r"Quantization signal to noise, \1", "dB", 1)),
    (r"(.*)\.bytes", Meaning(r"Size of \1", "bytes", 0)),
    (r"(.*)_seconds", Meaning(r"\1", "s", -1)),
)
_WORDS = {
    "p50": "median",
    "p10": "10th percentile",
    "p90": "90th percentile",
    "p95": "95th percentile",
    "p99": "99th percentile",
}


def meaning(metric: str) -> Meaning:
    """The first pattern that fits; a metric nobody described keeps its own name."""
    for pattern, found in _MEANINGS:
        match = re.fullmatch(pattern, metric)
        if match:
            label = match.expand(found.label).replace("_", " ")
            for short, long in _WORDS.items():
                label = label.replace(f", {short}", f", {long}")
            if label.endswith(", median"):  # reads better in a sentence: "median speed for one user is ..."
                label = f"Median {label[:1].lower()}{label[1:]}".removesuffix(", median")
            return Meaning(label or metric.replace("_", " "), found.unit, found.better)
    return Meaning(metric.replace("_", " "))


def figure(value: Any, unit: str = "") -> str:
    """A number as a person reads it: three digits, thousands apart, shares as percent; else 'not measured'."""
    number = as_number(value)
    if number is None:
        return NOT_MEASURED
    if unit == "%":
        return f"{100 * number:.1f} %"
    if unit == "points":
        return f"{signed(100 * number, 1)} pt"
    if unit == "bytes":
        return size(number)
    if unit == "us":
        return micros(number)
    if unit == "s":
        return seconds(number)
    if unit == "percent":
        return f"{three(number)} %"
    return f"{three(number)} {unit}".rstrip()


def between(low: Any, high: Any, unit: str = "") -> str:
    """270 to 420 tokens/s: the unit once when both have the same."""
    left, right = figure(low, unit), figure(high, unit)
    tail = f" {unit}"
    if unit in ("%", "points"):
        tail = right[right.rindex(" ") :] if " " in right else ""
    elif unit == "us":
        tail = right[right.rindex(" ") :]
    return f"{left.removesuffix(tail)} to {right}" if tail and left.endswith(tail) else f"{left} to {right}"


def three(number: float) -> str:
    """Three significant digits, without exponents for what people compare by eye: 1,038 · 212 · 2.61 · 0.0123."""
    if number == 0 or not math.isfinite(number):
        return "0" if number == 0 else str(number)
    magnitude = math.floor(math.log10(abs(number)))
    if magnitude >= 2:
        return f"{number:,.0f}".replace("-", "\N{MINUS SIGN}")
    if magnitude < -6:
        return f"{number:.2e}"
    return f"{number:.{2 - magnitude}f}".replace("-", "\N{MINUS SIGN}")


def signed(number: float, digits: int) -> str:
    """With its sign, and a real minus."""
    text = f"{number:+,.{digits}f}"
    return text[1:] if float(text.replace(",", "")) == 0 else text.replace("-", "\N{MINUS SIGN}")


def micros(us: float) -> str:
    """Microseconds in the unit that gives one to three digits before the point."""
    for limit, scale, name in ((1e3, 1.0, "us"), (1e6, 1e3, "ms")):
        if abs(us) < limit:
            return f"{three(us / scale)} {'µs' if name == 'us' else name}"
    return f"{three(us / 1e6)} s"


def seconds(value: Any) -> str:
    """0.4 s · 12.3 s · 4 min 05 s · 2 h 10 min."""
    number = as_number(value)
    if number is None:
        return NOT_MEASURED
    if number < 99.95:
        return f"{number:.1f} s"
    minutes, rest = divmod(round(number), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(value: Any) -> str:
    """Bytes in binary units."""
    number = as_number(value)
    if number is None:
        return NOT_MEASURED
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(number) < 1024 or unit == "TiB":
            return f"{number:.0f} B" if unit == "B" else f"{three(number)} {unit}"
        number /= 1024
    raise AssertionError("unreachable")


def money(value: Any, currency: str) -> str:
    """12.40 USD; less than a cent is still something."""
    number = as_number(value)
    if number is None:
        return "\N{EN DASH}"
    return f"under 0.01 {currency}" if 0 < number < 0.005 else f"{number:,.2f} {currency}"


def change(before: float, after: float) -> str:
    """Relative change in words, or the absolute one where a ratio means nothing."""
    if before == 0 or not math.isfinite(before):
        return signed(after - before, 2)
    percent = 100 * (after - before) / abs(before)
    return "no change" if abs(percent) < 0.05 else f"{signed(percent, 1)} %"


def as_number(value: Any) -> float | None:
    """A finite float, or None for what is missing, NaN or not a number; bool is not a figure."""
    if value is None or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def count(number: int, singular: str, plural: str = "") -> str:
    """1 gate, 3 gates."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def listed(names: list[str], limit: int = 3) -> str:
    """a, b and c; a, b, c and 4 more."""
    if len(names) > limit:
        return f"{', '.join(names[:limit])} and {len(names) - limit} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def first(mapping: Mapping[str, Any], *names: str) -> Any:
    """The first of several spellings that is present and not null."""
    return next((mapping[name] for name in names if mapping.get(name) is not None), None)
