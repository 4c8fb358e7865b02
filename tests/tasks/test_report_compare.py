"""Two builds side by side, all builds in a row, and the model card."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from specs.errors import InputError
from tasks import report as pages
from tasks.report import history
from tasks.report.collect import collect
from tasks.report.comparison import inputs
from tasks.report.comparison import render as compare
from tasks.report.model_card import render as model_card
from tests.tasks.report_data import make_job


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return json.loads(json.dumps(collect(make_job(tmp_path_factory.mktemp("compare")))))


def older(report: dict[str, Any]) -> dict[str, Any]:
    before = copy.deepcopy(report)
    before["metrics"]["latency.tps_per_user.p50"] *= 0.9
    before["metrics"]["acceptance.length"] *= 0.9
    before["provenance"]["packages"]["torch"] = "2.12.1"
    return before


def test_a_build_compared_with_itself_shows_no_difference(report: dict[str, Any]) -> None:
    page = compare(report, report)
    assert "The speed for one user is the same." in page and "Both builds were made from the same inputs." in page


def test_the_cause_of_a_faster_build_is_named(report: dict[str, Any]) -> None:
    assert "rose by 11.1 %: +11.1 % from tokens per cycle." in compare(older(report), report).replace(
        "\N{NO-BREAK SPACE}", " "
    )


def test_a_package_that_changed_is_listed_with_both_versions(report: dict[str, Any]) -> None:
    assert {"kind": "package", "name": "torch", "before": "2.12.1", "after": "2.13.0"} in inputs(older(report), report)


def test_two_empty_reports_can_be_compared(tmp_path: Path) -> None:
    from tasks.job import Job

    bare = collect(Job("report", {"name": "<b>"}, tmp_path, {}, tmp_path))
    page = compare(bare, bare)
    assert page.count("ot measured") > 5 and "<b></b>" not in page and "&lt;b&gt;" in page


def test_a_night_that_failed_is_a_row_and_a_gap() -> None:
    builds = [
        {"build": f"b{night}", "spec": "x", "verdict": "PASS", "metrics": {"acceptance.length": 2.0 + night}}
        for night in range(3)
    ]
    builds[1] |= {"verdict": "FAILED", "metrics": {}, "error": {"what": "disk <full>"}}
    page = history(builds)
    assert page.count("<tr>") == 4 and "disk &lt;full&gt;" in page


def test_a_measurement_that_was_found_in_the_store_is_no_second_dot() -> None:
    stages = [[{"stage": "validate", "state": state}] for state in ("built", "cached", "built")]
    builds = [
        {"build": f"b{n}", "spec": "x", "verdict": "PASS", "metrics": {"acceptance.length": 2.5}, "stages": rows}
        for n, rows in enumerate(stages)
    ]
    assert "2 builds" in history(builds) and history(builds).count("<tr>") == 4


def test_no_build_at_all_is_a_page_too() -> None:
    assert "No build" in history([]) or "no build" in history([])


def front_matter(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match
    return yaml.safe_load(match.group(1))


def test_the_model_card_carries_results_a_hub_can_read(report: dict[str, Any]) -> None:
    front = front_matter(model_card(report))
    results = {row["dataset"]["name"]: row["metrics"][0]["value"] for row in front["model-index"][0]["results"]}
    assert results["code"] == round(report["metrics"]["accuracy.code.served"], 4) and "all" not in results


def test_a_build_that_did_not_pass_is_not_offered_for_release(report: dict[str, Any]) -> None:
    failed = {**report, "verdict": "FAIL", "reason": "1 gate of 7 failed."}
    card = model_card(failed)
    assert "**Not for release.**" in card and "model-index" not in front_matter(card)


def test_the_card_names_the_source_on_the_hub(report: dict[str, Any]) -> None:
    public = copy.deepcopy(report)
    public["provenance"]["spec"] = {"model": {"source": "hf://meta-llama/Llama-4-Maverick-17B-128E-Instruct"}}
    assert front_matter(model_card(public))["base_model"] == "meta-llama/Llama-4-Maverick-17B-128E-Instruct"


def test_a_hostile_name_cannot_add_front_matter(report: dict[str, Any]) -> None:
    card = model_card({**report, "spec": "x\n---\nlicense: mit\n"})
    assert "license" not in front_matter(card)


def test_builds_are_compared_by_their_records(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report))
    record = {"build": "b1", "report": str(tmp_path / "index.html")}
    page = pages.compare(record, record, tmp_path / "new" / "folder")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_build_without_a_report_is_named(report: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="build b7 has no report"):
        pages.compare({"build": "b7", "report": None}, report, tmp_path)


def test_a_build_id_cannot_choose_where_the_page_goes(report: dict[str, Any], tmp_path: Path) -> None:
    page = pages.compare({**report, "build": "../../x"}, report, tmp_path)
    assert page.parent == tmp_path
