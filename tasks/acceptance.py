"""Acceptance by domain and position: of a head on held-back answers, of a server by each request's own usage.

A cycle drafts k tokens and yields 1 + (accepted drafts). With a_i cycles that accepted position i (1-based):
  length        1 + sum(a_i) / cycles                tokens per cycle
  position i    a_i / a_(i-1), a_0 = cycles          accepted, given that the positions before it were

It refuses to guess: a domain without a single cycle has no length (NaN), and so passes no gate.

A golden curve is what a good head is known to reach. A position falls short of it by `golden - rate`, less what chance
explains at 95%; the worst shortfall of all positions is one metric, `acceptance.golden_gap`.

Run: `python -m pytest tests/tasks/test_tables.py`
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import pandas as pd
import pandera.pandas as pa
from pandera.typing import Series

from tasks.tables import check

ALL = "all"


class Acceptance(pa.DataFrameModel):
    """Per domain (and `all`): tokens per cycle, and how often draft position `position` was accepted once drafted."""

    domain: Series[str] = pa.Field(str_length={"min_value": 1})
    position: Series[int] = pa.Field(ge=1)
    cycles: Series[int] = pa.Field(ge=0)
    drafted: Series[int] = pa.Field(ge=0)
    accepted: Series[int] = pa.Field(ge=0)
    rate: Series[float] = pa.Field(ge=0, le=1, nullable=True)
    length: Series[float] = pa.Field(ge=1, nullable=True)

    class Config:
        strict = True
        unique = ["domain", "position"]

    @pa.dataframe_check(error="no more accepted than drafted")
    def accepted_within_drafted(cls, frame: pd.DataFrame) -> Series[bool]:  # noqa: N805
        return frame["accepted"] <= frame["drafted"]


def acceptance_frame(usages: Iterable[tuple[str, Mapping[str, Any]]], draft_tokens: int) -> pd.DataFrame:
    """Rows by domain and position from (domain, flat counts as `client.speculation` returns them)."""
    cycles: dict[str, int] = defaultdict(int)
    accepted: dict[str, list[int]] = defaultdict(lambda: [0] * draft_tokens)
    for domain, counts in usages:
        for name in (domain, ALL) if domain else (ALL,):
            cycles[name] += counts["cycles"]
            for position, number in enumerate(counts["accepted_by_position"][:draft_tokens]):
                accepted[name][position] += number
    rows = []
    for domain in sorted(cycles, key=lambda name: (name != ALL, name)):
        n, by_position = cycles[domain], accepted[domain]
        length = 1 + sum(by_position) / n if n else float("nan")
        for position, number in enumerate(by_position, 1):
            reached = n if position == 1 else by_position[position - 2]
            rate = number / reached if reached else float("nan")
            rows.append((domain, position, n, reached, number, rate, length))
    frame = pd.DataFrame(rows, columns=["domain", "position", "cycles", "drafted", "accepted", "rate", "length"])
    whole = ("position", "cycles", "drafted", "accepted")  # of no rows too: an engine without a draft
    frame = frame.astype({"domain": str, "rate": float, "length": float, **dict.fromkeys(whole, "int64")})
    return check(frame, Acceptance, "acceptance.parquet")


def acceptance_metrics(frame: pd.DataFrame) -> dict[str, float]:
    """`acceptance.length`, `acceptance.length.<domain>`, `acceptance.position.<i>`, and the positions by domain."""
    metrics: dict[str, float] = {}
    for row in frame.itertuples():
        whole = row.domain == ALL
        if row.position == 1:
            metrics["acceptance.length" if whole else f"acceptance.length.{row.domain}"] = float(row.length)
        metrics[
            f"acceptance.position.{row.position}" if whole else f"acceptance.position.{row.position}.{row.domain}"
        ] = float(row.rate)
    return {name: value for name, value in metrics.items() if value == value}


def golden_gap(frame: pd.DataFrame, golden: Mapping[str, Sequence[float]]) -> tuple[float, str]:
    """(worst shortfall beyond noise, where). NaN when a position of the curve was not measured: that is no pass."""
    z = NormalDist().inv_cdf(0.95)
    measured = {(row.domain, row.position): row for row in frame.itertuples()}
    worst, where = float("-inf"), ""
    for domain, curve in golden.items():
        for position, expected in enumerate(curve, 1):
            row = measured.get((domain, position))
            if row is None or not row.drafted:
                return float("nan"), f"position {position} of {domain}"
            noise = z * (expected * (1 - expected) / row.drafted) ** 0.5
            if expected - row.rate - noise > worst:
                worst, where = expected - row.rate - noise, f"position {position} of {domain}"
    return worst, where
