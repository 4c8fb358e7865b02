"""The stage as a whole against mocks, its prompts and its waterfall."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from specs.errors import InputError, NetworkError
from tasks.job import Job, Progress
from tasks.validate import build
from tasks.validate.mock import MockPlan, mock_server
from tasks.validate.problems import Problem
from tasks.validate.profiles import choose
from tasks.validate.selftest import count_words
from tasks.validate.waterfall import cycle_metrics, read_counters, waterfall

ROOT = Path(__file__).parents[2]
TINY = ROOT / "specs/models/tiny-llama4"
HELD_OUT = TINY / "heldout.jsonl"
PLAN = MockPlan(ttft_ms=3, tokens_per_s=4000, answers=str(HELD_OUT), tokenizer=str(TINY / "tokenizer.json"))
GATES = [
    {"metric": "latency.tps_per_user.p50", "at_least": 300.0, "at_most": None},
    {"metric": "latency.tps_per_user.p50", "at_least": "1.5 of baseline"},
    {"metric": "latency.tps_per_user.p50", "at_least": "0.5 of last_good"},
    {"metric": "acceptance.length.code", "at_least": 2.0},
]


def make_job(folder: Path, gates: list[dict[str, Any]] | None = None, **accuracy: Any) -> Job:
    for name in ("bundle", "deploy", "out"):
        (folder / name).mkdir()
    (folder / "bundle" / "bundle.json").write_text('{"max_batch_size": 16, "max_seq_len": 2048}')
    (folder / "bundle" / "checkpoint").symlink_to(TINY)  # what is served has the source's own weights
    asked = {
        "reference": "source",
        "tasks": ["code", "math", "facts", "extract"],
        "problems": f"file:{HELD_OUT}",
        "samples": None,
        "margin": 0.05,
        "alpha": 0.05,
        "power": 0.8,
        "max_new_tokens": 128,
        "underpowered": "fail",
        "repeats": 1,
        "temperature": 0.0,
        "early_stop": False,
        "run_generated_code": False,
    }
    latency = {"profile": "held_out", "requests": 12, "max_new_tokens": 128, "prompts": None, "users": [10],
               "arrivals_per_s": []}  # fmt: skip
    acceptance = {"golden": {}, "tolerance": 0.05}
    spec = {
        "name": "t",
        "validate": {
            "accuracy": {**asked, **accuracy},
            "latency": latency,
            "acceptance": acceptance,
            "gates": GATES if gates is None else gates,
        },
        "engine": {"backend": "native", "draft_tokens": 3},
    }
    inputs = {"download": TINY, "build_engine": folder / "bundle", "deploy": folder / "deploy"}
    return Job("validate", spec, ROOT, inputs, folder / "out")


def validate(job: Job, candidate: MockPlan, original: MockPlan = PLAN) -> dict[str, Any]:
    @contextmanager
    def source(*_: Any) -> Iterator[str]:
        with mock_server(replace(original, tokens_per_s=1500)) as url:
            yield url

    with mock_server(candidate) as url:
        metrics = build(job, Progress(), serve=lambda _: url, source=source)
    return {"metrics": metrics, **json.loads((job.out / "verdict.json").read_text())}


def state_of(record: dict[str, Any], metric: str) -> str:
    return next(gate["verdict"] for gate in record["gates"] if gate["metric"] == metric)


def test_a_good_candidate_passes_with_everything_on_file(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    record = validate(job, PLAN)
    assert record["verdict"] == "PASS"
    assert record["warnings"] == ["latency.tps_per_user.p50: no earlier good build to compare with"]
    assert record["metrics"]["latency.tps_per_user.p50"] == pytest.approx(4000, rel=0.1)
    assert record["metrics"]["baseline.tps_per_user.p50"] == pytest.approx(1500, rel=0.1)
    assert record["metrics"]["accuracy.code.served"] == 1.0
    assert record["metrics"]["latency.usage_error_percent"] == 0
    assert len(pd.read_parquet(job.out / "problems.parquet")) == 512
    assert set(pd.read_parquet(job.out / "requests.parquet")["profile"]) == {"one_in_flight", "parallel_10"}
    assert set(pd.read_parquet(job.out / "acceptance.parquet")["domain"]) == {"all", "code", "extract", "facts", "math"}
    assert json.loads((job.out / "summary.json").read_text())["verdict"] == "PASS"


def test_a_worse_candidate_fails(tmp_path: Path) -> None:
    record = validate(make_job(tmp_path), replace(PLAN, wrong_every=7))
    assert record["verdict"] == "FAIL"
    assert state_of(record, "accuracy.difference") == "FAIL"


def test_an_early_stop_asks_the_source_less_and_says_the_same(tmp_path: Path) -> None:
    record = validate(make_job(tmp_path, early_stop=True), replace(PLAN, wrong_every=60))
    asked = pd.read_parquet(tmp_path / "out" / "problems.parquet").groupby("side").size()
    assert record["overall"]["verdict"] == "PASS"
    assert asked["served"] == 256
    assert asked["source"] < 64
    assert any("no further answer can change PASS" in text for text in record["warnings"])


def test_a_source_that_is_always_wrong_has_nothing_to_lose_and_passes_nothing(tmp_path: Path) -> None:
    record = validate(make_job(tmp_path), replace(PLAN, wrong_every=1), replace(PLAN, wrong_every=1))
    assert record["overall"]["verdict"] == "PASS"  # the paired test sees two equal models
    assert record["verdict"] == "FAIL"
    assert state_of(record, "accuracy.code.source") == "FAIL"


def test_a_missed_golden_curve_fails(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    job.spec["validate"]["acceptance"]["golden"] = {"code": [0.5, 0.99]}
    record = validate(job, PLAN)
    assert state_of(record, "acceptance.golden_gap") == "FAIL"
    assert any("position 2 of code" in text for text in record["warnings"])


def test_every_load_of_the_spec_has_its_own_figures(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    job.spec["validate"]["latency"] |= {"users": [2, 4], "arrivals_per_s": [50.0, 2.5], "requests": 3}
    metrics = validate(job, PLAN)["metrics"]
    for name in ("parallel_2.tps_server", "parallel_4.tps_per_user.p50", "open_loop_50.ttft_intended_ms.p90"):
        assert metrics[f"latency.{name}"] > 0
    assert metrics["latency.open_loop_2_5.tps_server"] > 0
    profiles = set(pd.read_parquet(job.out / "requests.parquet")["profile"])
    assert profiles == {"one_in_flight", "parallel_2", "parallel_4", "open_loop_50", "open_loop_2.5"}


def test_a_witness_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    job = make_job(tmp_path)
    job.spec["validate"]["latency"]["witness"] = "aiperf"
    with pytest.raises(InputError, match="aiperf is not on the PATH"):
        validate(job, PLAN)


def test_too_few_problems_are_underpowered_not_passed(tmp_path: Path) -> None:
    record = validate(make_job(tmp_path, samples=8), PLAN)
    assert record["verdict"] == "UNDERPOWERED"
    assert record["overall"]["samples_needed"] > 0


def test_a_server_that_lies_about_its_tokens_never_passes(tmp_path: Path) -> None:
    record = validate(make_job(tmp_path), replace(PLAN, fault="usage"))
    assert record["verdict"] == "FAIL"
    assert state_of(record, "latency.usage_error_percent") == "FAIL"
    assert record["findings"]["served"]["usage_mismatch"] == 32  # 12 alone, 2 for each of 10 users


@pytest.mark.parametrize(
    "fault, finding", [("malformed", "malformed_json"), ("reset", "reset"), ("utf8", "invalid_utf8")]
)
def test_a_server_that_cannot_be_measured_stops_the_stage(tmp_path: Path, fault: str, finding: str) -> None:
    with pytest.raises(NetworkError, match=finding):
        validate(make_job(tmp_path), replace(PLAN, fault=fault))


def test_an_endpoint_that_is_gone_stops_the_stage(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="does not list its model"):
        build(make_job(tmp_path), Progress(), serve=lambda _: "http://127.0.0.1:9")


def test_too_few_prompts_are_refused_before_anything_runs(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    job.spec["validate"]["latency"]["requests"] = 1000
    with pytest.raises(InputError, match="1000 prompts are needed"):
        build(job, Progress(), serve=lambda _: "http://127.0.0.1:9")


# -- prompts
PROMPTS = [Problem(f"{domain}{n}", domain, f"{domain} question {n} of many", "x") for domain in "ab" for n in range(6)]


def test_held_out_prompts_take_the_domains_in_turn() -> None:
    chosen = choose(PROMPTS, "held_out", 4, 64, count_words)
    assert [ask.domain for ask in chosen] == ["a", "b", "a", "b"]
    later = choose(PROMPTS, "held_out", 4, 64, count_words, offset=4)
    assert not {ask.prompt for ask in chosen} & {ask.prompt for ask in later}


@pytest.mark.parametrize("profile, tokens", [("artificial_analysis_100", 100), ("artificial_analysis_1k", 1000)])
def test_long_prompts_are_long_and_unique(profile: str, tokens: int) -> None:
    chosen = choose(PROMPTS, profile, 30, 64, count_words)
    assert len({ask.prompt for ask in chosen}) == 30
    assert all(tokens <= len(count_words(ask.prompt)) <= 1.2 * tokens for ask in chosen)


def test_a_repeated_prompt_counts_once() -> None:
    with pytest.raises(InputError, match="12 unique"):
        choose(PROMPTS * 3, "held_out", 13, 64, count_words)


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(InputError, match="unknown profile"):
        choose(PROMPTS, "artificial_analysis_7k", 1, 64, count_words)


# -- waterfall
PAGE = """# TYPE kilotok_engine_cycles_total counter
kilotok_engine_cycles_total {cycles}
kilotok_operator_seconds_total{{group="moe"}} {moe}
kilotok_operator_seconds_total{{group="prefill"}} 9
"""
ROW = {"ok": True, "cycles": 10, "tps_user": 1000.0, "output_tokens": 33, "first_chunk_tokens": 3}


def test_the_parts_of_a_cycle_add_up() -> None:
    before, after = (read_counters(PAGE.format(cycles=c, moe=m)) for c, m in ((100, 1.0), (110, 1.02)))
    made = waterfall(before, after, [ROW])
    assert made["parts"] == [{"name": "moe", "us": pytest.approx(2000)}]
    assert made["client_us"] == pytest.approx(3200)  # 30 of the 32 tokens that 10 cycles made, at 1000/s
    assert made["outside_us"] == pytest.approx(1200)
    assert cycle_metrics(made)["cycle.moe_us"] == pytest.approx(2000)


def test_an_engine_without_counters_has_the_clients_cycle_only() -> None:
    made = waterfall({}, {}, [ROW])
    assert made["parts"] == []
    assert cycle_metrics(made) == {"cycle.us": pytest.approx(3200), "cycle.client_us": pytest.approx(3200)}
