"""A profiler's trace as parts of a cycle: they add up, overlaps count once, pauses between requests are no cycles.

Run it: `python -m pytest tests/tasks/test_trace.py`
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tasks.validate.trace import HOST, group_of, longest, parts
from tasks.validate.waterfall import cycle_metrics, waterfall, with_trace


def step(number: int, at: float, *kernels: tuple[str, float, float]) -> list[dict[str, Any]]:
    """A graph launch and its kernels (name, us after `at`, us long)."""
    args = {"correlation": number}
    made = [
        {"cat": "kernel", "name": name, "ts": at + start, "dur": long, "args": args} for name, start, long in kernels
    ]
    return [{"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": at - 5, "args": args}, *made]


def us(events: list[dict[str, Any]]) -> dict[str, float]:
    found = parts(events)
    assert found is not None
    return {part["name"]: pytest.approx(part["us"]) for part in found["parts"]}


BUSY = (("fmha_kernel", 0, 30), ("moe_kernel", 40, 50))


def test_kernels_gaps_and_nothing_else_fill_the_cycle() -> None:
    events = [event for number in range(3) for event in step(number, 100.0 * number, *BUSY)]
    assert us(events) == {"attention": 30, "moe": 50, HOST: 20}
    assert parts(events)["cycle_us"] == 100 and parts(events)["cycles"] == 2  # type: ignore[index]


def test_a_kernel_that_starts_early_takes_the_time_over() -> None:
    overlapped = (("fmha_kernel", 0, 60), ("allreduce_fusion_kernel", 40, 60))
    assert us([*step(0, 0, *overlapped), *step(1, 100, *overlapped)]) == {"attention": 40, "allreduce": 60}


def test_a_pause_between_two_requests_is_not_a_cycle() -> None:
    starts = (0, 100, 200, 5000, 5100)
    events = [event for number, at in enumerate(starts) for event in step(number, at, *BUSY)]
    assert us(events)[HOST] == 20


def test_what_no_graph_launched_is_no_decode_step() -> None:
    prefill = {"cat": "kernel", "name": "gemm", "ts": 10, "dur": 9000, "args": {"correlation": 77}}
    assert us([prefill, *step(0, 0, *BUSY), *step(1, 100, *BUSY)]) == {"attention": 30, "moe": 50, HOST: 20}
    assert parts([prefill]) is None and parts(step(0, 0, *BUSY)) is None


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("void llama4_moe_fc13_swiglu_fp8_kernel<1>", "moe"),
        ("llama4_fp8_fp8_gemm_swiglu", "dense_mlp"),
        ("nvjet_qqtst_64x8_splitK", "gemm"),
        ("flashinfer::norm::RMSNormKernel", "norms"),
        ("vectorized_elementwise_kernel", "other"),
    ],
)
def test_groups(kernel: str, group: str) -> None:
    assert group_of(kernel) == group


def test_of_several_ranks_the_longest_whole_trace_counts(tmp_path: Path) -> None:
    for rank, number in enumerate((2, 4)):
        events = [event for at in range(number) for event in step(at, 100.0 * at, *BUSY)]
        text = json.dumps({"traceEvents": events}).encode()
        (tmp_path / f"trace-{rank}.json").write_bytes(gzip.compress(text) if rank else text)
    (tmp_path / "trace-2.json").write_text('{"traceEvents": [')  # still being written
    found = longest(sorted(tmp_path.glob("trace*")))
    assert found is not None and found["cycles"] == 3 and longest([]) is None


def test_the_profiled_cycle_is_not_the_one_that_was_timed() -> None:
    row = {"ok": True, "cycles": 10, "tps_user": 1000.0, "output_tokens": 31, "first_chunk_tokens": 1}
    events = [*step(0, 0, *BUSY), *step(1, 100, *BUSY)]
    metrics = cycle_metrics(with_trace(waterfall({}, {}, [row]), parts(events)))
    assert metrics["cycle.us"] == metrics["cycle.client_us"] == pytest.approx(3000)
    assert metrics["cycle.moe_us"] == pytest.approx(50) and "cycle.outside_us" not in metrics
