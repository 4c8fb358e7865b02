"""What the figures rest on: causes that validate named, the loads that were run, the engine alone, client and witness.

Refuses to judge: all of it is validate's word, put into rows. What was not run is absent, and the page leaves it out.
Run it: `python -m pytest tests/tasks/test_report_measures.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tasks.report.words import as_number, figure, three

Metrics = Mapping[str, float]
# What the client notes on a reply, after "3 replies"; the other names read as they are.
FINDINGS = {
    "burst": "that lay ready when they were read, so no speed is taken from them",
    "retried": "only after the server had asked to come back later",
    "throttled": "refused as too many",
    "usage_mismatch": "whose token count is not the tokenizer's",
    "usage_missing": "without a token count",
    "stall": "that stalled",
    "timeout": "that took too long",
    "reset": "cut off by the server",
    "truncated_stream": "that ended without an end",
    "invalid_utf8": "that are not UTF-8",
    "malformed_json": "that are not JSON",
    "malformed_http": "that are not HTTP",
    "no_text": "without text",
    "server_error": "with an error in the stream",
    "http_error": "with an HTTP error",
    "connect": "never reached the server",
    "replacement_character": "with a character the server could not decode",
}


def finding_words(name: str) -> str:
    """What follows "3 replies"; the page still shows what nobody has described."""
    return FINDINGS.get(name) or f"with {name.replace('_', ' ')}"


_LOAD = re.compile(r"latency\.(parallel|open_loop)_(\d+(?:_\d+)?)\.tps_server")


def causes(outcome: Mapping[str, Any]) -> list[dict[str, str]]:
    """cause, evidence and fix of each; the surest first."""
    return [
        {name: str(row.get(name) or "") for name in ("cause", "evidence", "fix")} for row in outcome.get("causes") or ()
    ]


def loads(metrics: Metrics) -> list[dict[str, Any]]:
    """One row per load, one user first: its name in words, and its figures where they were measured."""
    found = [("", "latency", 1.0, "one user")]
    for name in metrics:
        if match := _LOAD.fullmatch(name):
            size = float(match[2].replace("_", "."))
            words = f"{size:g} users" if match[1] == "parallel" else f"{size:g} arrivals/s, open loop"
            found.append((match[1], name.removesuffix(".tps_server"), size, words))
    order = {"": 0, "parallel": 1, "open_loop": 2}
    rows = []
    for _, prefix, _, words in sorted(found, key=lambda load: (order[load[0]], load[2])):
        row: dict[str, Any] = {"load": words, "tps_server": as_number(metrics.get(f"{prefix}.tps_server"))}
        row |= {
            name: as_number(metrics.get(f"{prefix}.{metric}"))
            for name, metric in (
                ("tps_user", "tps_per_user.p50"),
                ("ttft_ms", "ttft_ms.p50"),
                ("itl_ms", "itl_ms.p50"),
                ("wait_ms", "ttft_intended_ms.p90"),
            )
        }
        rows.append(row)
    return rows if rows[0]["tps_user"] is not None or len(rows) > 1 else []


def engine_alone(metrics: Metrics) -> dict[str, float] | None:
    """The run with forced acceptance: its speed is the engine's, whatever the draft is worth."""
    named = {"tps": "forced.tps_per_user.p50", "length": "forced.acceptance_length", "cycle_us": "forced.cycle_us"}
    found = {name: as_number(metrics.get(metric)) for name, metric in named.items()}
    known = {name: value for name, value in found.items() if value is not None}
    return known if len(known) == len(named) else None


def grounds(metrics: Metrics) -> list[str]:
    """Sentences on how far the stopwatch can be trusted."""
    said = []
    if (error := as_number(metrics.get("client.error_percent"))) is not None:
        text = f"Before the run the client timed a server of known speed to within {three(error)} %"
        if (ttft := as_number(metrics.get("client.ttft_error_ms"))) is not None:
            text += f" and {figure(abs(ttft), 'ms')} of its time to first token"
        said.append(f"{text}.")
    if (usage := as_number(metrics.get("latency.usage_error_percent"))) is not None:
        said.append(f"Tokens are counted by the tokenizer; the server's own counts differ by {three(usage)} %.")
    if (scale := as_number(metrics.get("bundle.scale_error_percent"))) is not None:
        said.append(f"The scale of every served weight was compared with the source's: at most {three(scale)} % apart.")
    return said
