"""The checkpoint, as locked, byte for byte.

What it is: files of a folder, bucket or hub, copied in parallel, hashed on the way and resumed at the byte where a
crash left them.
What it refuses: an unlocked source, a lock for another source, a wrong hash (also at the right size), a missing file or
shard, weights that are not safetensors, and a disk too small, before the first byte moves.
Run it: `kilotok run SPEC` (stage `download`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from specs.errors import IntegrityError, LockError, NetworkError, StoreError
from specs.lock import FileLock, Lock
from tasks.edges.hub import INDEX_FILE, PIECE_BYTES, Source, check_names, check_shards, open_source
from tasks.job import Job, Progress
from tasks.store.hashing import record_hash, recorded_hashes

WORKERS = 16  # streams; one S3 connection gives about 90 MB/s
ATTEMPTS = 5  # per file, counted anew after every attempt that moved bytes
_RESERVE_BYTES = 64 << 20
_TELL_EVERY_S = 0.1


def build(job: Job, progress: Progress) -> dict[str, float]:
    """Put every locked file into `job.out`; returns bytes and file counts."""
    lock = _lock_of(job)
    where = lock.source
    check_names(lock.files, where)
    source = open_source(lock.source, job.root, lock.revision, job.spec["model"].get("token"))
    work = _Work(job, source, progress, lock.size_bytes)
    waiting = {path: entry for path, entry in lock.files.items() if not work.finished(path, entry)}
    _check_disk(job.out, sum(entry.size - work.partial(path) for path, entry in waiting.items()))
    reused = lock.size_bytes - sum(entry.size for entry in waiting.values())
    work.count(reused, f"{len(lock.files) - len(waiting)} files already here")
    pool = ThreadPoolExecutor(WORKERS)
    try:
        # Largest first, so that the last stream does not run alone.
        futures = [
            pool.submit(work.fetch, path, waiting[path]) for path in sorted(waiting, key=lambda p: -waiting[p].size)
        ]
        for future in futures:
            future.result()
    finally:
        work.stop.set()
        pool.shutdown(cancel_futures=True)
    check_shards(lock.files, (job.out / INDEX_FILE).read_bytes, where)
    return {
        "download.bytes": float(lock.size_bytes),
        "download.bytes_moved": float(work.moved),
        "download.files": float(len(lock.files)),
    }


def _lock_of(job: Job) -> Lock:
    if job.lock is None:
        raise LockError(f"{job.spec.get('name', 'the spec')} is not locked", "", "run: kilotok lock SPEC")
    lock = Lock.from_dict({**job.lock, "kilotok_lock": job.lock.get("kilotok_lock", 1)})
    if lock.source != job.spec["model"]["source"]:
        what = f"the lock is for {lock.source}, the spec says {job.spec['model']['source']}"
        raise LockError(what, "", "run: kilotok lock SPEC")
    return lock


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed and needed + _RESERVE_BYTES > free:
        what = f"not enough disk: {needed / 2**30:.1f} GiB to download, {free / 2**30:.1f} GiB free"
        raise StoreError(what, str(folder), "free space, or use a store on a larger disk: --store URI")


class _Work:
    """What the streams share: the target, the bytes done, and the ledger of files already verified."""

    def __init__(self, job: Job, source: Source, progress: Progress, total: int) -> None:
        self.out, self.scratch, self.source, self.progress, self.total = job.out, job.scratch, source, progress, total
        self.done = self.moved = 0
        self.stop = threading.Event()
        self._guard = threading.Lock()
        self._told = 0.0
        self._verified = recorded_hashes(self.out)

    def finished(self, path: str, entry: FileLock) -> bool:
        """A file that was verified in an earlier attempt and has not been touched since."""
        target = self.out / path
        if not target.is_file():
            return False
        return self._verified.get((path, entry.size, target.stat().st_mtime_ns)) == entry.sha256

    def partial(self, path: str) -> int:
        part = self._part(path)
        return part.stat().st_size if part.is_file() else 0

    def count(self, size: int, note: str) -> None:
        """Pieces are small and many: most of them are only counted."""
        with self._guard:
            self.done += size
            now = time.monotonic()
            if self.done >= self.total or now - self._told >= _TELL_EVERY_S:
                self._told = now
                self.progress(self.done, self.total, note)

    def fetch(self, path: str, entry: FileLock) -> None:
        """One file: continue its part, check, put it in place. Network errors are retried while bytes arrive."""
        digest, size = self._resume(path, entry)
        attempts = 0
        while size < entry.size or not self._part(path).exists():
            before = size
            try:
                size = self._stream(path, entry, digest, size)
                break  # the source has no more bytes
            except _Stopped:
                return
            except NetworkError:
                size = digest.size
                attempts = attempts + 1 if size == before else 1
                if attempts >= ATTEMPTS:
                    raise
        self._check(path, entry, digest.hexdigest(), size)
        self._place(path, entry)

    def _stream(self, path: str, entry: FileLock, digest: _Digest, start: int) -> int:
        with open(self._part(path), "ab", buffering=0) as part:  # it never lags behind the digest when a stream breaks
            for piece in self.source.read(path, start):
                if self.stop.is_set():
                    raise _Stopped
                _write(part, piece, path)
                digest.update(piece)
                self.moved += len(piece)
                self.count(len(piece), path)
                if digest.size > entry.size:
                    break  # longer than locked: wrong already, and it may never end
        return digest.size

    def _resume(self, path: str, entry: FileLock) -> tuple[_Digest, int]:
        """Digest and length of what an earlier attempt left; nothing is trusted that was not hashed here."""
        part, digest = self._part(path), _Digest()
        part.parent.mkdir(parents=True, exist_ok=True)
        if self.partial(path) > entry.size:
            part.unlink()
        if part.exists():
            with open(part, "rb") as stream:
                while piece := stream.read(PIECE_BYTES):
                    digest.update(piece)
            self.count(digest.size, f"{path} resumed at byte {digest.size}")
        return digest, digest.size

    def _check(self, path: str, entry: FileLock, sha256: str, size: int) -> None:
        if (sha256, size) == (entry.sha256, entry.size):
            return
        self._part(path).unlink(missing_ok=True)
        sizes = f", {size} bytes instead of {entry.size}" if size != entry.size else ", same size"
        what = f"{path} is not what was locked: sha256 {sha256}, expected {entry.sha256}{sizes}"
        fix = "restore the file; if the change is meant, run: kilotok lock SPEC"
        raise IntegrityError(what, self.source.uri, fix)

    def _place(self, path: str, entry: FileLock) -> None:
        target = self.out / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(self._part(path), "rb") as part:
            os.fsync(part.fileno())  # before the ledger vouches for it; the other streams go on meanwhile
        with self._guard:  # publishing believes it, and so does the next attempt
            record_hash(self.out, path, entry.sha256, self._part(path))
        os.replace(self._part(path), target)

    def _part(self, path: str) -> Path:
        return self.scratch / "parts" / f"{path}.part"


class _Stopped(Exception):
    """Another file failed; this one keeps its part for the next attempt."""


class _Digest:
    """sha256 that knows its length."""

    def __init__(self) -> None:
        self._sha256, self.size = hashlib.sha256(), 0

    def update(self, piece: bytes) -> None:
        self._sha256.update(piece)
        self.size += len(piece)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def _write(part: BinaryIO, piece: bytes, path: str) -> None:
    left = memoryview(piece)
    try:
        while left:  # an unbuffered write may take less than it is given
            left = left[part.write(left) :]
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}", "", "free space or change permissions") from error
