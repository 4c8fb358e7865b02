"""What trtllm-bench and trtllm-eval say, as our metrics: for comparing a build with upstream's own tools.

The speed of one user is `streaming_metrics.gen_tps`, which like ours leaves the first token out;
`output_throughput_per_user` holds the time to it and is lower. Accuracy is a line of a log, because trtllm-eval writes
no report. Every figure becomes a row of a checked table, with the file it came from.

It refuses a report without streaming figures (run trtllm-bench with --streaming), one of several users where one is
meant, and a log without a result.

Run it: `python -m tasks.trtllm_results report.json eval.log`
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pandera.pandas as pa
from pandera.typing import Series

from specs.errors import InputError, KilotokError
from tasks.validate.tables import check

# Our metric -> (where it stands in trtllm-bench's report, unit)
_FIGURES = {
    "latency.tps_per_user.p50": (("streaming_metrics", "gen_tps_percentiles", "p50"), "tokens/s"),
    "latency.tps_per_user.mean": (("streaming_metrics", "token_output_speed_tok_s"), "tokens/s"),
    "latency.ttft_ms.p50": (("streaming_metrics", "ttft_percentiles", "p50"), "ms"),
    "latency.tpot_ms.p50": (("streaming_metrics", "tpot_percentiles", "p50"), "ms"),
    "latency.request_ms.p50": (("performance", "request_latency_percentiles_ms", "p50"), "ms"),
    "throughput.tps_server": (("performance", "system_output_throughput_tok_s"), "tokens/s"),
    "throughput.requests_per_s": (("performance", "request_throughput_req_s"), "1/s"),
    "acceptance.length": (("decoding_stats", "acceptance_length_percentiles", "average"), "tokens"),
    "acceptance.rate": (("decoding_stats", "draft_acceptance_rate_percentiles", "average"), "share"),
}
_ACCURACY = re.compile(
    r"(?:lm-eval (?P<task>\w+) average accuracy|(?P<mmlu>MMLU) weighted average accuracy): (?P<percent>\d+(?:\.\d+)?)"
)


class Figures(pa.DataFrameModel):
    """One row per figure, with the file it came from."""

    metric: Series[str] = pa.Field(unique=True)
    value: Series[float] = pa.Field(ge=0)
    unit: Series[str]
    source: Series[str]

    class Config:
        strict = True


def read_bench(path: Path, users: int | None = None) -> list[tuple[str, float, str]]:
    """(metric, value, unit) of a `--report_json`; `users` is the concurrency it must have been run at."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"not a report of trtllm-bench: {error}", str(path), "pass --report_json FILE") from None
    if "streaming_metrics" not in report:
        fix = "run trtllm-bench with --streaming"
        raise InputError("the report has no streaming_metrics: no speed per user", str(path), fix)
    parallel = _at(report, ("request_info", "avg_num_concurrent_requests"))
    if users is not None and parallel is not None and round(parallel) != users:
        raise InputError(f"{parallel:g} requests were in flight, not {users}", str(path), "run with --concurrency")
    rows = ((metric, _at(report, place), unit) for metric, (place, unit) in _FIGURES.items())
    return [(metric, value, unit) for metric, value, unit in rows if value is not None]


def read_eval(path: Path) -> list[tuple[str, float, str]]:
    """(`accuracy.TASK.served`, share, "share") of each result in a log of trtllm-eval; a task's last one counts."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(
            f"no log of trtllm-eval: {error.strerror}", str(path), "keep its output: ... | tee LOG"
        ) from None
    found = {(m["task"] or "mmlu"): float(m["percent"]) / 100 for m in _ACCURACY.finditer(text)}
    if not found:
        raise InputError("the log holds no average accuracy", str(path), "look at its end: did trtllm-eval finish?")
    return [(f"accuracy.{task}.served", value, "share") for task, value in sorted(found.items())]


def figures(paths: list[Path], users: int | None = None) -> pd.DataFrame:
    """A checked table of metric, value, unit and source. Raises IntegrityError for one that is stated twice."""
    rows = [(*row, str(path)) for path in paths for row in _read(path, users)]
    frame = pd.DataFrame(rows, columns=["metric", "value", "unit", "source"]).astype({"value": float})
    return check(frame, Figures, ", ".join(map(str, paths)))


def _read(path: Path, users: int | None) -> Iterator[tuple[str, float, str]]:
    yield from read_bench(path, users) if path.suffix == ".json" else read_eval(path)


def _at(report: dict[str, Any], place: tuple[str, ...]) -> float | None:
    value: Any = report
    for key in place:
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


if __name__ == "__main__":
    try:
        print(figures([Path(name) for name in sys.argv[1:]]).to_string(index=False))
    except KilotokError as problem:
        print(f"kilotok: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
