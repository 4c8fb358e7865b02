"""infra/ says what the code says: metric names, commands, images, variables. What can be checked without a cluster is.

Run it: `python -m pytest tests/infra`
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine_plugins.native.admission import Admission
from engine_plugins.native.metrics import render_metrics
from engine_plugins.native.scheduler import Scheduler
from tests.engine_plugins.toy_engine import ToyEngine

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
NAME = re.compile(r"\bkilotok[_:][a-z_:]+\b")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Metric names of the native server's own page, with their label names."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.json").write_text("{}")
    page = render_metrics(Scheduler(ToyEngine(folder), slots=4, draft_tokens=3, max_queue=4), Admission())
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(kilotok_\w+)(?:\{(.*?)\})? ", page, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r"(\w+)=", labels))
    return found


@pytest.fixture(scope="module")
def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((INFRA / "monitoring" / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_rules_ask_only_for_what_is_served_or_recorded(
    rules: list[dict[str, Any]], served: dict[str, set[str]]
) -> None:
    known = set(served) | {rule["record"] for rule in rules if "record" in rule}
    asked = {name for rule in rules for name in NAME.findall(rule["expr"])}
    assert asked and asked <= known, asked - known


def test_dashboard_asks_only_for_what_is_served_or_recorded(
    rules: list[dict[str, Any]], served: dict[str, set[str]]
) -> None:
    panels = json.loads((INFRA / "monitoring" / "grafana.json").read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    known = set(served) | {rule["record"] for rule in rules if "record" in rule}
    asked = {name for expression in expressions for name in NAME.findall(expression)}
    assert asked <= known, asked - known


def test_labels_in_rules_exist(rules: list[dict[str, Any]], served: dict[str, set[str]]) -> None:
    labels = set().union(*served.values()) | {"spec", "job"}
    used = {
        label.strip()
        for rule in rules
        for group in re.findall(r"(?:by|on) \(([^)]*)\)", rule["expr"])
        for label in group.split(",")
    }
    assert used <= labels, used - labels


def test_every_alert_says_what_and_what_to_do(rules: list[dict[str, Any]]) -> None:
    for rule in rules:
        if "alert" in rule:
            assert {"summary", "runbook"} <= set(rule["annotations"]) and rule["labels"]["severity"], rule["alert"]


def test_compose_takes_its_secrets_from_the_environment_and_its_images_are_pinned() -> None:
    text = (INFRA / "compose" / "compose.yaml").read_text()
    services = yaml.safe_load(text)["services"]
    assert {"database", "server", "objects", "worker"} <= set(services)
    example = (INFRA / "compose" / ".env.example").read_text()
    for variable in set(re.findall(r"\$\{(\w+)", text)):
        assert f"{variable}=" in example, variable
    for name, service in services.items():
        image = service.get("image", "")
        assert "build" in service or re.search(r":-[^}]+:[^}]*\d", image), name
        assert ":latest" not in image
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|KEY", key):
                assert str(value).startswith("${"), key
    assert re.findall(r"^\w+=.+$", example, re.MULTILINE) == [], "the example holds no value"
    assert ".env" in (ROOT / ".gitignore").read_text().split()


def test_compose_builds_from_files_that_are_there() -> None:
    compose = INFRA / "compose" / "compose.yaml"
    for service in yaml.safe_load(compose.read_text())["services"].values():
        if "build" in service:
            assert (compose.parent / service["build"]["context"]).resolve() == ROOT
            dockerfile = ROOT / service["build"]["dockerfile"]
            sources = re.findall(r"^COPY (?!\$)(.+) \S+$", dockerfile.read_text(), re.MULTILINE)
            missing = [source for line in sources for source in line.split() if not (ROOT / source).exists()]
            assert sources and not missing, missing


def test_trtllm_image_is_built_on_a_digest_and_runs_the_front() -> None:
    text = (INFRA / "images" / "trtllm.Dockerfile").read_text()
    assert "ARG RELEASE\nFROM ${RELEASE}" in text and "@sha256:" in text
    module = re.search(r'ENTRYPOINT \["python", "-m", "([\w.]+)"\]', text)
    assert module and (ROOT / f"{module[1].replace('.', '/')}.py").is_file()


def test_systemd_unit_is_accepted_by_systemd(tmp_path: Path) -> None:
    """Its program is not on this machine, so another one stands in for it; nothing else may be complained about."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze here")
    text = (INFRA / "systemd" / "kilotok-worker.service").read_text()
    program = re.search(r"^ExecStart=(\S+) ", text, re.MULTILINE)
    assert program
    unit = tmp_path / "kilotok-worker.service"
    unit.write_text(text.replace(program[1], "/bin/sh").replace("User=kilotok\n", ""))
    run = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert "kilotok-worker.service" not in run.stderr, run.stderr
    unit.write_text(unit.read_text().replace("Restart=always", "Restart=allways"))
    run = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert "kilotok-worker.service" in run.stderr, "the check cannot fail"


def test_pool_of_the_unit_is_the_spec_s() -> None:
    unit = (INFRA / "systemd" / "kilotok-worker.service").read_text()
    pools = {entry["work_pool"]["name"] for entry in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
    assert re.search(r"--pool (\S+)", unit)[1] in pools  # type: ignore[index]


def test_slurm_script_is_shell_and_its_command_is_ours() -> None:
    script = INFRA / "slurm" / "rebuild.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "kilotok run" in script.read_text()


def test_slurm_script_trains_on_the_nodes_it_was_given(tmp_path: Path) -> None:
    """To the first refusal: too many processes for the batch is only known with all of its arguments in place."""
    script = INFRA / "slurm" / "train_draft.sbatch"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    given = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_NNODES": "4"}
    command = ["bash", str(script), str(ROOT / "specs" / "tiny-llama4-cpu.yaml"), str(tmp_path / "store"), "3"]
    run = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "launch has 12 processes for a batch of 8" in run.stderr, run.stderr
