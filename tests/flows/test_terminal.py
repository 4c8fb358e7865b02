"""The screen of a run: one line per stage, a verdict with its split."""

from __future__ import annotations

import pytest

from flows.terminal import Terminal, verdict_lines
from specs.receipts import Receipt
from tasks.plan import size_words
from tasks.runner import StageEvent


def test_a_path_in_a_reason_is_not_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal()(
        StageEvent("quantize", "finished", receipt=Receipt("quantize", "", "failed", reason="died [/var/log/a.log]"))
    )
    assert "[/var/log/a.log]" in capsys.readouterr().err


def test_a_cached_stage_needs_no_reason(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal()(StageEvent("download", "finished", receipt=Receipt("download", "ab", "cached", reason="unchanged")))
    assert "unchanged" not in capsys.readouterr().err


def test_a_heading_names_what_the_lines_below_are_of(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal()(StageEvent("draft_tokens=3 [8]", "heading"))
    assert "draft_tokens=3 [8]" in capsys.readouterr().err


def test_the_verdict_shows_acceptance_over_cycle() -> None:
    record = {
        "metrics": {"latency.tps_per_user.p50": 1000.0, "acceptance.length": 2.5},
        "verdict": "PASS",
        "gates": [],
        "report": "r",
        "endpoint": None,
    }
    text = "\n".join(verdict_lines(record))
    assert "acceptance 2.50 / cycle 2.50 ms" in text and "PASS" in text


def test_failed_gates_are_listed_with_their_reason() -> None:
    gate = {"metric": "acceptance.length", "verdict": "FAIL", "reason": "1.1 is below 2.2"}
    assert "1.1 is below 2.2" in "\n".join(verdict_lines({"metrics": {}, "verdict": "FAIL", "gates": [gate]}))


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (8.1e11, "810.0 GB"), (2e12, "2.0 TB")]
)
def test_sizes_are_decimal(count: float, text: str) -> None:
    assert size_words(count) == text
