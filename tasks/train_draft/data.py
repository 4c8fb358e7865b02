"""Answers to training batches: which tokens are learned, who is held back, what each optimizer step sees.

Everything here is a pure function of the answers, the seed and the step, so a resumed run sees what the first would
have. Refuses to tokenise: the ids are the ones the target read and wrote.
Run it: nothing to run; `python -m pytest tests/tasks/test_train_draft.py`.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from specs.errors import InputError

HELD_BACK_EVERY = 20
JITTER_TOKENS = 24  # lengths are blurred by this before sorting, so that a batch mixes domains


@dataclass(frozen=True)
class Sequence:
    """One prompt and the target's answer, as token ids."""

    id: str
    domain: str
    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]  # 1 where the token is the answer's and the next one is too

    @property
    def prompt_tokens(self) -> int:
        return self.loss_mask.index(1)

    @property
    def chains(self) -> int:
        return sum(self.loss_mask)


def answer_mask(prompt_tokens: int, answer_tokens: int) -> tuple[int, ...]:
    """The mask modelopt's loss wants: position i counts when the head, told token i, must guess answer token i+1."""
    return (0,) * prompt_tokens + (1,) * (answer_tokens - 1) + (0,)


def read_answers(path: Path, max_tokens: int) -> list[Sequence]:
    """answers.jsonl as sequences of at most `max_tokens`; too short answers teach nothing and are left out."""
    sequences = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
            prompt, answer = record["prompt_token_ids"], record["answer_token_ids"]
            identity, domain = record["id"], record["domain"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"broken answer: {error!r}", f"{path}:{number}", "run synthesize again") from None
        answer = answer[: max(0, max_tokens - len(prompt))]
        if len(answer) < 3:
            continue
        mask = answer_mask(len(prompt), len(answer))
        sequences.append(Sequence(identity, domain, (*prompt, *answer), mask))
    if not sequences:
        raise InputError("no answer is long enough to train on", str(path), "check synthesize's summary.json")
    return sequences


def split(sequences: list[Sequence]) -> tuple[list[Sequence], list[Sequence]]:
    """(training, held back): every 20th answer of each domain, at least one each, judges the head."""
    seen: dict[str, int] = {}
    train: list[Sequence] = []
    held_back: list[Sequence] = []
    for sequence in sequences:
        count = seen.get(sequence.domain, 0)
        seen[sequence.domain] = count + 1
        (train if count % HELD_BACK_EVERY else held_back).append(sequence)
    if not train:
        raise InputError("too few answers to train on", f"{len(sequences)} answers", "raise draft.data.samples")
    return train, held_back


def make_batches(sequences: list[Sequence], batch_size: int, seed: int) -> list[list[int]]:
    """Indices of sequences of similar length, fixed for the whole run so that a batch's features are one shard."""
    rng = random.Random(seed)
    order = sorted(
        range(len(sequences)), key=lambda i: len(sequences[i].token_ids) + rng.uniform(-JITTER_TOKENS, JITTER_TOKENS)
    )
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def batch_at(step: int, num_batches: int, seed: int) -> int:
    """Which batch the optimizer step sees: a fresh permutation each epoch."""
    epoch, place = divmod(step, num_batches)
    order = list(range(num_batches))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order[place]
