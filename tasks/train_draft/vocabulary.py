"""The draft's own, smaller vocabulary: the target tokens that answers use most.

Refuses to be needed: with the target's full vocabulary there is no d2t and nothing here runs.
Run it: nothing to run; `python -m pytest tests/tasks/test_train_draft.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch


def choose(answers: Iterable[Iterable[int]], size: int, vocab_size: int) -> torch.Tensor:
    """d2t [size]: offsets such that draft token i means target token i + d2t[i]; the most frequent, in id order.

    Unused places are filled with the lowest ids that answers never used, so any size up to the target's works.
    """
    counts: Counter[int] = Counter()
    for tokens in answers:
        counts.update(tokens)
    ranked = [token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    ranked += [token for token in range(vocab_size) if token not in counts]
    kept = torch.tensor(sorted(ranked[:size]))
    return kept - torch.arange(size)


def covered_share(answers: Iterable[Iterable[int]], d2t: torch.Tensor) -> float:
    """Share of answer tokens that the draft vocabulary can say at all: an upper bound of acceptance."""
    kept = set((torch.arange(len(d2t)) + d2t).tolist())
    total = hits = 0
    for tokens in answers:
        for token in tokens:
            total += 1
            hits += token in kept
    return hits / max(total, 1)
