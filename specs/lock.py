"""The lock of a spec: which commit, which files, which bytes.

What it is: `specs/locks/NAME.yaml`, read, written and compared with the spec. It is committed beside the spec, so a
build from the same Git commit reads the same bytes.
What it refuses to be: made here. Resolving a branch needs the network: `make_lock` is in tasks/edges/hub.py.
Run it: `kilotok lock SPEC`.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from specs.errors import LockError
from specs.schema import Spec

LOCK_VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileLock:
    """The bytes of one file."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Lock:
    """A source at a commit, with its files; and the data files the spec names, by URI."""

    source: str
    revision: str  # the commit; "" for sources that have none (file:, s3://), whose hashes say it all
    requested: str = "main"  # the branch or tag the spec asked for when this was made
    globs: tuple[str, ...] | None = None  # model.files of the spec when this was made
    files: dict[str, FileLock] = field(default_factory=dict)
    data: dict[str, FileLock] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes of the checkpoint's files."""
        return sum(entry.size for entry in self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain dict as it stands in the YAML file."""
        globs = None if self.globs is None else list(self.globs)
        return {"kilotok_lock": LOCK_VERSION, **asdict(self), "globs": globs}

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "lock") -> Lock:
        """The lock that `to_dict` wrote; LockError for anything else."""
        if not isinstance(data, dict) or data.get("kilotok_lock") != LOCK_VERSION:
            raise LockError("not a kilotok lock of version 1", where, "make it again: kilotok lock SPEC")
        try:
            tables = {name: {path: FileLock(**entry) for path, entry in data.get(name, {}).items()} for name in _TABLES}
            globs = None if data.get("globs") is None else tuple(data["globs"])
            lock = cls(str(data["source"]), str(data["revision"]), str(data["requested"]), globs, **tables)
        except (KeyError, TypeError, AttributeError) as error:
            raise LockError(f"broken lock: {error}", where, "make it again: kilotok lock SPEC") from error
        for path, entry in [*lock.files.items(), *lock.data.items()]:
            if not _SHA256.fullmatch(str(entry.sha256)) or not isinstance(entry.size, int) or entry.size < 0:
                raise LockError(f"{path} has no sha256 and size", where, "make it again: kilotok lock SPEC")
        for path in lock.files:
            if path.startswith("/") or ".." in path.split("/") or "\\" in path:
                raise LockError(f"{path} points outside the checkpoint", where, "make it again: kilotok lock SPEC")
        return lock


_TABLES = ("files", "data")


def lock_path(spec: Spec) -> Path:
    """specs/locks/NAME.yaml: the folder `locks` beside the spec."""
    return spec.path.parent / "locks" / f"{spec.name}.yaml"


def read_lock(spec: Spec) -> Lock | None:
    """The spec's lock, or None if there is none yet."""
    path = lock_path(spec)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return Lock.from_dict(yaml.safe_load(text), str(path))
    except yaml.YAMLError as error:
        raise LockError(f"broken YAML: {error}", str(path), "make it again: kilotok lock SPEC") from error


def write_lock(spec: Spec, lock: Lock) -> Path:
    """Write the lock where `read_lock` looks for it, in one step; returns its path."""
    path = lock_path(spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".yaml.part")
    half.write_text(
        f"# Made by `kilotok lock {spec.path}`; commit it.\n" + yaml.safe_dump(lock.to_dict(), sort_keys=False)
    )
    half.replace(path)
    return path


def data_uris(spec: Spec) -> list[str]:
    """The data files a spec names: prompts, calibration and problems; each once."""
    accuracy, latency = spec.validation.accuracy, spec.validation.latency
    named = (spec.quantize.calibration.dataset, spec.draft.data.prompts, accuracy.problems, latency.prompts)
    return list(dict.fromkeys(uri for uri in named if uri))


def check_lock(spec: Spec, lock: Lock | None) -> Lock:
    """The lock, if it is for this spec as it stands; LockError that names the difference if not.

    This compares spec and lock. Whether the source still has those bytes is seen when they are read.
    """
    where, fix = str(lock_path(spec)), f"run: kilotok lock {spec.path}"
    if lock is None:
        raise LockError(f"{spec.name} is not locked", where, fix)
    if lock.source != spec.model.source:
        raise LockError(f"the lock is for {lock.source}, the spec says {spec.model.source}", where, fix)
    if lock.requested != spec.model.revision and lock.revision != spec.model.revision:
        raise LockError(f"the lock is for revision {lock.requested}, the spec says {spec.model.revision}", where, fix)
    if lock.globs != spec.model.files:
        raise LockError("model.files has changed since the lock was made", where, fix)
    missing = [uri for uri in data_uris(spec) if uri not in lock.data]
    if missing:
        raise LockError(f"the lock does not have {', '.join(missing)}", where, fix)
    if not lock.files:
        raise LockError("the lock has no files", where, fix)
    return lock
