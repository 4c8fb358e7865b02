"""Which tokens each slot's cache holds, and which slot a prompt goes to: prompt-prefix reuse.

What it is: a longest-common-prefix search over all slots. A prompt that continues what a free slot holds stays there;
one that shares a beginning with any slot, running or not, gets that part copied into the free slot that was used
longest ago. A row's keys and values have the same bits however they were computed, so reuse cannot change an answer.
What it refuses to be: paged. A slot's cache is one piece, and a copy costs less than computing sixteen tokens.
Run it: `python -m pytest tests/engine_plugins/test_prefix_reuse.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MIN_TOKENS = 16  # a shorter common beginning is not worth a copy


class Placement(NamedTuple):
    """Where a prompt goes: positions 0 .. reused-1 are in `source`'s cache already."""

    slot: int
    source: int
    reused: int


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens are equal."""
    size = min(len(a), len(b))
    return next((i for i in range(size) if a[i] != b[i]), size)


class Slots:
    """Free slots, the least recently used first, and the tokens whose keys and values each slot holds."""

    def __init__(self, num_slots: int) -> None:
        self.free = list(range(num_slots))
        self._held: list[Sequence[int]] = [()] * num_slots

    def hold(self, slot: int, tokens: Sequence[int]) -> None:
        """`tokens` of the slot are known; all but the last are in its caches."""
        self._held[slot] = tokens

    def take(self, prompt: Sequence[int]) -> Placement:
        """The slot for a prompt. The last common token is computed again: the draft's row there needs its successor."""
        common, source = max((common_prefix(prompt, held), slot) for slot, held in enumerate(self._held))
        slot = self.free[0]
        if common < MIN_TOKENS:
            source, common = slot, 1
        elif source in self.free and common == len(self._held[source]):
            slot = source
        self.free.remove(slot)
        self.hold(slot, prompt[:common])
        return Placement(slot, source, common - 1)

    def give_back(self, slot: int, tokens: Sequence[int]) -> None:
        """The slot is free; what it holds stays until another prompt needs the place."""
        self.hold(slot, tokens)
        self.free.append(slot)

    def borrow(self) -> int:
        """A free slot to overwrite; it stays free."""
        self.hold(self.free[0], ())
        return self.free[0]
