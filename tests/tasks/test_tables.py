"""Tables: a violated schema names row, column and value."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from specs.errors import IntegrityError
from tasks.acceptance import Acceptance, acceptance_frame, acceptance_metrics
from tasks.tables import check, write
from tasks.validate.tables import Problems, Requests, requests_frame


def row(**changes: Any) -> dict[str, Any]:
    good = {
        "id": "a",
        "domain": "code",
        "profile": "one_in_flight",
        "user": 0,
        "intended_s": 1.0,
        "sent_s": 1.0,
        "status": 200,
        "retries": 0,
        "finish_reason": "stop",
        "output_tokens": 10,
        "usage_tokens": 11,
        "chunks": 4,
        "first_chunk_tokens": 3,
        "ttft_ms": 5.0,
        "ttft_intended_ms": 5.0,
        "duration_ms": 15.0,
        "tps_user": 700.0,
        "e2e_tps": 660.0,
        "itl_ms_p50": 1.0,
        "itl_ms_p99": 2.0,
        "accepted": 6,
        "rejected": 3,
        "cycles": 3,
        "accepted_by_position": [3, 2, 1],
        "ok": True,
        "findings": "",
        "text": "not in the table",
    }
    return {**good, **changes}


def test_good_rows_survive_a_round_trip(tmp_path: Any) -> None:
    frame = requests_frame([row(), row(id="b", ok=False, ttft_ms=float("nan"), findings="stall")])
    write(frame, tmp_path / "requests.parquet")
    again = pd.read_parquet(tmp_path / "requests.parquet")
    assert check(again, Requests)["accepted_by_position"][0] == "[3, 2, 1]"
    assert "text" not in again


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"tps_user": -3.0}, ["row 1", "tps_user", "-3.0"]),
        ({"id": ""}, ["row 1", "column id"]),
        ({"status": 700}, ["row 1", "status", "700"]),
        ({"first_chunk_tokens": 11}, ["row 1", "first chunk"]),
        ({"ttft_ms": float("nan")}, ["row 1", "time to first token"]),
    ],
)
def test_a_bad_row_is_named(changes: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(IntegrityError) as caught:
        requests_frame([row(), row(**changes)], "requests.parquet")
    for name in [*names, "requests.parquet"]:
        assert name in str(caught.value)


def problem(**changes: Any) -> dict[str, Any]:
    good = {"task": "code", "id": "a", "side": "source", "sample": 0, "answer": "", "target": "1", "correct": 1.0}
    return {**good, **changes}


@pytest.mark.parametrize("changes", [{"side": "other"}, {"correct": 1.5}, {"correct": float("nan")}, {}])
def test_a_bad_problem_is_refused(changes: dict[str, Any]) -> None:
    """The last is a duplicate: the same problem, side and sample twice."""
    with pytest.raises(IntegrityError):
        check(pd.DataFrame([problem(), problem(**{"id": "b", **changes} if changes else {})]), Problems)


def test_a_column_that_no_model_has_is_refused() -> None:
    with pytest.raises(IntegrityError):
        check(pd.DataFrame([problem(guess="?")]), Problems)


def counts(cycles: int, *accepted: int) -> dict[str, Any]:
    return {"cycles": cycles, "accepted_by_position": list(accepted)}


def test_acceptance_by_domain_and_position() -> None:
    frame = acceptance_frame([("code", counts(10, 8, 6, 3)), ("math", counts(10, 5, 2, 1)), ("idle", counts(0))], 3)
    metrics = acceptance_metrics(frame)
    assert metrics["acceptance.length"] == pytest.approx(1 + 25 / 20)
    assert metrics["acceptance.length.code"] == pytest.approx(2.7)
    assert metrics["acceptance.position.2"] == pytest.approx(8 / 13)
    assert metrics["acceptance.position.3.math"] == pytest.approx(0.5)
    assert "acceptance.length.idle" not in metrics  # not one cycle: nothing to say, nothing to pass


def test_more_accepted_than_drafted_is_refused() -> None:
    with pytest.raises(IntegrityError):
        acceptance_frame([("code", counts(10, 11, 1, 1))], 3)
    assert Acceptance.to_schema()
