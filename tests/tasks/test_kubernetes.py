"""Manifests hold against the schemas that Kubernetes publishes, and say what the spec says.

Run it: `python -m pytest tests/tasks/test_kubernetes.py`
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from specs.errors import InputError
from specs.load import load_spec
from tasks.deployment.kubernetes import manifests

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "nvcr.io/nvidia/tensorrt-llm/release@sha256:" + "0" * 64
SPECS = sorted(path.stem for path in (ROOT / "specs").glob("*.yaml"))


def rendered(name: str, *overrides: str) -> dict[str, dict[str, Any]]:
    spec = load_spec(ROOT / "specs" / f"{name}.yaml", [f"deploy.image={IMAGE}", *overrides]).to_dict()
    return {each["kind"]: each for each in manifests(spec, "0123abc")}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("version", ["1.29", "1.34"])
def test_manifests_hold_against_the_published_schemas(name: str, version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for each in rendered(name).values():
        kubernetes_validate.validate(each, version, strict=True)


def test_schemas_would_refuse_a_wrong_key() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    wrong = rendered("llama4-maverick-b200")["Deployment"]
    wrong["spec"]["template"]["spec"]["containers"][0]["prots"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.34", strict=True)


def test_maverick_asks_for_eight_gpus_and_is_recreated() -> None:
    deployment = rendered("llama4-maverick-b200")["Deployment"]["spec"]
    (server,) = deployment["template"]["spec"]["containers"]
    assert server["resources"]["limits"] == {"nvidia.com/gpu": "8"} and server["image"] == IMAGE
    assert deployment["strategy"] == {"type": "Recreate"}
    assert server["startupProbe"]["failureThreshold"] * server["startupProbe"]["periodSeconds"] == 1800


def test_blue_green_never_has_less_than_one_server() -> None:
    strategy = rendered("llama4-scout-h200")["Deployment"]["spec"]["strategy"]
    assert strategy["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_image_by_tag_is_refused() -> None:
    spec = load_spec(ROOT / "specs" / "llama4-maverick-b200.yaml", ["deploy.image=release:1.2.1"]).to_dict()
    with pytest.raises(InputError, match="release:1.2.1, not one named by digest"):
        manifests(spec)


def test_command_prints_what_kubectl_reads() -> None:
    command = [sys.executable, "-m", "tasks.deployment.kubernetes", "specs/llama4-scout-h200.yaml"]
    run = subprocess.run(
        [*command, "--set", f"deploy.image={IMAGE}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    kinds = [each["kind"] for each in yaml.safe_load_all(run.stdout)]
    assert kinds == ["PersistentVolumeClaim", "Deployment", "Service", "PodDisruptionBudget"]
