"""A Prefect server for the length of one run, when none is configured.

Prefect's own temporary server times out on slow machines and loses task records, so `kilotok run` starts a
real one with its
database under `.kilotok/prefect` and stops it afterwards. Refuses to outlive its run or to touch a configured server.
Run one for good with `prefect server start`; `kilotok run` then uses it through PREFECT_API_URL.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from specs.errors import NetworkError
from tasks.edges.process import spawn, stop

START_TIMEOUT_S = 120  # a cold start migrates a database: 20 s on two idle cores, far more on a busy machine
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # our own terminal speaks; the server keeps every line
}


@contextlib.contextmanager
def prefect_server(home: Path, say: Callable[[str], None]) -> Iterator[str]:
    """The API URL to use: the configured one, or that of a server started for the block and stopped after it."""
    added = {key: value for key, value in QUIET.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield from _served(home, say)
    finally:
        for key in added:
            os.environ.pop(key, None)


def _served(home: Path, say: Callable[[str], None]) -> Iterator[str]:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if configured := PREFECT_API_URL.value():
        yield configured
        return
    url, server = _start(home)
    try:
        say(f"  [dim]Prefect   {url.removesuffix('/api')} for this run (none is configured)[/]")
        with temporary_settings({PREFECT_API_URL: url}):
            try:
                yield url
            finally:
                _flush()
    finally:
        stop(server, 8.0)


def _start(home: Path) -> tuple[str, subprocess.Popen[bytes]]:
    home.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The UI's browser code asks this API address; without it the pages load and stay empty.
    env = {
        **os.environ,
        **QUIET,
        "PREFECT_HOME": str(home.resolve()),
        "PREFECT_UI_API_URL": f"http://127.0.0.1:{port}/api",
    }
    log = home / "server.log"
    argv = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    server = spawn(argv, log, env=env)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=2):
            return f"http://127.0.0.1:{port}/api", server
        time.sleep(0.1)
    stop(server, 8.0)
    raise NetworkError(
        "the local Prefect server did not start", str(log), "read that log, or set PREFECT_API_URL to a running server"
    )


def _flush() -> None:
    """Send what is still queued: task states travel as events, and a server stopped too early loses them."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (EventsWorker, APILogWorker):
        worker.drain_all(timeout=10)
    time.sleep(1.0)  # the server writes its own queue once a second
