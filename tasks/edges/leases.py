"""Who is building what: a lease is a kernel flock on a small file that names its owner.

Refuses timeouts and clocks: the kernel frees the lock the moment the owner (and the child it gave the descriptor to)
is gone, by crash or not. The file stays; its text is only a name, the lock is the truth.
See them with `kilotok status`.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

_POLL_S = 0.2


def describe_owner(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"pid {owner.get('pid')} on {owner.get('host')} since {owner.get('started')}"


def new_owner(name: str) -> dict[str, Any]:
    started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"name": name, "pid": os.getpid(), "host": socket.gethostname(), "started": started}


@contextmanager
def file_lease(path: Path, name: str, on_wait: Callable[[str], None] | None = None) -> Iterator[int]:
    """Hold `path` exclusively, waiting for as long as its owner lives; yields the descriptor for a child to inherit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        told = ""
        while not _try_lock(descriptor):
            owner = describe_owner(_read_owner(path))
            if on_wait and owner != told:
                on_wait(f"waiting for {owner}")
                told = owner
            time.sleep(_POLL_S)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(new_owner(name)).encode(), 0)
        yield descriptor
        # Reached on success only; after an error the name stays as a trace of who failed, the lock is gone either way.
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def held_leases(folder: Path) -> list[dict[str, Any]]:
    """The owners of every lease that is held right now."""
    held = [path for path in sorted(folder.glob("*.lease")) if is_held(path)]
    owners = [(path, _read_owner(path)) for path in held]
    return [{"name": path.stem, **owner, "owner": describe_owner(owner)} for path, owner in owners]


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_owner(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}
