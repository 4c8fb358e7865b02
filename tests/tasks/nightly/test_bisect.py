"""The search for the input that did it, on figures by arithmetic. The whole of it: tests/flows/test_twenty_nights.py.

Run it: `python -m pytest tests/tasks/nightly/test_bisect.py`.
"""

from __future__ import annotations

import pytest

from tasks.nightly.attribution import Cause
from tasks.nightly.bisect import mixed, search, units_of

UNITS = ["code", "spec.a", "spec.b", "lock and data", "spec.c"]


def quiet(_text: str) -> None:
    return None


@pytest.mark.parametrize("culprit", UNITS)
def test_the_culprit_is_named_and_confirmed(culprit: str) -> None:
    verdict = search(UNITS, lambda chosen: 900.0 if culprit in chosen else 1000.0, quiet)
    assert verdict.culprit == culprit and verdict.confirmed
    assert len(verdict.trials) <= 6  # two ends, log2(5) rounded up, one to confirm


def test_noise_of_a_third_of_the_step_does_not_mislead() -> None:
    noise = iter([10, -20, 30, -30, 20, 10, -10])
    verdict = search(UNITS, lambda chosen: next(noise) + (900.0 if "spec.b" in chosen else 1000.0), quiet)
    assert verdict.culprit == "spec.b"


def test_a_slow_machine_is_not_taken_for_a_slow_build() -> None:
    verdict = search(UNITS, lambda _chosen: 900.0, quiet)
    assert verdict.culprit == "" and len(verdict.trials) == 2


def test_two_inputs_that_only_hurt_together_are_said_to() -> None:
    verdict = search(UNITS, lambda chosen: 900.0 if {"spec.a", "spec.c"} <= chosen else 1000.0, quiet)
    assert verdict.culprit == "spec.c" and verdict.confirmed  # the one that completes the pair


def test_either_of_two_inputs_is_not_confirmed_alone() -> None:
    verdict = search(UNITS, lambda chosen: 900.0 if {"spec.a", "spec.c"} & chosen else 1000.0, quiet)
    assert verdict.culprit == "spec.a" and not verdict.confirmed and "not alone" in verdict.text


def test_what_cannot_be_swapped_is_left_and_named() -> None:
    found = [
        Cause("code", "code.a.py", "s", "a.py changed"),
        Cause("code", "code.b.py", "s", "b.py changed"),
        Cause("spec", "spec.engine.plugins[2]", "s", "..."),
        Cause("spec", "spec.engine.plugins[3]", "s", "..."),
        Cause("packages", "package.torch", "s", "torch 1 -> 2"),
    ]
    assert units_of(found) == (["code", "spec.engine.plugins"], ["packages: torch 1 -> 2"])


def test_a_mixed_spec_takes_only_what_is_swapped() -> None:
    good, bad = {"a": {"x": 1, "y": [1, 2]}, "b": 1}, {"a": {"x": 2, "y": [3]}, "b": 2}
    assert mixed(good, bad, {"spec.a.y"}) == {"a": {"x": 1, "y": [3]}, "b": 1}
    assert good["a"]["y"] == [1, 2]
