"""Tokens per cycle to expect of a draft: this spec's own measurement, else what is published for the model, else a
neighbour's.

Refuses to call a borrowed figure a prediction: every figure says where it is from and how far the domains lie apart.
Run it: `kilotok predict SPEC`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# Tokens per cycle for 1, 2, ... drafts of nvidia/Llama-4-Maverick-17B-128E-Eagle3, a chain: RedHatAI's model card
# and, for chat, neuralmagic/vllm #117 (0.71, 0.48, 0.34 accepted by position; beyond 3 extrapolated at a ratio of
# 0.70).
MAVERICK = {
    "chat": (1.71, 2.19, 2.53, 2.77, 2.93, 3.05, 3.13),
    "code": (1.83, 2.45, 2.94, 3.26, 3.47, 3.57, 3.62),
    "math": (1.86, 2.56, 3.08, 3.53, 3.73, 3.91, 4.02),
    "summary": (1.69, 2.12, 2.37, 2.52, 2.60, 2.63, 2.63),
}
MAVERICK_SOURCE = (
    "nvidia/Llama-4-Maverick-17B-128E-Eagle3 on MT-Bench (neuralmagic/vllm #117); range over RedHatAI's domains"
)


@dataclass(frozen=True)
class Acceptance:
    """`length` tokens per cycle, between `low` and `high` over the domains."""

    length: float
    low: float
    high: float
    source: str

    def to_dict(self) -> dict[str, Any]:
        return {name: round(value, 3) if name != "source" else value for name, value in asdict(self).items()}


def expect(model: str, draft_tokens: int, metrics: Mapping[str, float] | None = None, build: str = "") -> Acceptance:
    """For `draft_tokens` drafts of a head on `model` (its URI); `metrics` are those of the spec's last measured
    build."""
    if not draft_tokens:
        return Acceptance(1.0, 1.0, 1.0, "no speculation")
    measured = _from_build(draft_tokens, metrics or {}, build)
    if measured:
        return measured
    lengths = {domain: at(known, draft_tokens) for domain, known in MAVERICK.items()}
    if "Llama-4-Maverick" in model:
        return Acceptance(lengths["chat"], min(lengths.values()), max(lengths.values()), MAVERICK_SOURCE)
    source = "assumption until a build is measured: Maverick's head on MT-Bench; from no draft accepted to all of them"
    return Acceptance(lengths["chat"], 1.0, draft_tokens + 1.0, source)


def at(lengths: Sequence[float], draft_tokens: int) -> float:
    """Length for `draft_tokens` drafts; beyond the last known one gains shrink as the last two did."""
    if draft_tokens == 0:
        return 1.0
    if draft_tokens <= len(lengths):
        return lengths[draft_tokens - 1]
    gains = [b - a for a, b in zip((1.0, *lengths), lengths, strict=False)]
    ratio = min(0.95, max(0.0, gains[-1] / gains[-2])) if len(gains) > 1 and gains[-2] > 0 else 0.7
    return lengths[-1] + sum(gains[-1] * ratio**step for step in range(1, draft_tokens - len(lengths) + 1))


def _from_build(draft_tokens: int, metrics: Mapping[str, float], build: str) -> Acceptance | None:
    rates = [metrics.get(f"acceptance.position.{i}") for i in range(1, 16)]
    known = rates[: rates.index(None)] if None in rates else rates
    if not known or "acceptance.length" not in metrics:
        return None
    length, lengths, reached = 1.0, [], 1.0
    for rate in known:
        reached *= float(rate or 0.0)
        length += reached
        lengths.append(length)
    found = at(lengths, draft_tokens)
    domains = [value for name, value in metrics.items() if name.startswith("acceptance.length.")]
    scale = [value / metrics["acceptance.length"] for value in domains] or [1.0]
    low, high = (1 + (found - 1) * _gain(factor, metrics["acceptance.length"]) for factor in (min(scale), max(scale)))
    return Acceptance(found, min(low, found), max(high, found), f"measured in build {build}, range over its domains")


def _gain(factor: float, length: float) -> float:
    """How a domain's share of the whole length translates to what drafting gains beyond the sure token."""
    return max(0.0, (factor * length - 1) / (length - 1)) if length > 1 else 1.0
