"""Which prompts a speed run sends, how long, and the figures made of its rows.

  held_out                     the prompts of the file as they are, the domains in turn
  artificial_analysis_{100,1k,10k}   about that many tokens in, every prompt unique

It refuses to send a prompt twice in one run: a second time a cache could answer it.

Run: `python -m pytest tests/tasks/test_validate.py`
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

from specs.errors import InputError
from tasks.validate.client import Ask, CountTokens

INPUT_TOKENS = {"artificial_analysis_100": 100, "artificial_analysis_1k": 1000, "artificial_analysis_10k": 10000}
HELD_OUT = "held_out"
Rows = Sequence[Mapping[str, Any]]


def choose(
    prompts: Sequence[Any], profile: str, number: int, max_tokens: int, count: CountTokens, offset: int = 0
) -> list[Ask]:
    """`number` unique prompts (of `.id`, `.domain`, `.prompt`), the domains in turn.

    `offset` skips those of an earlier run.

    Raises InputError for an unknown profile or too few prompts.
    """
    if profile != HELD_OUT and profile not in INPUT_TOKENS:
        known = ", ".join((HELD_OUT, *INPUT_TOKENS))
        raise InputError(f"unknown profile {profile!r}", "validate.latency.profile", f"one of {known}")
    domains: dict[str, list[Any]] = defaultdict(list)
    for prompt in {prompt.prompt: prompt for prompt in prompts}.values():
        domains[prompt.domain].append(prompt)
    in_turn = [prompt for prompt in chain.from_iterable(zip_longest(*domains.values())) if prompt is not None]
    if profile == HELD_OUT:
        chosen = in_turn[offset : offset + number]
        if len(chosen) < number:
            fix = f"lower validate.latency.requests or add prompts: {len(in_turn)} unique ones"
            raise InputError(f"{offset + number} prompts are needed", "validate.latency", fix)
        return [Ask(prompt.id, prompt.prompt, prompt.domain, max_tokens) for prompt in chosen]
    return [_long(in_turn, index, INPUT_TOKENS[profile], max_tokens, count) for index in range(offset, offset + number)]


def _long(prompts: Sequence[Any], index: int, tokens: int, max_tokens: int, count: CountTokens) -> Ask:
    """Earlier prompts as context, one of them last as the question; unique by its number and its rotation."""
    question = prompts[index % len(prompts)]
    parts, have, turn = [f"Run {index}."], len(count(question.prompt)), index
    while have < tokens:
        turn += 1
        part = prompts[turn % len(prompts)].prompt
        have += max(len(count(part)), 1)
        parts.append(part)
    return Ask(f"long-{index}-{question.id}", "\n\n".join([*parts, question.prompt]), question.domain, max_tokens)


def latency_metrics(rows: Rows, prefix: str = "latency") -> dict[str, float]:
    """Medians over the requests that are ok. What nothing was measured for is absent, and so passes no gate."""
    good = [row for row in rows if row["ok"]]
    columns = {"tps_per_user": "tps_user", "ttft_ms": "ttft_ms", "itl_ms": "itl_ms_p50", "e2e_tps": "e2e_tps"}
    metrics = {}
    for name, column in columns.items():
        values = [row[column] for row in good if not math.isnan(row[column])]
        if values:
            metrics[f"{prefix}.{name}.p50"] = statistics.median(values)
            metrics[f"{prefix}.{name}.p10"], metrics[f"{prefix}.{name}.p90"] = (
                _quantile(values, 0.1),
                _quantile(values, 0.9),
            )
    for domain in sorted({row["domain"] for row in good} - {""}):
        values = [row["tps_user"] for row in good if row["domain"] == domain and not math.isnan(row["tps_user"])]
        if values:
            metrics[f"{prefix}.tps_per_user.{domain}.p50"] = statistics.median(values)
    return metrics


def waiting_metrics(rows: Rows, prefix: str) -> dict[str, float]:
    """Of an open loop: time to first token since the request was *meant* to be sent. Failed requests wait for ever."""
    waits = sorted(row["ttft_intended_ms"] if row["ok"] else math.inf for row in rows)
    named = {f"{prefix}.ttft_intended_ms.p{q}": _quantile(waits, q / 100) for q in (50, 90, 99)} if waits else {}
    return {name: value for name, value in named.items() if math.isfinite(value)}


def server_tps(rows: Rows) -> float:
    """Output tokens of all users over the run's wall time."""
    good = [row for row in rows if row["ok"]]
    if not good:
        return float("nan")
    begin = min(row["sent_s"] for row in good)
    end = max(row["sent_s"] + row["duration_ms"] / 1e3 for row in good)
    return sum(row["output_tokens"] for row in good) / (end - begin)


def integrity_metrics(rows: Rows) -> dict[str, float]:
    """What would make the other figures worthless: failed requests, and usage that disagrees with the tokenizer."""
    counted = [row for row in rows if row["ok"]]
    text = sum(row["output_tokens"] for row in counted)
    # A stop token is generated but is not text.
    claimed = sum(
        row["usage_tokens"] - (row["finish_reason"] == "stop" and row["usage_tokens"] > row["output_tokens"])
        for row in counted
    )
    return {
        "latency.failed_requests": float(len(rows) - len(counted)),
        "latency.usage_error_percent": 100 * abs(claimed - text) / text if text else float("nan"),
    }


def findings(rows: Rows) -> dict[str, int]:
    """Finding -> number of requests that have it."""
    found: dict[str, int] = defaultdict(int)
    for name in chain.from_iterable(row["findings"].split(";") for row in rows if row["findings"]):
        found[name] += 1
    return dict(sorted(found.items()))


def _quantile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low, high = ordered[int(at)], ordered[min(int(at) + 1, len(ordered) - 1)]
    return low if high == low else low + (high - low) * (at - int(at))
