"""What changed since the last good build, in words and figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.report import lineage
from tasks.report.collect import collect
from tasks.report.findings import findings
from tasks.report.markdown import render as markdown
from tests.tasks.report_data import make_job


def test_a_changed_setting_is_named_with_both_values(tmp_path: Path) -> None:
    changes = collect(make_job(tmp_path))["changes"]
    assert changes["inputs"] == [{"stage": "train_draft", "what": "draft.training.epochs 2 -> 3"}]


def test_a_stage_whose_old_artifact_is_gone_is_still_named(tmp_path: Path) -> None:
    changes = collect(make_job(tmp_path))["changes"]
    assert "build_engine" in changes["unexplained"]


def test_the_first_build_has_nothing_to_compare_with(tmp_path: Path) -> None:
    assert collect(make_job(tmp_path, last_good=False))["changes"] is None


def test_slower_is_worse_and_shorter_is_better() -> None:
    before = {"latency.tps_per_user.p50": 100.0, "latency.ttft_ms.p50": 100.0}
    rows = {row["metric"]: row["better"] for row in lineage.deltas(before, dict.fromkeys(before, 90.0))}
    assert rows == {"latency.tps_per_user.p50": False, "latency.ttft_ms.p50": True}


def test_a_small_movement_is_neither_good_nor_bad() -> None:
    assert lineage.deltas({"acceptance.length": 2.50}, {"acceptance.length": 2.51})[0]["better"] is None


def test_shares_move_in_points_not_in_percent_of_themselves() -> None:
    row = lineage.deltas({"accuracy.code.served": 0.010}, {"accuracy.code.served": 0.015})[0]
    assert row["better"] is None


def test_the_three_factors_multiply_to_the_change_of_speed() -> None:
    before = {"latency.tps_per_user.p50": 200.0, "acceptance.length": 2.0, "cycle.us": 9000.0}
    after = {"latency.tps_per_user.p50": 260.0, "acceptance.length": 2.5, "cycle.us": 8800.0}
    split = lineage.speed_split(before, after)
    assert split and split["acceptance"] * split["cycle"] * split["outside"] == pytest.approx(
        split["speed"]
    ) == pytest.approx(1.3)


def test_a_factor_that_was_not_measured_leaves_the_change_whole() -> None:
    assert lineage.speed_split({"acceptance.length": 2.0}, {"acceptance.length": 2.5}) is None


def test_a_stage_costs_the_time_of_the_devices_it_holds(tmp_path: Path) -> None:
    report = collect(make_job(tmp_path))
    rows = {row["stage"]: row for row in report["stages"]}
    assert rows["train_draft"]["cost"] == pytest.approx(2 * 4.5 * 121.6 / 3600)
    assert (rows["promote"]["cost"], rows["train_draft"]["currency"]) == (0.0, "USD")
    assert "0.48 USD in all." in findings(report)["stages"] and "0.30 USD" in markdown(report)
    assert lineage.stages([{"stage": "validate", "state": "built", "seconds": 9.0}], {})[0]["cost"] is None


def test_only_the_record_s_own_model_is_held_to_the_record(tmp_path: Path) -> None:
    report = collect(make_job(tmp_path))
    assert "of the record" not in findings(report)["speed"]
    report["provenance"]["spec"] = {"model": {"source": "hf://meta-llama/Llama-4-Maverick-17B-128E-Instruct"}}
    assert "% of the record for one user, and" in findings(report)["speed"].replace(" %", "%")
