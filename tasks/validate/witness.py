"""A second witness: another project's client sends the same prompts to the same endpoint, one at a time.

aiperf and guidellm divide the tokens after the first by the time after the first chunk, also where that chunk carries
several tokens. Their figure is therefore compared with ours computed their way, from our own requests; the definition
of TPS/user stays as it is. Both count tokens themselves: aiperf by the tokenizer, guidellm by the server's word.

It refuses to average the two: agreement is reported, disagreement beyond the tolerance is a finding. trtllm-bench is
none of them: it loads the model itself and never sees the endpoint.

Run: `python -m tasks.validate.witness aiperf BASE_URL TOKENIZER_DIR PROMPTS`
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specs.errors import InputError, StageFailed
from tasks.edges.process import last_lines, spawn, stop
from tasks.validate.client import Ask, Endpoint, token_counter

TIMEOUT_S = 1800.0
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Heard:
    """Medians over the witness's requests, in its own definition, beside ours in the same one."""

    tool: str
    tps: float
    ttft_ms: float
    tokens: float
    our_tps: float
    our_ttft_ms: float
    our_tokens: float

    @property
    def difference(self) -> float:
        """Share by which the two speeds differ."""
        return abs(self.tps / self.our_tps - 1)

    @property
    def metrics(self) -> dict[str, float]:
        return {
            "witness.tps_per_user.p50": self.tps,
            "witness.ttft_ms.p50": self.ttft_ms,
            "witness.output_tokens.mean": self.tokens,
            "witness.tps_per_user.difference": self.difference,
        }

    def sentence(self) -> str:
        return (
            f"{self.tool} measured {self.tps:,.0f} tokens/s and {self.ttft_ms:.1f} ms to the first token on "
            f"{self.tokens:.1f} tokens an answer; we, by its definition, {self.our_tps:,.0f} tokens/s and "
            f"{self.our_ttft_ms:.1f} ms on {self.our_tokens:.1f}"
        )

    def disagreement(self, tolerance: float) -> str | None:
        """None when the speeds agree. NaN agrees with nothing."""
        if self.difference <= tolerance:
            return None
        return (
            f"the witness disagrees by {100 * self.difference:.1f}%, more than {100 * tolerance:g}%: {self.sentence()}"
        )


