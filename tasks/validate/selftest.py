"""The client against a mock of known timing, before each run: a client that cannot time a mock may not time a model.

Compared with when the mock really sent its first and last token (it reports both), so the mock's own lateness on a busy
machine is not blamed on the client; it is reported beside it.

It refuses to hide its error: it is a metric (`client.error_percent`) of every build, and above the limit the run stops.

Run: `python -m tasks.validate.selftest [--users 1 64] [--tokens-per-s 5000]`
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from typing import Any

import numpy as np

from tasks.validate.client import Ask, Endpoint
from tasks.validate.load import parallel_users
from tasks.validate.mock import MockPlan, mock_server

ERROR_LIMIT_PERCENT = 3.0


def count_words(text: str) -> np.ndarray:
    """The mock's words are its tokens."""
    return np.asarray([match.end() for match in re.finditer(r"\s*\S+", text)], np.int64)


def self_test(users: int, tokens_per_s: float = 5000.0, tokens: int = 1500, requests: int = 3) -> dict[str, float]:
    """Errors in percent of tokens/s/user (median over requests) and in ms of time to first token; CPU seconds per
    1000 tokens.
    """
    with mock_server(MockPlan(ttft_ms=20.0, tokens_per_s=tokens_per_s, tokens=tokens)) as url:
        endpoint = Endpoint(url, "mock", count_words)
        asks = [Ask(f"mock-{number}", f"prompt {number}", max_tokens=tokens) for number in range(users * requests)]
        cpu = time.process_time()
        rows = parallel_users(endpoint, asks, users)
        cpu = time.process_time() - cpu
    bad = [row["findings"] for row in rows if row["findings"]]
    if bad:
        raise RuntimeError(f"the self-test's own requests have findings: {bad[0]}")
    true_tps = [_true_tps(row) for row in rows]
    return {
        "error_percent": 100
        * abs(statistics.median(r["tps_user"] / t for r, t in zip(rows, true_tps, strict=True)) - 1),
        "worst_error_percent": 100 * max(abs(r["tps_user"] / t - 1) for r, t in zip(rows, true_tps, strict=True)),
        "nominal_error_percent": 100 * abs(statistics.median(row["tps_user"] for row in rows) / tokens_per_s - 1),
        "ttft_error_ms": statistics.median(
            row["ttft_ms"] - (row["mock"]["first_sent_s"] - row["sent_s"]) * 1e3 for row in rows
        ),
        "cpu_s_per_1000_tokens": 1000 * cpu / sum(row["output_tokens"] for row in rows),
    }


def _true_tps(row: dict[str, Any]) -> float:
    later = row["output_tokens"] - row["first_chunk_tokens"]
    return later / (row["mock"]["last_sent_s"] - row["mock"]["first_sent_s"])


def before_a_run() -> dict[str, float]:
    """About a second. The metrics `client.*` of a build."""
    alone, crowd = self_test(1, requests=2), self_test(8, requests=1)
    return {
        "client.error_percent": max(alone["error_percent"], crowd["error_percent"]),
        "client.ttft_error_ms": max(alone["ttft_error_ms"], crowd["ttft_error_ms"]),
        "client.mock_error_percent": alone["nominal_error_percent"],
        "client.cpu_s_per_1000_tokens": alone["cpu_s_per_1000_tokens"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the client against a mock of known timing")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens-per-s", type=float, default=5000.0)
    parser.add_argument("--tokens", type=int, default=5000)
    given = parser.parse_args()
    for users in given.users:
        result = self_test(users, given.tokens_per_s, given.tokens, requests=1 if users > 8 else 3)
        print(f"{users:4d} users  " + "  ".join(f"{name} {value:.4f}" for name, value in result.items()))


if __name__ == "__main__":
    main()
