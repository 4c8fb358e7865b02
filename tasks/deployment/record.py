"""A deployment's state on disk: two slots, a live pointer, and the operation that is under way.

Every change is an atomic file replacement, and every step is written down before it is done, so whoever comes after a
kill -9 knows which step may be half done. A kernel lock admits one deployer at a time and is freed by its death.

It refuses to act: tasks.deployment does. It refuses to be shared between machines: processes are local.

Run it: `kilotok status` reads it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specs.errors import LeaseHeld, StoreError

SLOTS = ("a", "b")
MAX_EVENTS = 50


class Record:
    """The JSON of one deployment, under `data`."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name = root, name
        self.path = root / "records" / "deployments" / f"{name}.json"
        self.run_dir = root / "run" / name  # sockets
        self.log_dir = root / "logs" / "deployments"
        self.data: dict[str, Any] = {
            "kilotok_deployment": 1,
            "name": name,
            "desired": "stopped",
            "live": None,  # slot that the public port belongs to
            "trial": None,  # slot that serves in its place while it is being validated (drain_swap)
            "previous": None,  # plan to roll back to
            "public": None,  # {"host", "port"}
            "keepers": {},  # port -> {"process", "socket"}
            "slots": {slot: {"state": "empty"} for slot in SLOTS},
            "operation": None,  # {"kind", "step", ...}
            "events": [],
        }

    @property
    def slots(self) -> dict[str, dict[str, Any]]:
        return self.data["slots"]

    @property
    def exists(self) -> bool:
        return self.path.exists()

    def load(self) -> Record:
        """Read the file, if there is one."""
        try:
            self.data.update(json.loads(self.path.read_bytes()))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            message = f"the deployment's record cannot be read: {error}"
            raise StoreError(message, str(self.path), "restore it, or stop its processes and delete it") from None
        return self

    def save(self) -> None:
        """Replace the file in one step: a reader sees the old state or the new one."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_suffix(f".{os.getpid()}.new")
            with new.open("w") as stream:
                json.dump(self.data, stream, indent=1, sort_keys=True)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(new, self.path)
        except OSError as error:
            raise StoreError(f"cannot write the deployment's record: {error.strerror}", str(self.path)) from None

    def note(self, text: str) -> None:
        """Remember an event; `save` writes it."""
        self.data["events"] = [*self.data["events"], {"at": round(time.time(), 3), "what": text}][-MAX_EVENTS:]


@contextlib.contextmanager
def locked(root: Path, name: str, wait_s: float = 10.0) -> Iterator[Record]:
    """The record, held alone. Raises LeaseHeld when another deployer works on it for longer than `wait_s`."""
    record = Record(root, name)
    try:
        record.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(record.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StoreError(f"cannot write to the store: {error.strerror}", str(record.path.parent)) from None
    try:
        _acquire(descriptor, name, wait_s)
        record.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        record.log_dir.mkdir(parents=True, exist_ok=True)
        yield record.load()
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, name: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise LeaseHeld(
                    "another deployer is at work", name, "wait for it, or look at `kilotok status`"
                ) from None
            time.sleep(0.1)


def is_locked(root: Path, name: str) -> bool:
    """Whether a deployer is at work now."""
    try:
        descriptor = os.open(Record(root, name).path.with_suffix(".lock"), os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
