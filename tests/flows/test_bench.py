"""`kilotok bench` as scripts see it. Run it: `python -m pytest tests/flows/test_bench.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flows.cli import main
from flows.verbs.bench import table


def test_without_a_bundle_it_says_how_to_get_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", "--store", str(tmp_path)]) == 2
    assert "kilotok run" in capsys.readouterr().err


def test_a_table_keeps_every_column_of_every_row() -> None:
    text = table([{"op": "router", "us": 1.25}, {"op": "verify", "us": 0.5, "split_us": {"accept": 0.25}}])
    assert text.splitlines()[0].split() == ["op", "us", "split_us"]
    assert text.splitlines()[2].split(maxsplit=2) == ["verify", "0.5", "accept 0.25"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["ops", "--device", "cuda"], "no CUDA device"),
        (["slice"], "no CUDA device"),
        (["slice", "--device", "cpu"], "measured on a GPU"),
    ],
)
def test_without_a_gpu_nothing_is_made_up(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", *argv]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
