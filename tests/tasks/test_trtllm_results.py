"""Upstream's reports and logs, as their keys and lines were read in its source.

Run it: `python -m pytest tests/tasks/test_trtllm_results.py`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specs.errors import InputError, IntegrityError
from tasks.trtllm_results import figures, read_bench, read_eval


def percentiles(p50: float) -> dict[str, float]:
    names = ("p50", "p90", "p95", "p99", "minimum", "maximum", "average")
    return {name: p50 + 0.01 * at for at, name in enumerate(names)}


REPORT: dict[str, Any] = {
    "engine": {"model": "llama4-maverick-b200", "version": "1.2.1", "backend": "pytorch", "quantization": "FP8"},
    "world_info": {"tp_size": 8, "pp_size": 1, "ep_size": 1, "max_batch_size": 1},
    "request_info": {"num_requests": 24, "avg_num_concurrent_requests": 1.0, "avg_output_length": 1000.0},
    "performance": {
        "total_latency_ms": 24500.0,
        "request_throughput_req_s": 0.98,
        "system_output_throughput_tok_s": 979.6,
        "output_throughput_per_user_tok_s": 955.0,
        "request_latency_percentiles_ms": percentiles(1020.0),
    },
    "streaming_metrics": {
        "token_output_speed_tok_s": 1031.5,
        "ttft_percentiles": percentiles(38.0),
        "tpot_percentiles": percentiles(0.97),
        "gen_tps_percentiles": percentiles(1030.0),
    },
    "decoding_stats": {"mode": "Eagle", "acceptance_length_percentiles": percentiles(2.9)},
}
LOG = """
[11/25/2026-02:11:05] [TRT-LLM] [I] lm-eval gsm8k results (scores normalized to range 0~100):
|Tasks|Version|     Filter     |n-shot|  Metric   |   | Value |   |Stderr|
|gsm8k|      3|flexible-extract|     5|exact_match|↑  |92.2000|±  |0.7400|
[11/25/2026-02:11:05] [TRT-LLM] [I] lm-eval gsm8k average accuracy: 92.20
[11/25/2026-02:40:00] [TRT-LLM] [I] MMLU weighted average accuracy: 86.40 (14042)
"""


def written(tmp_path: Path, report: dict[str, Any]) -> Path:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    return path


def test_speed_of_one_user_leaves_the_first_token_out(tmp_path: Path) -> None:
    found = {metric: value for metric, value, _ in read_bench(written(tmp_path, REPORT), users=1)}
    assert found["latency.tps_per_user.p50"] == 1030.0 and found["latency.tps_per_user.mean"] == 1031.5
    assert found["acceptance.length"] == pytest.approx(2.96) and found["latency.ttft_ms.p50"] == 38.0
    assert "acceptance.rate" not in found, "what the report does not hold is not invented"


def test_accuracy_is_read_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "eval.log"
    log.write_text(LOG)
    found = {metric: value for metric, value, _ in read_eval(log)}
    assert found == pytest.approx({"accuracy.gsm8k.served": 0.922, "accuracy.mmlu.served": 0.864})


def test_both_make_one_checked_table(tmp_path: Path) -> None:
    log = tmp_path / "eval.log"
    log.write_text(LOG)
    table = figures([written(tmp_path, REPORT), log])
    assert list(table.columns) == ["metric", "value", "unit", "source"] and len(table) == 10
    with pytest.raises(IntegrityError, match="metric"):
        figures([log, log])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"streaming_metrics": None}, "run trtllm-bench with --streaming"),
        ({"request_info": {"avg_num_concurrent_requests": 63.2}}, "63.2 requests were in flight, not 1"),
    ],
)
def test_report_that_does_not_answer_the_question_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    report = {key: value for key, value in {**REPORT, **change}.items() if value is not None}
    with pytest.raises(InputError, match=says):
        read_bench(written(tmp_path, report), users=1)


def test_log_without_a_result_and_no_json(tmp_path: Path) -> None:
    log = tmp_path / "eval.log"
    log.write_text("Traceback (most recent call last):\n")
    with pytest.raises(InputError, match="did trtllm-eval finish"):
        read_eval(log)
    with pytest.raises(InputError, match="not a report"):
        read_bench(log)
