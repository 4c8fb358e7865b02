"""Speculation changes speed, never output. Run: `pytest tests/engine_plugins/test_speculation.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine_plugins.native.engine import Engine, SamplingParams
from engine_plugins.ops.verify.reference import probabilities, verify_greedy, verify_sampling
from tests.engine_plugins.models import tokens


def test_greedy_output_is_the_same_with_and_without(
    bundles: Path, prompts: list[list[int]], open_engine: Callable[..., Engine]
) -> None:
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    batched = open_engine(bundles / "tiny").generate(prompts, params)
    alone = open_engine(bundles / "tiny", speculate=False)
    assert [c.token_ids for c in batched] == [alone.generate([p], params)[0].token_ids for p in prompts]


def test_output_equals_teacher_forced_argmax(bundles: Path, open_engine: Callable[..., Engine]) -> None:
    """Over the chunk border, with drafts in flight: what was generated is what a single pass over it would choose."""
    engine, prompt = open_engine(bundles / "tiny"), tokens(25)
    answer = engine.generate([prompt], SamplingParams(max_tokens=80, ignore_eos=True))[0].token_ids
    logits = engine.logits(prompt + answer)
    assert answer == logits[len(prompt) - 1 : -1].argmax(1).tolist()


def test_tokens_are_cycles_plus_accepted_drafts(
    bundles: Path, prompts: list[list[int]], open_engine: Callable[..., Engine]
) -> None:
    """The first token comes from the prompt's own cycle, which has no drafts."""
    engine = open_engine(bundles / "tiny", forced_acceptance=2.2)
    for done in engine.generate(prompts, SamplingParams(max_tokens=40, ignore_eos=True)):
        assert (
            0 <= 1 + done.cycles + sum(done.accepted_by_position) - len(done.token_ids) <= 1
        )  # the last cycle may be cut


@pytest.mark.parametrize("length", [1.0, 2.5, 4.0])
def test_forced_acceptance_gives_the_length_asked_for(
    bundles: Path, length: float, open_engine: Callable[..., Engine]
) -> None:
    engine = open_engine(bundles / "tiny", forced_acceptance=length)
    done = engine.generate([tokens(5)], SamplingParams(max_tokens=201, ignore_eos=True))[0]
    assert 1 + sum(done.accepted_by_position) / done.cycles == pytest.approx(length, abs=0.05)
    assert engine.counters()["forced_acceptance"] == length


def _chi_square(observed: Counter, expected: np.ndarray, total: int) -> tuple[float, int]:
    """Statistic and degrees of freedom over cells that expect at least 5; the rest is one cell."""
    big = expected * total >= 5
    cells = [(observed[int(t)], expected[t] * total) for t in np.flatnonzero(big)]
    rest = float(expected[~big].sum() * total)
    if rest > 0:
        cells.append((total - sum(o for o, _ in cells), rest))
    return sum((o - e) ** 2 / e for o, e in cells), len(cells) - 1


@pytest.mark.parametrize(("temperature", "top_p"), [(0.3, 1.0), (0.25, 0.8)])
def test_sampling_follows_the_targets_distribution(
    bundles: Path, temperature: float, top_p: float, open_engine: Callable[..., Engine]
) -> None:
    """Second and third token of 3000 requests, against probabilities from teacher-forced logits (rejection
    included)."""
    engine, prompt, total = open_engine(bundles / "tiny", verify_digests=False), tokens(9, seed=5), 3000
    seconds: dict[int, Counter] = {}
    params = [
        SamplingParams(max_tokens=3, temperature=temperature, top_p=top_p, seed=s, ignore_eos=True)
        for s in range(total)
    ]
    requests = [engine.submit(prompt, p) for p in params]
    while engine.has_work:
        engine.step()
    for request in requests:
        seconds.setdefault(request.output_ids[0], Counter())[request.output_ids[1]] += 1
    first = Counter(r.output_ids[0] for r in requests)
    checks = [(first, prompt)] + [(seconds[t], [*prompt, t]) for t, n in first.most_common(2) if n > 100]
    for observed, context in checks:
        p = probabilities(engine.logits(context)[-1], temperature, top_p)
        statistic, freedom = _chi_square(observed, p, sum(observed.values()))
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 8, (statistic, freedom)


def test_reference_rejection_sampling_is_lossless() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6) * 0.5, 2), rng.dirichlet(np.ones(6) * 0.5, 1)
    total, counts = 20000, Counter()
    for _ in range(total):
        draft = int(rng.choice(6, p=q[0]))
        counts[verify_sampling(p, q, [draft], rng.random)[0]] += 1
    statistic, freedom = _chi_square(counts, p[0], total)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 8


def test_reference_greedy_stops_at_the_first_difference() -> None:
    logits = np.eye(5, dtype=np.float32)[[3, 1, 4]]
    assert verify_greedy(logits, [3, 2]) == [3, 1]
    assert verify_greedy(logits, [3, 1]) == [3, 1, 4]


def test_a_seed_repeats_its_request_in_any_company(
    bundles: Path, prompts: list[list[int]], open_engine: Callable[..., Engine]
) -> None:
    params = SamplingParams(max_tokens=30, temperature=0.8, seed=11, ignore_eos=True)
    engine = open_engine(bundles / "tiny")
    alone = engine.generate([prompts[3]], params)[0].token_ids
    assert engine.generate(prompts, params)[3].token_ids == alone


def test_generation_up_to_the_last_position(bundles: Path, open_engine: Callable[..., Engine]) -> None:
    """Drafts must not run past max_seq_len (256), and the tokens there are still the right ones."""
    prompt, params = tokens(230), SamplingParams(max_tokens=1000, ignore_eos=True)
    fast = open_engine(bundles / "tiny").generate([prompt], params)[0]
    slow = open_engine(bundles / "tiny", speculate=False).generate([prompt], params)[0]
    assert fast.token_ids == slow.token_ids
    assert (len(fast.token_ids), fast.finish_reason) == (26, "length")


def test_drafting_less_under_load_does_not_change_greedy_output(
    bundles: Path, prompts: list[list[int]], open_engine: Callable[..., Engine]
) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    outputs = [
        [c.token_ids for c in open_engine(bundles / "tiny", row_budget=budget).generate(prompts, params)]
        for budget in (4, 8, 64)
    ]
    assert outputs[0] == outputs[1] == outputs[2]
