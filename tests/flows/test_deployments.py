"""prefect.yaml says what the specs say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def test_prefect_yaml_is_what_the_specs_render_to() -> None:
    rendered = subprocess.run(
        [sys.executable, "infra/prefect/deployments.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (ROOT / "prefect.yaml").read_text() == rendered.stdout, "run: python infra/prefect/deployments.py --write"


def test_every_spec_has_its_deployment() -> None:
    declared = {
        entry["parameters"]["spec"] for entry in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    }
    assert declared == {f"specs/{path.name}" for path in (ROOT / "specs").glob("*.yaml")}


def test_the_flow_fits_one_screen() -> None:
    assert len((ROOT / "flows" / "rebuild.py").read_text().splitlines()) <= 60


def test_a_nightly_carries_the_schedule_of_its_spec_and_a_rebuild_none() -> None:
    entries = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    by_flow = {(entry["entrypoint"].rpartition(":")[2], entry["name"]): entry["schedules"] for entry in entries}
    assert by_flow["nightly", "llama4-maverick-b200-throughput"][0]["cron"] == "0 5 * * *"
    assert {len(schedules) for (flow, _), schedules in by_flow.items() if flow == "rebuild"} == {0}


def test_no_deployment_holds_a_secret_or_a_path_of_this_machine() -> None:
    text = (ROOT / "prefect.yaml").read_text()
    assert "prefect.blocks" not in text and str(ROOT) not in text