def measure(tool: str, endpoint: Endpoint, asks: Sequence[Ask], rows: Rows, tokenizer: Path, folder: Path) -> Heard:
    """Runs the tool on `asks`, whose `rows` we measured. Raises InputError without it, StageFailed when it fails."""
    if shutil.which(tool) is None:
        raise InputError(
            f"the witness {tool} is not on the PATH", "validate.latency.witness", f"pip install {tool} in its own venv"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    argv, read = TOOLS[tool]
    log = folder / f"{tool}.log"
    process = spawn(argv(endpoint, asks, tokenizer, folder), log, cwd=folder)
    try:
        status = process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        status = -1
    finally:
        stop(process)
    try:
        tps, ttft_ms, tokens, done = read(folder)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise StageFailed(
            f"{tool} left no result (exit {status}): {last_lines(log, 3)}", str(log), "read its log", log_path=str(log)
        ) from error
    if done < len(asks):
        raise StageFailed(
            f"{tool} finished {done} of {len(asks)} requests", str(log), "read its log", log_path=str(log)
        )
    return Heard(tool, tps, ttft_ms, tokens, *ours(rows))


def ours(rows: Rows) -> tuple[float, float, float]:
    """(tokens/s, ms to the first token, tokens) of our requests by the witnesses' definition."""
    good = [row for row in rows if row["ok"] and row["duration_ms"] > row["ttft_ms"]]
    if not good:
        return math.nan, math.nan, math.nan
    return (
        statistics.median(1e3 * (row["output_tokens"] - 1) / (row["duration_ms"] - row["ttft_ms"]) for row in good),
        statistics.median(row["ttft_ms"] for row in good),
        statistics.mean(row["output_tokens"] for row in good),
    )


def _aiperf_argv(endpoint: Endpoint, asks: Sequence[Ask], tokenizer: Path, folder: Path, users: int = 1) -> list[str]:
    lines = [{"text": ask.prompt, "output_length": ask.max_tokens} for ask in asks]
    _write_lines(folder / "prompts.jsonl", lines)
    return [
        "aiperf", "profile", "--model-names", endpoint.model, "--url", endpoint.address.url, "--endpoint-type", "chat",
        "--streaming", "--tokenizer", str(tokenizer.resolve()), "--input-file", str(folder.resolve() / "prompts.jsonl"),
        "--custom-dataset-type", "single_turn", "--dataset-sampling-strategy", "sequential",
        "--concurrency", str(users), "--request-count", str(len(asks)), "--extra-inputs", "temperature:0",
        "--no-gpu-telemetry", "--output-artifact-dir", str(folder.resolve() / "out"),
    ]  # fmt: skip


def _read_aiperf(folder: Path) -> tuple[float, float, float, int]:
    said = json.loads((folder / "out" / "profile_export_aiperf.json").read_text(encoding="utf-8"))
    speed, ttft = said["output_token_throughput_per_user"]["p50"], said["time_to_first_token"]["p50"]
    return float(speed), float(ttft), float(said["output_sequence_length"]["avg"]), int(said["request_count"]["avg"])


def _guidellm_argv(endpoint: Endpoint, asks: Sequence[Ask], tokenizer: Path, folder: Path, users: int = 1) -> list[str]:
    _write_lines(folder / "prompts.jsonl", [{"prompt": ask.prompt} for ask in asks])
    backend = f"kind=openai_http,target={endpoint.address.url},model={endpoint.model},max_tokens={asks[0].max_tokens}"
    profile = f"kind=concurrent,streams={users}" if users > 1 else "kind=synchronous"
    return [
        "guidellm", "run", "--backend", backend, "--profile", profile,
        "--constraint", f"kind=max_requests,count={len(asks)}",
        "--data", f"kind=json_file,path={folder.resolve() / 'prompts.jsonl'}",
        "--tokenizer", f"kind=hf_auto,model={tokenizer.resolve()}",
        "--output", f"kind=json,path={folder.resolve() / 'out.json'}", "--disable-console",
    ]  # fmt: skip


def _read_guidellm(folder: Path) -> tuple[float, float, float, int]:
    metrics = json.loads((folder / "out.json").read_text(encoding="utf-8"))["benchmarks"][0]["metrics"]
    good = {name: metrics[name]["successful"] for name in (
        "inter_token_latency_ms", "time_to_first_token_ms", "output_token_count",
    )}  # fmt: skip
    return (
        1e3 / float(good["inter_token_latency_ms"]["median"]),
        float(good["time_to_first_token_ms"]["median"]),
        float(good["output_token_count"]["mean"]),
        int(metrics["request_totals"]["successful"]),
    )


# How each tool is called, and how what it left is read: (tokens/s, ms to the first token, tokens, requests finished).
TOOLS = {"aiperf": (_aiperf_argv, _read_aiperf), "guidellm": (_guidellm_argv, _read_guidellm)}


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    from tasks.prompts import read_prompts
    from tasks.validate.load import one_in_flight
    from tasks.validate.speed import connect

    parser = argparse.ArgumentParser(description="Sets our client beside another on one endpoint")
    parser.add_argument("tool", choices=("aiperf", "guidellm"))
    parser.add_argument("base_url")
    parser.add_argument("tokenizer", type=Path, help="folder of the model's tokenizer")
    parser.add_argument("prompts", type=Path, help="JSON lines of id, domain, prompt")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=128)
    given = parser.parse_args()
    endpoint = connect(given.base_url, token_counter(given.tokenizer / "tokenizer.json"))
    prompts = read_prompts(given.prompts)[: given.requests]
    asks = [Ask(prompt.id, prompt.prompt, prompt.domain, given.max_tokens) for prompt in prompts]
    rows = one_in_flight(endpoint, asks)
    heard = measure(given.tool, endpoint, asks, rows, given.tokenizer, Path(".kilotok") / "witness")
    print(heard.sentence(), f"({100 * heard.difference:.1f}% apart)")


if __name__ == "__main__":
    main()
