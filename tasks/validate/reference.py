"""The other side of the comparison: the BF16 source on a server of its own, without draft and without speculation.

It is built from the verified download into scratch, served on a free port of this machine, and ends with the stage.

It refuses to stand in for the source with anything quantized or speculative.

Run: part of `validate`; alone: `python -m engine_plugins.native.server --bundle DIR --no-speculation`
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
from tasks.edges.process import last_lines, spawn, stop
from tasks.edges.service import free_port, http_status

HOST = "127.0.0.1"


@contextmanager
def source_server(
    download: Path, candidate: Path, scratch: Path, backend: str, start_timeout_s: float = 120.0
) -> Iterator[str]:
    """Base URL of the served source. Raises StageFailed with the server's last words when it does not come up."""
    if backend != "native":
        raise StageFailed(
            f"no reference server for the {backend} backend",
            str(download),
            "serve the source and use engine.backend native",
        )
    bundle = scratch / "source-bundle"
    if not (bundle / "bundle.json").is_file():
        _build(download, candidate, bundle)
    port, log = free_port(HOST), scratch / "source-server.log"
    argv = [
        sys.executable,
        "-m",
        "engine_plugins.native.server",
        "--bundle",
        str(bundle),
        "--host",
        HOST,
        "--port",
        str(port),
        "--no-speculation",
        "--served-model-name",
        "source",
    ]
    process = spawn(argv, log)
    try:
        wait_healthy(f"http://{HOST}:{port}", process, log, start_timeout_s)
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
        if process.poll() is not None:
            raise StageFailed(
                f"the source's server ended with {process.returncode}: {last_lines(log, 3)}",
                str(log),
                "read its log",
                log_path=str(log),
            )
        if time.monotonic() > deadline:
            raise StageFailed(
                f"the source's server was not healthy after {timeout_s:g} s",
                str(log),
                "read its log",
                log_path=str(log),
            )
        time.sleep(0.1)
