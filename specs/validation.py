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
    "forced",
    "witness",
)
# What lm-eval itself provides: our name -> its task, and the filter whose score counts. A stricter filter that hardly
# any answer passes would make two models look equal; none means the task's only one.
NAMED_TASKS: dict[str, tuple[str, str]] = {
    "gpqa_diamond": ("gpqa_diamond_cot_zeroshot", "flexible-extract"),
    "aime24": ("aime24", ""),
    "aime25": ("aime25", ""),
    "math500": ("hendrycks_math500", ""),
    "livecodebench": ("humaneval_instruct", ""),  # lm-eval has no LiveCodeBench: a stand-in, named so in the report
    "gsm8k": ("gsm8k_cot_llama", "flexible-extract"),
    "mmlu_pro": ("mmlu_pro", ""),
}
RUNS_CODE = ("livecodebench",)
PROFILES = ("held_out", "artificial_analysis_100", "artificial_analysis_1k", "artificial_analysis_10k")


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
    temperature: float = Field(0.0, ge=0, le=2, description="Of the answers; 0 is greedy.")
    repeats: int = measured(
        1, "answers", "Answers per problem, with different seeds; those of one problem count as one cluster.", ge=1
    )
    early_stop: bool = Field(
        False,
        description="Ask the source only until no further answer can change the verdict; its figures become bounds.",
    )
    run_generated_code: bool = Field(
        False, description="Let `livecodebench` (HumanEval in lm-eval) run the model's programs on this machine."
    )
    underpowered: Literal["fail", "warn"] = Field(
        "fail", description="What too few problems for `margin`, `alpha` and `power` mean for the build."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Accuracy:
        if self.repeats > 1 and (self.temperature == 0 or self.early_stop):
            raise ValueError("repeats above 1 need a temperature above 0 and no early_stop; greedy repeats are equal")
        code = [task for task in self.tasks if task in RUNS_CODE and self.problems is None]
        if code and not self.run_generated_code:
            raise ValueError(f"{code[0]} runs programs that the model wrote; set run_generated_code: true to allow it")
        unknown = [task for task in self.tasks if task not in NAMED_TASKS]
        if unknown and self.problems is None:
            raise ValueError(f"no task {unknown[0]} without `problems`; lm-eval's are {', '.join(NAMED_TASKS)}")
        return self


class Acceptance(Section):
    """What the draft's acceptance is held to, position by position."""

    golden: dict[str, Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(strict=False)]] = Field(
        default_factory=dict,
        description="Domain (or `all`) -> share accepted at draft position 1, 2, ..., given that the one before was.",
    )
    tolerance: float = measured(0.05, "share", "How far below `golden` a position may be, beyond noise.", ge=0, lt=1)


class Latency(Section):
    """How the speed for one user is measured: one request in flight, tokens counted by the tokenizer."""

    profile: Literal["held_out", "artificial_analysis_100", "artificial_analysis_1k", "artificial_analysis_10k"] = (
        Field(
            "artificial_analysis_1k",
            description="`held_out`: the prompts as they are; `artificial_analysis_*`: about 100, 1k, 10k tokens in.",
        )
    )
    requests: int = measured(24, "requests", "Unique prompts measured.", ge=3)
    max_new_tokens: int = measured(512, "tokens", "Answer length.", ge=2)
    prompts: Annotated[str, rules.SOURCE] | None = Field(
        None, description="JSONL of {id, domain, prompt}; null takes `accuracy.problems`."
    )
    users: Annotated[tuple[Annotated[int, Field(ge=2, le=1024)], ...], Field(strict=False)] = measured(
        (10,), "users", "Also measured with so many users at once, each in turn."
    )
    arrivals_per_s: Annotated[tuple[Annotated[float, Field(gt=0, le=1000)], ...], Field(strict=False)] = measured(
        (), "requests/s", "Also measured in an open loop: Poisson arrivals at each rate, waits counted."
    )
    forced_acceptance: float | None = measured(
        None, "tokens/cycle", "Also time the engine alone, on a second server that accepts this much.", ge=1, le=16
    )
    witness: Literal["aiperf", "guidellm"] | None = Field(
        None, description="A second client measures the same endpoint; it must be on the PATH."
    )
    witness_tolerance: float = measured(0.05, "share", "Disagreement with the witness that is no finding.", gt=0, lt=1)


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
    tolerance: float = Field(0.0, ge=0, description="Allowance for noise, in the metric's own unit.")

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
    acceptance: Acceptance = section(Acceptance)
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
