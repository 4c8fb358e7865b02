"""sha256 of many files on all cores; memory stays at one small buffer per core whatever the files' size.

Refuses to read a file twice: a stage that hashed while it wrote says so (`record_hash`) and is believed as long as
size and mtime are still those it recorded; a hard link to a file of an input has that file's hash.
Run it: `kilotok verify URI`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tasks.edges.machine import num_cores
from tasks.job import SCRATCH
from tasks.store.manifest import FileEntry

_BUFFER_BYTES = 4 << 20
_HASHES = "hashes.jsonl"


def sha256_file(path: Path) -> str:
    """hashlib lets go of the interpreter lock on buffers this large, so threads do use all cores."""
    digest = hashlib.sha256()
    buffer = bytearray(_BUFFER_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := stream.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def hash_files(folder: Path, names: Iterable[str], each: Callable[[str, str], None] | None = None) -> dict[str, str]:
    """name -> sha256. `each` hears every finished file. Large files start first so that cores end together."""
    order = sorted(names, key=lambda name: -(folder / name).stat().st_size)
    with ThreadPoolExecutor(max_workers=max(2, num_cores())) as pool:
        hashes = {}
        for name, digest in zip(order, pool.map(lambda name: sha256_file(folder / name), order), strict=True):
            hashes[name] = digest
            if each:
                each(name, digest)
    return hashes


def copy_hashed(source: Path, target: Path) -> str:
    """Copy a file with its mtime, hashing what goes through; returns its sha256."""
    digest = hashlib.sha256()
    buffer = bytearray(_BUFFER_BYTES)
    view = memoryview(buffer)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb", buffering=0) as stream, open(target, "wb") as out:
        while count := stream.readinto(buffer):
            digest.update(view[:count])
            out.write(view[:count])
    shutil.copystat(source, target)
    return digest.hexdigest()


def record_hash(folder: Path, name: str, sha256: str, written: Path | None = None) -> None:
    """For stages: `folder/name` was hashed while it was written, so publishing need not read it again.

    `written` is where the file still is when it gets its name only after this.
    """
    status = (written or folder / name).stat()
    (folder / SCRATCH).mkdir(exist_ok=True)
    line = json.dumps({"path": name, "size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256})
    with open(folder / SCRATCH / _HASHES, "a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def recorded_hashes(folder: Path) -> dict[tuple[str, int, int], str]:
    """(name, size, mtime_ns) -> sha256 as recorded; a line cut short by a crash is skipped."""
    known: dict[tuple[str, int, int], str] = {}
    try:
        lines = (folder / SCRATCH / _HASHES).read_text(encoding="utf-8").splitlines()
    except OSError:
        return known
    for line in lines:
        try:
            entry = json.loads(line)
            known[entry["path"], entry["size"], entry["mtime_ns"]] = entry["sha256"]
        except (ValueError, KeyError, TypeError):
            continue
    return known


def linkable(folder: Path, files: Iterable[FileEntry]) -> dict[tuple[int, int, int, int], str]:
    """Identity -> sha256 of an artifact's files: a hard link to one of them has its hash."""
    return {_identity(os.lstat(folder / file.path)): file.sha256 for file in files}


def describe_files(
    folder: Path,
    found: list[tuple[str, os.stat_result]],
    linked: Mapping[tuple[int, int, int, int], str] | None = None,
) -> tuple[FileEntry, ...]:
    """File entries for a finished work directory, reading only what nobody has hashed yet."""
    known = recorded_hashes(folder)
    hashes: dict[str, str] = {}
    for name, status in found:
        value = known.get((name, status.st_size, status.st_mtime_ns)) or (linked or {}).get(_identity(status))
        if value:
            hashes[name] = value
    hashes |= hash_files(folder, [name for name, _ in found if name not in hashes])
    return tuple(FileEntry(name, status.st_size, hashes[name], status.st_mtime_ns) for name, status in found)


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
