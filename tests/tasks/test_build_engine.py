"""Stage build_engine: what a bundle for TensorRT-LLM holds. Run: `pytest tests/tasks/test_build_engine.py`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engine_plugins.ops.compile import read_record
from specs.load import load_spec
from tasks.build_engine import build
from tasks.job import Job, Progress

MAVERICK = Path(__file__).resolve().parents[2] / "specs" / "llama4-maverick-b200.yaml"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Maverick's engine section over two small directories."""
    for name in ("checkpoint", "draft", "bundle"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    inputs = {"quantize": tmp_path / "checkpoint", "train_draft": tmp_path / "draft"}
    return Job("build_engine", load_spec(MAVERICK, []).to_dict(), tmp_path, inputs, tmp_path / "bundle")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_the_bundle_holds_kernels_for_its_gpu(job: Job) -> None:
    build(job, Progress())
    record = read_record(job.out / "plugins")
    assert record is not None
    assert record["architecture"] == "sm_100a"
    assert (job.out / "plugins" / record["file"]).stat().st_size > 100_000
    assert (job.out / "args.yaml").exists()


def test_without_nvcc_the_stage_says_so_and_builds_the_rest(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match="nvcc was not found"):
        build(job, Progress(lambda done, total, note: notes.append(note)))
    assert any("NO nvcc" in note for note in notes)
    assert (job.out / "args.yaml").exists() and read_record(job.out / "plugins") is None
