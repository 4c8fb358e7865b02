"""The tables of a validation as pandera models: a row is checked before anyone reads it, and written as Parquet.

It refuses free-form frames: a column that no model has is an error too.

Run: `python -m pytest tests/tasks/test_tables.py`
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
import pandera.pandas as pa
from pandera.typing import Series

from tasks.tables import check


class Requests(pa.DataFrameModel):
    """One row per request of the latency runs.

    Times in seconds are of one monotonic clock, valid for differences only.
    """

    id: Series[str] = pa.Field(str_length={"min_value": 1})
    domain: Series[str]
    profile: Series[str] = pa.Field(str_length={"min_value": 1})
    user: Series[int] = pa.Field(ge=0)
    intended_s: Series[float]
    sent_s: Series[float]
    status: Series[int] = pa.Field(ge=0, lt=600)
    retries: Series[int] = pa.Field(ge=0)
    finish_reason: Series[str]
    output_tokens: Series[int] = pa.Field(ge=0)
    usage_tokens: Series[int] = pa.Field(ge=0)
    chunks: Series[int] = pa.Field(ge=0)
    first_chunk_tokens: Series[int] = pa.Field(ge=0)
    ttft_ms: Series[float] = pa.Field(ge=0, nullable=True)
    ttft_intended_ms: Series[float] = pa.Field(ge=0, nullable=True)
    duration_ms: Series[float] = pa.Field(ge=0, nullable=True)
    tps_user: Series[float] = pa.Field(gt=0, nullable=True)
    e2e_tps: Series[float] = pa.Field(gt=0, nullable=True)
    itl_ms_p50: Series[float] = pa.Field(ge=0, nullable=True)
    itl_ms_p99: Series[float] = pa.Field(ge=0, nullable=True)
    accepted: Series[int] = pa.Field(ge=0)
    rejected: Series[int] = pa.Field(ge=0)
    cycles: Series[int] = pa.Field(ge=0)
    accepted_by_position: Series[str]  # JSON list
    ok: Series[bool]
    findings: Series[str]

    class Config:
        strict = True

    @pa.dataframe_check(error="a request that is ok has a time to first token")
    def ok_is_measured(cls, frame: pd.DataFrame) -> Series[bool]:  # noqa: N805 pandera calls it on the class
        return ~frame["ok"] | frame["ttft_ms"].notna()

    @pa.dataframe_check(error="the first chunk cannot hold more tokens than the answer")
    def first_chunk_within(cls, frame: pd.DataFrame) -> Series[bool]:  # noqa: N805
        return frame["first_chunk_tokens"] <= frame["output_tokens"]


class Problems(pa.DataFrameModel):
    """One row per problem, sample and side: the raw answers behind every accuracy figure."""

    task: Series[str] = pa.Field(str_length={"min_value": 1})
    id: Series[str] = pa.Field(str_length={"min_value": 1})
    side: Series[str] = pa.Field(isin=["source", "served"])
    sample: Series[int] = pa.Field(ge=0)
    answer: Series[str]
    target: Series[str]
    correct: Series[float] = pa.Field(ge=0, le=1)

    class Config:
        strict = True
        unique = ["task", "id", "side", "sample"]


def requests_frame(rows: Iterable[Mapping[str, Any]], where: str = "requests") -> pd.DataFrame:
    """Rows of `client.measure`, checked. The texts and a mock's own times stay out of the table."""
    columns = list(Requests.to_schema().columns)
    frame = pd.DataFrame([{name: row[name] for name in columns} for row in rows], columns=columns)
    frame["accepted_by_position"] = [json.dumps(list(counts)) for counts in frame["accepted_by_position"]]
    return check(frame, Requests, where)
