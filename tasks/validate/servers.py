"""Validate's own servers on this machine, each ending with the run: the source, and the engine at a forced acceptance.

`source_server` serves the BF16 source, built from the verified download, without speculation and one operator at a
time (engine_plugins/native/cpp/unfused.h): the other side of every comparison. `forced_server` serves the candidate's
bundle accepting drafts at a fixed rate, right or wrong: its speed is the engine's alone, so a change of speed is the
engine's or the draft's.

It refuses to stand in for the source with anything quantized, speculative or fused, and to give a forced answer to
anyone but the stopwatch.

Run: part of `validate`; alone: `python -m engine_plugins.native.server --bundle DIR --forced-acceptance 3`
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specs.errors import StageFailed
from tasks.deployment import set_aside
from tasks.deployment.plain import Starter, bundle_server, plain_server
from tasks.edges.process import last_lines, spawn, stop
from tasks.edges.service import free_port, http_status
from tasks.job import Job

HOST = "127.0.0.1"
START_TIMEOUT_S = 120.0
FORCE_DRAFTS = "TLLM_SPEC_DECODE_FORCE_NUM_ACCEPTED_TOKENS"  # whole drafts a cycle, the sure token not counted


@contextmanager
def source_server(
    download: Path, candidate: Path, scratch: Path, backend: str, job: Job | None = None, starter: Starter | None = None
) -> Iterator[str]:
    """Base URL of the served source. Raises StageFailed with the server's last words when it does not come up.

    With trtllm the source runs in the same image, without draft, plugins and min-latency path; where it does not fit
    beside the candidate (drain_swap) the candidate is set aside meanwhile and comes back.
    """
    if backend == "trtllm":
        assert job is not None
        deployment = job.inputs["deploy"] / "deployment.json"
        with set_aside(deployment), plain_server(job.spec, download, scratch, print, starter) as url:
            yield url
        return
    bundle = scratch / "source-bundle"
    if not (bundle / "bundle.json").is_file():
        _build(download, candidate, bundle)
    with native_server(bundle, scratch, "source", "--no-speculation", "--no-fusion") as url:
        yield url


@contextmanager
def forced_server(job: Job, tokens_per_cycle: float, starter: Starter | None = None) -> Iterator[str]:
    """Base URL of the candidate's engine at a forced acceptance. Raises as `source_server`."""
    candidate = job.inputs["build_engine"]
    if job.spec["engine"]["backend"] == "trtllm":
        env = {FORCE_DRAFTS: f"{round(tokens_per_cycle) - 1}"}  # whole: tasks/predict/limits.py has refused others
        deployment, own = job.inputs["deploy"] / "deployment.json", job.scratch / "forced"
        with set_aside(deployment), bundle_server(job.spec, candidate, own, starter, env) as url:
            yield url
        return
    with native_server(candidate, job.scratch, "forced", "--forced-acceptance", f"{tokens_per_cycle:g}") as url:
        yield url


@contextmanager
def native_server(bundle: Path, scratch: Path, name: str, *flags: str) -> Iterator[str]:
    """Base URL of a bundle on a free port of this machine."""
    port, log = free_port(HOST), scratch / f"{name}-server.log"
    argv = [sys.executable, "-m", "engine_plugins.native.server", "--bundle", str(bundle), "--host", HOST]
    process = spawn([*argv, "--port", str(port), "--served-model-name", name, *flags], log)
    try:
        wait_healthy(f"http://{HOST}:{port}", process, log, START_TIMEOUT_S)
        yield f"http://{HOST}:{port}"
    finally:
        stop(process)


def _build(download: Path, candidate: Path, bundle: Path) -> None:
    """The same limits as the candidate's bundle, so that both sides serve the same requests."""
    from engine_plugins.native.bundle import build_bundle

    record = json.loads((candidate / "bundle.json").read_text(encoding="utf-8"))
    _adopt_library(candidate, record)
    shutil.rmtree(bundle, ignore_errors=True)
    build_bundle(
        download, bundle, draft=None, draft_tokens=0,
        max_seq_len=record["max_seq_len"], max_batch_size=record["max_batch_size"], plugins=(),
    )  # fmt: skip


def _adopt_library(candidate: Path, record: dict[str, Any]) -> None:
    """The candidate's compiled step serves the source too, when it was made from the sources at hand: the compiler is
    a quarter of a validation on a laptop, and both sides running the same machine code is what we want anyway."""
    from engine_plugins.native import compiler

    library = candidate / "plugins" / compiler.LIBRARY
    if library.is_file() and record.get("sources") == compiler.source_digest():
        compiler._compiled.setdefault(record["sources"], library.read_bytes())


def wait_healthy(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    """Until /health is 200. Raises StageFailed when the process ends or the time is up."""
    deadline = time.monotonic() + timeout_s
    while http_status(f"{url}/health") != 200:
        ended = process.poll() is not None
        if ended or time.monotonic() > deadline:
            what = f"ended with {process.returncode}: {last_lines(log, 3)}" if ended else "was not healthy in time"
            raise StageFailed(f"validate's own server {what}", str(log), "read its log", log_path=str(log))
        time.sleep(0.1)
