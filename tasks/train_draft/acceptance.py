"""How many drafts a cycle of speculative decoding would accept, replayed on answers the head has not seen.

The answers are the target's greedy output, so a draft is accepted exactly when it says the answer's next token: walking
the answer cycle by cycle gives the engine's acceptance without an engine. Refuses to sample.
Run it: nothing to run; `python -m pytest tests/tasks/test_train_draft.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def replay(right: Sequence[Sequence[bool]], num_drafts: int) -> dict[str, Any]:
    """Cycles of one answer and how many accepted each position, as a server's usage tells them.

    `right[s][r]`: is step s of the chain starting at row r right. A chain that the answer's end cuts is no cycle: what
    it would have accepted is not known.
    """
    row, cycles, accepted = 0, 0, [0] * num_drafts
    while row + num_drafts <= len(right[0]):
        taken = 0
        while taken < num_drafts and right[taken][row]:
            accepted[taken] += 1
            taken += 1
        cycles += 1
        row += taken + 1
    return {"cycles": cycles, "accepted_by_position": accepted}
