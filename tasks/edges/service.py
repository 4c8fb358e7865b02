"""Processes that outlive us: start one detached, recognise it again, ask whether it is healthy, end it.

A pid alone is not an identity, it is reused: we keep the start time and the boot beside it. A process that was started
but not yet written down when we were killed is found by a marker on its command line.

It refuses to supervise: nothing here restarts anything.

Run it: `python -m pytest tests/tasks/test_deployment.py`; used by tasks.deployment.
"""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tasks.edges.process import spawn, stop_pid


@dataclass(frozen=True)
class Identity:
    """One process, not to be confused with a later one of the same number."""

    pid: int
    start_ticks: int
    boot_id: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def identity(pid: int) -> Identity | None:
    """Who this pid is now; None when nobody or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if fields[0] in "ZX" else Identity(pid, int(fields[19]), boot_id)


def is_same(known: Mapping[str, Any] | None) -> bool:
    """Whether the recorded process still runs."""
    return bool(known) and identity(int(known["pid"])) == Identity(**known)  # type: ignore[index,arg-type]


def start(
    argv: Sequence[str], log: Path, *, cwd: Path, env: Mapping[str, str] | None = None, fds: Sequence[int] = (),
    dies_with_us: bool = False,
) -> Identity:  # fmt: skip
    """Start a process, by default a detached one, its output in `log`. Raises OSError when it cannot be started."""
    process = spawn(argv, log, cwd=cwd, env={**os.environ, **(env or {})}, pass_fds=fds, dies_with_us=dies_with_us)
    found = identity(process.pid)
    # It may have died at once; an identity that matches nothing says so later.
    return found or Identity(process.pid, -1, "")


def find_marked(marker: str) -> Identity | None:
    """The process with this argument on its command line, other than ourselves."""
    wanted = os.fsencode(marker)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in arguments and (found := identity(int(entry.name))):
            return found
    return None


def end(known: Mapping[str, Any] | None, grace_s: float) -> bool:
    """SIGTERM, then after `grace_s` SIGKILL, the whole session; True if there was something to end."""
    if not known or not is_same(known):
        return False
    stop_pid(int(known["pid"]), grace_s)
    return True


def free_port(host: str) -> int:
    """A port nobody listens on now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def http_status(url: str, timeout_s: float = 2.0) -> int:
    """Status of a GET, 0 when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return 0


def get_json(url: str, timeout_s: float = 5.0) -> dict[str, Any]:
    """The JSON object at a URL; {} when there is none."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            found = json.load(answer)
    except (OSError, ValueError):
        return {}
    return dict(found) if isinstance(found, dict) else {}


def post_json(url: str, body: Mapping[str, Any], headers: Mapping[str, str], timeout_s: float) -> dict[str, Any]:
    """The JSON answer to a POST. Raises OSError (its message holds the server's) or ValueError."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        raise OSError(f"HTTP {error.code}: {error.read(500).decode(errors='replace')}") from None


def wait_gone(known: Mapping[str, Any] | None, timeout_s: float) -> bool:
    """Wait until the process has ended."""
    deadline = time.monotonic() + timeout_s
    while is_same(known):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
