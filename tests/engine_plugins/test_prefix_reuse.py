"""Prompt-prefix reuse: less work, the same answers. Run: `pytest tests/engine_plugins/test_prefix_reuse.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine_plugins.native.engine import Engine, SamplingParams
from engine_plugins.native.slots import MIN_TOKENS, Slots
from tests.engine_plugins.models import tokens

PARAMS = SamplingParams(max_tokens=30, ignore_eos=True)


@pytest.fixture(params=["tiny", "fp8"])
def bundle(request: pytest.FixtureRequest, bundles: Path) -> Path:
    return bundles / "tiny" if request.param == "tiny" else request.getfixturevalue("fp8_bundle")


def answer(engine: Engine, prompt: list[int], reused: int) -> list[int]:
    request = engine.submit(prompt, PARAMS)
    while engine.has_work:
        engine.step()
    assert request.reused == reused
    return request.output_ids


def test_the_same_prompt_again_computes_one_token_and_answers_the_same(
    bundle: Path, open_engine: Callable[..., Engine]
) -> None:
    engine, prompt = open_engine(bundle), tokens(90)
    first = answer(engine, prompt, reused=0)
    assert answer(engine, prompt, reused=89) == first


def test_a_conversation_goes_on_where_it_stopped(bundle: Path, open_engine: Callable[..., Engine]) -> None:
    engine, prompt = open_engine(bundle), tokens(60)
    said = answer(engine, prompt, reused=0)
    longer = prompt + said + tokens(20, seed=9)
    assert answer(engine, longer, reused=89) == answer(open_engine(bundle), longer, reused=0)


def test_a_shared_beginning_is_copied_while_its_owner_runs(bundle: Path, open_engine: Callable[..., Engine]) -> None:
    """Over the 16 positions of a cache block and the 32 of a chunk, and the owner is not disturbed."""
    engine, shared = open_engine(bundle), tokens(75)
    prompts = [shared[:n] + tokens(10, seed=n) for n in (75, 17, 32, 50)]
    owner = engine.submit(prompts[0], PARAMS)
    engine.step()
    others = [engine.submit(p, PARAMS) for p in prompts[1:]]
    while engine.has_work:
        engine.step()
    assert [r.reused for r in others] == [16, 31, 49]
    alone = [answer(open_engine(bundle), p, reused=0) for p in prompts]
    assert [r.output_ids for r in (owner, *others)] == alone


def test_a_cancelled_prefill_leaves_only_what_it_computed(bundle: Path, open_engine: Callable[..., Engine]) -> None:
    engine, prompt = open_engine(bundle), tokens(200)
    cancelled = engine.submit(prompt, PARAMS)
    engine.step()
    engine.cancel(cancelled.id)
    engine.step()
    assert answer(engine, prompt, reused=Engine.PREFILL_CHUNK) == answer(open_engine(bundle), prompt, reused=0)


def test_a_teacher_forced_pass_forgets_what_its_slot_held(bundle: Path, open_engine: Callable[..., Engine]) -> None:
    engine, prompt = open_engine(bundle), tokens(40)
    first = answer(engine, prompt, reused=0)
    for _ in range(4):
        engine.logits(tokens(100, seed=3))
        answer(engine, tokens(5, seed=1), reused=0)  # moves the slot behind the others
    assert answer(engine, prompt, reused=0) == first


def test_a_prompt_that_branches_off_leaves_the_conversation_alone() -> None:
    slots, shared = Slots(3), list(range(100))
    slot = slots.take(shared + [1000]).slot
    slots.give_back(slot, shared + [1000, 1001, 1002])
    branch = slots.take(shared + [2000])
    assert (branch.source, branch.reused, branch.slot != slot) == (slot, 99, True)
    assert slots.take(shared + [1000, 1001, 1002, 1003]) == (slot, slot, 102)


def test_a_short_common_beginning_takes_the_oldest_slot() -> None:
    slots = Slots(2)
    slots.give_back(slots.take([1]).slot, list(range(MIN_TOKENS - 1)))
    assert slots.take(list(range(99))).reused == 0
