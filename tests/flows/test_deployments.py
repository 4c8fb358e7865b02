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
