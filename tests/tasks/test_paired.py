"""Early stop: fewer questions to the source, never another verdict."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tasks.validate.paired import ask_until_settled, fill_unasked, problems_frame, verdicts

RULES = {"margin": 0.05, "alpha": 0.05}


def rows(side: str, tasks: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    return [
        {
            "task": task,
            "id": f"{task}{n}",
            "side": side,
            "sample": 0,
            "answer": "",
            "target": "",
            "correct": float(right),
        }
        for task, values in tasks.items()
        for n, right in enumerate(values)
    ]


def settle(served: dict[str, np.ndarray], source: dict[str, np.ndarray]) -> tuple[int, str, str, str]:
    """(questions put to the source, what was settled, the verdict then, the verdict over all answers)."""
    theirs = {(row["task"], row["id"]): row for row in rows("source", source)}
    ours = rows("served", served)
    asked, said = ask_until_settled(ours, lambda keys: [theirs[key] for key in keys], **RULES)
    early = verdicts(problems_frame([*asked, *fill_unasked(asked, ours, said), *ours]), **RULES, power=0.8)
    whole = verdicts(problems_frame([*theirs.values(), *ours]), **RULES, power=0.8)
    return len(asked), said, early["all"].verdict, whole["all"].verdict


def test_an_equal_model_is_settled_where_it_is_wrong() -> None:
    """Only there can it lose: 60 of 256 questions show that it does not."""
    served = np.arange(256) >= 60
    assert settle({"a": served}, {"a": served}) == (60, "PASS", "PASS", "PASS")


def test_a_broken_model_is_settled_before_the_end() -> None:
    served = np.arange(256) >= 200
    asked, said, early, whole = settle({"a": served}, {"a": np.ones(256, bool)})
    assert asked < 256
    assert (said, early, whole) == ("FAIL", "FAIL", "FAIL")


def test_one_broken_task_is_not_passed_early() -> None:
    good = {name: np.ones(64, bool) for name in "abcdefg"}
    served = {**good, "h": np.arange(64) >= 16}
    _, _, early, whole = settle(served, {**good, "h": np.ones(64, bool)})
    assert early == whole == "FAIL"


@pytest.mark.parametrize("seed", range(8))
def test_the_early_verdict_is_the_late_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    served = {name: rng.random(96) < 0.7 for name in "ab"}
    flips = rng.choice([0.0, 0.02, 0.1, 0.3])
    source = {name: np.where(rng.random(96) < flips, ~values, values) for name, values in served.items()}
    asked, said, early, whole = settle(served, source)
    assert early == whole
    assert asked == 192 or said == whole
