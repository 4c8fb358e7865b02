"""The `validate` section: how good is good enough.

What it is: the accuracy test, the speed measurement and the gates, as frozen models and one parser for bounds.
What it refuses to be: the statistics. Those are in tasks/validate.
Run it: `kilotok schema` shows it; `python -m pytest tests/specs/test_schema.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from specs import rules
from specs.rules import Section, measured, section

_BOUND = re.compile(r"(?P<factor>\d+(?:\.\d+)?) of (?P<reference>last_good|baseline)")
METRIC_GROUPS = (
    "latency",
    "acceptance",
    "accuracy",
    "baseline",
    "cycle",
    "client",
    "throughput",
    "quantize",
    "draft",
    "bundle",
)


class Accuracy(Section):
    """A paired non-inferiority test against the source checkpoint, problem by problem."""

    reference: Literal["source"] = Field("source", description="What the served model is compared with.")
    tasks: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        description="lm-eval tasks; for local `problems`, their domains."
    )
    problems: Annotated[str, rules.SOURCE] | None = Field(
        None, description="JSONL of {id, domain, prompt, answer, target}; null lets lm-eval fetch the tasks."
    )
    samples: int | None = measured(None, "problems", "Problems per task; null takes all.", ge=1)
    margin: float = measured(0.02, "share", "Loss of accuracy that would still be accepted.", gt=0, lt=1)
    alpha: float = Field(0.05, gt=0, lt=0.5, description="Chance to pass a model that is worse than the margin.")
    power: float = Field(0.8, gt=0, lt=1, description="Wanted chance to pass a model that is not worse at all.")
    max_new_tokens: int = measured(512, "tokens", "Longest answer.", ge=1)
    underpowered: Literal["fail", "warn"] = Field(
        "fail", description="What too few problems for `margin`, `alpha` and `power` mean for the build."
    )


class Latency(Section):
    """How the speed for one user is measured: one request in flight, tokens counted by the tokenizer."""

    profile: Annotated[str, rules.NAME_OR_UNDERSCORE] = Field(
        "artificial_analysis_1k",
        description="`artificial_analysis_1k` (about 1k tokens in), or `held_out`: the prompts as they are.",
    )
    requests: int = measured(24, "requests", "Unique prompts measured.", ge=3)
    max_new_tokens: int = measured(512, "tokens", "Answer length.", ge=2)
    prompts: Annotated[str, rules.SOURCE] | None = Field(
        None, description="JSONL of {id, domain, prompt}; null takes `accuracy.problems`."
    )


class Gate(Section):
    """One bound on one metric; a build that misses it is not promoted."""

    metric: Annotated[str, rules.METRIC] = Field(
        description=f"Dotted name that starts with {', '.join(METRIC_GROUPS)}."
    )
    at_least: float | str | None = Field(
        None,
        description='Lower bound: a number, "0.97 of last_good", or "4.0 of baseline" (the engine without its draft).',
    )
    at_most: float | str | None = Field(None, description="Upper bound, written like `at_least`.")

    @model_validator(mode="after")
    def _one_bound(self) -> Gate:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("a gate has exactly one bound; write at_least or at_most")
        if self.metric.split(".", 1)[0] not in METRIC_GROUPS:
            raise ValueError(f"metric is in no known group; it starts with one of {', '.join(METRIC_GROUPS)}")
        key, bound = ("at_most", self.at_most) if self.at_least is None else ("at_least", self.at_least)
        try:
            parse_bound(bound)
        except ValueError as error:
            raise ValueError(f"{key} {error}") from None
        return self


class Validation(Section):
    """What is measured, and which gates decide."""

    accuracy: Accuracy = Field(description="Is it still right?")
    latency: Latency = section(Latency)
    gates: Annotated[tuple[Gate, ...], Field(strict=False)] = Field((), description="Bounds; all must hold.")

    @model_validator(mode="after")
    def _prompts_exist(self) -> Validation:
        if self.latency.prompts is None and self.accuracy.problems is None:
            raise ValueError("latency has no prompts; set latency.prompts or accuracy.problems")
        return self


def parse_bound(bound: Any) -> tuple[float, str | None]:
    """(factor, reference) of a gate's bound: 1000 -> (1000.0, None), "0.97 of last_good" -> (0.97, "last_good")."""
    if isinstance(bound, (int, float)) and not isinstance(bound, bool):
        return float(bound), None
    match = _BOUND.fullmatch(str(bound).strip())
    if match is None:
        raise ValueError('is no bound; write a number, "0.97 of last_good" or "4.0 of baseline"')
    return float(match["factor"]), match["reference"]
