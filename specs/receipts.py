"""What a stage hands to the next: a small frozen record, never a tensor.

What it is: stage, key, state, where the artifact is, its digest, size and metrics.
What it refuses to be: a carrier of results. Results live in the store under `uri`.
Run it: `kilotok run SPEC --json` prints one per stage.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

STATES = ("built", "cached", "failed")


@dataclass(frozen=True)
class Receipt:
    """One stage of one build; JSON in, JSON out."""

    stage: str
    key: str
    state: str
    uri: str = ""
    digest: str = ""
    size_bytes: int = 0
    seconds: float = 0.0
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"state {self.state!r} is none of {STATES}")

    def to_json(self) -> dict[str, Any]:
        """A plain dict, ready for json.dumps."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Receipt:
        """The receipt that `to_json` wrote; fields of newer versions are ignored."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in record.items() if name in known})
