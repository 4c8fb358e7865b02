"""How many tokens a cycle of speculative decoding would emit, replayed on answers the head has not seen.

The answers are the target's greedy output, so a draft is accepted exactly when it says the answer's next token: walking
the answer cycle by cycle gives the engine's acceptance length without an engine. Refuses to sample.
Run it: nothing to run; `python -m pytest tests/tasks/test_train_draft.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Cycles of one domain."""

    tokens: int = 0
    cycles: int = 0
    tried: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add(self, right: Sequence[Sequence[bool]], num_drafts: int) -> None:
        """`right[s][r]`: is step s of the chain starting at row r right. Row r+s must exist to be tried."""
        self.tried = self.tried or [0] * num_drafts
        self.accepted = self.accepted or [0] * num_drafts
        row, rows = 0, len(right[0])
        while row < rows:
            taken = 0
            for step in range(min(num_drafts, rows - row)):
                self.tried[step] += 1
                if not right[step][row]:
                    break
                self.accepted[step] += 1
                taken += 1
            self.tokens += min(taken + 1, rows - row)
            self.cycles += 1
            row += taken + 1

    @property
    def length(self) -> float:
        """Tokens per cycle, the target's own included; between 1 and num_drafts + 1."""
        return self.tokens / self.cycles if self.cycles else 0.0


def replay(answers: Iterable[tuple[str, Sequence[Sequence[bool]]]], num_drafts: int) -> dict[str, float]:
    """`acceptance.length`, `.length.<domain>` and conditional `.position.<i>` over (domain, right) pairs."""
    total = Tally()
    domains: dict[str, Tally] = defaultdict(Tally)
    for domain, right in answers:
        total.add(right, num_drafts)
        domains[domain].add(right, num_drafts)
    metrics = {"acceptance.length": total.length}
    metrics.update({f"acceptance.length.{name}": tally.length for name, tally in sorted(domains.items())})
    for i, (tried, accepted) in enumerate(zip(total.tried, total.accepted, strict=True), start=1):
        metrics[f"acceptance.position.{i}"] = accepted / max(tried, 1)
    return metrics
