"""plan, predict, explain and sweep as scripts see them.

Run it: `python -m pytest tests/flows/test_predict_verbs.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from flows.cli import main
from tasks.edges.machine import gpu

ROOT = Path(__file__).resolve().parents[2]
B200, TINY = (str(ROOT / f"specs/{name}.yaml") for name in ("llama4-maverick-b200", "tiny-llama4-cpu"))


def run(argv: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main([*argv, "--store", str(tmp_path / "store")])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_predict_prints_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["predict", B200, "--json"], tmp_path, capsys)
    found = json.loads(out)
    assert code == 0 and found["hardware"]["gpus"] == 8 and found["memory_gib_per_gpu"]["total"] < 168


def test_predict_says_where_its_numbers_come_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(["predict", TINY], tmp_path, capsys)
    assert "calibration native" in out and "acceptance  assumption" in out


def test_explain_draws_the_cycle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "cycle.html"
    code, out, _ = run(["explain", B200, "--plot", str(page)], tmp_path, capsys)
    drawn = page.read_text()
    assert code == 0 and "32k draft vocabulary" in out
    assert drawn.count("<svg") == 4 and "+48.3 %" in drawn and 'name="viewport"' in drawn  # two drawings, two widths


def test_plan_shows_and_then_refuses_what_cannot_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(["plan", B200, "--set", "engine.tensor_parallel=6", "--json"], tmp_path, capsys)
    found = json.loads(out)
    assert code == 2 and err.count("\n") == 1 and "use tensor_parallel: 8" in err
    assert "use tensor_parallel: 8" in found["refused"] and len(found["rows"]) == 9


def test_plan_refuses_a_disk_that_is_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tmp_path / "tree"
    (tree / "specs/locks").mkdir(parents=True)
    (tree / "pyproject.toml").touch()
    shutil.copytree(ROOT / "specs/models/tiny-llama4", tree / "specs/models/tiny-llama4")
    shutil.copy(TINY, tree / "specs")
    lock = yaml.safe_load((ROOT / "specs/locks/tiny-llama4-cpu.yaml").read_text())
    for entry in lock["files"].values():
        entry["size"] = 10**15
    (tree / "specs/locks/tiny-llama4-cpu.yaml").write_text(yaml.safe_dump(lock))
    code, out, err = run(["plan", str(tree / "specs/tiny-llama4-cpu.yaml")], tmp_path, capsys)
    assert code == 2 and "of disk are needed" in err and "too little" in out


@pytest.mark.skipif(gpu() != "none", reason="here the plan is for this machine")
def test_a_plan_for_a_dgx_may_be_made_on_a_laptop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["plan", B200], tmp_path, capsys)
    assert code == 0 and "1000 tokens/s needs a cycle of" in out


def test_plan_names_time_and_money(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(["plan", B200, "--json"], tmp_path, capsys)
    found = json.loads(out)
    assert found["spending"]["cost"]["currency"] == "USD" and found["spending"]["device_hours"] > 1
    assert found["rows"][0]["seconds"]["low"] < found["rows"][0]["seconds"]["high"] and found["move_bytes"] > 8e11


def test_a_predicted_sweep_starts_no_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "sweep",
        TINY,
        "--over",
        "engine.draft_tokens=0..7",
        "--measure",
        "0",
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    code, out, _ = run(argv, tmp_path, capsys)
    found = json.loads(out)
    assert code == 0 and len(found["predicted"]) == 8 and not found["best"]["measured"]


def test_a_sweep_over_a_key_that_is_not_there_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(["sweep", TINY, "--over", "engine.draft_token=1..2"], tmp_path, capsys)
    assert code == 2 and "did you mean engine.draft_tokens?" in err
