"""Artifacts in a directory: `ROOT/artifacts/STAGE/KEY/{manifest.json, files}`, published by one rename.

Refuses to show half an artifact (a work directory becomes an artifact in a single rename, manifest included) and to
believe a file whose size or mtime is not the manifest's: it is read again before it counts as a hit.
Look inside with `kilotok store ls`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from specs.errors import IntegrityError, StoreError
from specs.receipts import Receipt
from tasks.edges.leases import file_lease, held_leases, is_held
from tasks.job import SCRATCH
from tasks.store.hashing import describe_files, hash_files, linkable
from tasks.store.manifest import MANIFEST, PROVENANCE, FileEntry, Manifest, content_digest, walk

STALE_WORK_DAYS = 14
_FULL = {errno.ENOSPC: "full", errno.EDQUOT: "over its quota", errno.EFBIG: "not allowed files this large"}
_DENIED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}


@dataclass(frozen=True)
class Found:
    """What a look without reading says: an artifact or why there is none; `touched` files must be read first."""

    manifest: Manifest | None = None
    problem: str = ""
    touched: tuple[str, ...] = ()


@dataclass(frozen=True)
class Meta:
    """What the runner knows about an artifact it publishes, beside its files."""

    components: Mapping[str, str]
    metrics: Mapping[str, float]
    provenance: Mapping[str, Any]
    inputs: Mapping[str, str]
    cacheable: bool = True


def as_store_error(error: OSError, where: str | Path) -> StoreError | None:
    """The store's own troubles in one line; None for an OSError that is not about the store."""
    if error.errno in _FULL:
        return StoreError(f"the store is {_FULL[error.errno]}", str(where), "free space (kilotok gc) or use --store")
    if error.errno in _DENIED:
        return StoreError("the store cannot be written", str(where), "make it writable or name another with --store")
    return None


@contextmanager
def store_errors(where: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if known := as_store_error(error, where):
            raise known from error
        raise


class LocalStore:
    """See the module; every public method is safe to call from several processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.uri = self.root.as_uri()
        self.logs = self.root / "logs"
        self.local = self  # where this machine keeps what is its own: memos, work, logs

    # -- artifacts ---------------------------------------------------------------------------------------------------
    def folder(self, manifest: Manifest) -> Path:
        return self.root / "artifacts" / manifest.stage / manifest.dirname

    def artifact_uri(self, manifest: Manifest) -> str:
        return f"{self.uri}/artifacts/{manifest.stage}/{manifest.dirname}"

    def inspect(self, stage: str, key: str) -> Found:
        """Is it here? Reads the manifest and stats the files; opens none of them."""
        return self._inspect_folder(self.root / "artifacts" / stage / key)

    def lookup(self, stage: str, key: str) -> Manifest | None:
        """A hit to build on: like `inspect`, but touched files are read again, and forgiven if they are unchanged."""
        found = self.inspect(stage, key)
        if found.manifest and found.touched:
            return self._forgive(found.manifest, found.touched)
        return found.manifest

    def load(self, place: str) -> Manifest:
        """The manifest of an artifact URI, folder, or `stage/key` (a unique start of the key will do)."""
        folder = self._resolve(place)
        try:
            return Manifest.from_json((folder / MANIFEST).read_bytes(), str(folder))
        except OSError as error:
            raise StoreError("no such artifact", place, "see kilotok store ls") from error

    def checkout(self, manifest: Manifest) -> Path:
        """The artifact's directory, to be read and never written."""
        folder = self.folder(manifest)
        if not folder.is_dir():
            raise StoreError("the artifact is gone", str(folder), "run again: it will be rebuilt")
        return folder

    def path(self, receipt: Receipt) -> Path:
        """The directory of what a receipt speaks of."""
        return self.checkout(self.load(receipt.uri))

    def missing_bytes(self, manifest: Manifest) -> int:
        """Bytes to move before the artifact can be used on this machine."""
        return 0

    def entries(self) -> Iterator[Manifest]:
        """Every whole artifact, oldest name first; what is damaged is passed over."""
        for path in sorted((self.root / "artifacts").glob(f"*/*/{MANIFEST}")):
            try:
                yield Manifest.from_json(path.read_bytes(), str(path))
            except (OSError, IntegrityError):
                continue

    def delete(self, manifest: Manifest) -> None:
        with store_errors(self.root):
            _remove(self._set_aside(self.folder(manifest)))

    # -- building ----------------------------------------------------------------------------------------------------
    def workdir(self, stage: str, key: str) -> Path:
        """The place to build in: the same one after a crash, so that a stage finds its finished parts."""
        with store_errors(self.root):
            path = self.root / "work" / f"{stage}-{key[:16]}"
            self._sweep(path)
            path.mkdir(parents=True, exist_ok=True)
            (path / MANIFEST).unlink(missing_ok=True)  # of a publication that a crash cut short
            os.utime(path)
            return path

    def publish(self, stage: str, key: str, workdir: Path, meta: Meta) -> Manifest:
        """Turn a finished work directory into an artifact: hash, state its provenance, manifest, one rename."""
        from tasks.attest import write_statements  # only publishing should pay for it

        with store_errors(self.root):
            files = describe_files(workdir, walk(workdir), self._linkable(meta.inputs.values()))
            manifest = Manifest(
                stage,
                key,
                dict(meta.components),
                files,
                content_digest(files),
                dict(meta.metrics),
                dict(meta.provenance),
                dict(meta.inputs),
                _now(),
                meta.cacheable,
            )
            write_statements(manifest, workdir / PROVENANCE, self.uri)
            return self.adopt(manifest, workdir)

    def adopt(self, manifest: Manifest, workdir: Path) -> Manifest:
        """Make an artifact of files known to match: fsync, manifest last, then the one rename that shows it."""
        with store_errors(self.root):
            for file in manifest.files:
                _fsync(workdir / file.path)
            (workdir / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")  # no reader before the rename
            _fsync(workdir / MANIFEST)
            _fsync(workdir)
            _remove(workdir / SCRATCH)
            target = self.folder(manifest)
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = self._set_aside(target) if target.exists() else None
            os.rename(workdir, target)
            _fsync(target.parent)
            if aside:
                _remove(aside)
            return manifest

    @contextmanager
    def lease(self, name: str, on_wait: Callable[[str], None] | None = None) -> Iterator[int | None]:
        """Hold `name` against every other run; yields a descriptor for children to inherit, freed when all are gone."""
        with ExitStack() as held:
            with store_errors(self.root):
                descriptor = held.enter_context(file_lease(self._lease_path(name), name, on_wait))
            yield descriptor

    def leases(self) -> list[dict[str, Any]]:
        return held_leases(self.root / "leases")

    def verify(self, manifest: Manifest) -> list[str]:
        """Read every file again with all cores; returns what is wrong, one sentence per file."""
        folder = self.folder(manifest)
        sizes = {file.path: _size_of(folder / file.path) for file in manifest.files}
        wrong = [_size_problem(file, sizes[file.path]) for file in manifest.files if sizes[file.path] != file.size]
        same_size = [file for file in manifest.files if sizes[file.path] == file.size]
        hashes = hash_files(folder, [file.path for file in same_size])
        wrong += [f"{f.path}: content changed (sha256)" for f in same_size if hashes[f.path] != f.sha256]
        listed = {file.path for file in manifest.files}
        try:
            wrong += [f"{name}: not in the manifest" for name, _ in walk(folder) if name not in listed]
        except IntegrityError as error:
            wrong.append(error.what)
        return sorted(wrong)

    # -- small records -----------------------------------------------------------------------------------------------
    def read_json(self, name: str) -> Any | None:
        try:
            return json.loads((self.root / "records" / f"{name}.json").read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None

    def write_json(self, name: str, value: Any) -> None:
        with store_errors(self.root):
            path = self.root / "records" / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_atomic(path, json.dumps(value, indent=1, sort_keys=True) + "\n")

    def list_json(self, folder: str) -> list[str]:
        """Names for `read_json` below a folder of records, sorted."""
        base = self.root / "records"
        return sorted(path.relative_to(base).with_suffix("").as_posix() for path in (base / folder).rglob("*.json"))

    def history(self, stage: str, spec_name: str) -> dict[str, Any] | None:
        """What this spec last had for the stage: {key, digest, components, size_bytes, created, keys: [...]}."""
        return self.read_json(f"history/{spec_name}/{stage}")

    def remember(self, spec_name: str, manifest: Manifest) -> None:
        """Note that the spec uses this artifact now; the newest 50 keys stay listed for upkeep."""
        record = next_history(self.history(manifest.stage, spec_name), manifest)
        if record:
            self.write_json(f"history/{spec_name}/{manifest.stage}", record)

    # -- inside ------------------------------------------------------------------------------------------------------
    def _inspect_folder(self, folder: Path) -> Found:
        try:
            manifest = Manifest.from_json((folder / MANIFEST).read_bytes(), str(folder))
        except FileNotFoundError:
            return Found(problem="damaged: no manifest" if folder.exists() else "")
        except IntegrityError as error:
            return Found(problem=error.what)
        if not manifest.cacheable or folder.name != manifest.dirname:
            return Found(problem="artifact under a name that is not its own")
        touched = []
        for file in manifest.files:
            try:
                status = os.lstat(folder / file.path)
            except OSError:
                return Found(problem=f"damaged: {file.path} is missing")
            if not stat.S_ISREG(status.st_mode):
                return Found(problem=f"damaged: {file.path} is not a plain file")
            if status.st_size != file.size:
                return Found(problem=f"damaged: {_size_problem(file, status.st_size)}")
            if status.st_mtime_ns != file.mtime_ns:
                touched.append(file.path)
        return Found(manifest, "", tuple(touched))

    def _forgive(self, manifest: Manifest, touched: tuple[str, ...]) -> Manifest | None:
        """A copied or touched artifact with the right content is a hit; its new mtimes are noted for next time."""
        folder = self.folder(manifest)
        hashes = hash_files(folder, touched)
        if any(hashes[file.path] != file.sha256 for file in manifest.files if file.path in hashes):
            return None
        files = tuple(replace(file, mtime_ns=os.lstat(folder / file.path).st_mtime_ns) for file in manifest.files)
        fresh = replace(manifest, files=files)
        with suppress(OSError):  # a read-only store is still good to read from; it is only slower
            _write_atomic(folder / MANIFEST, fresh.to_json())
        return fresh

    def _linkable(self, uris: Iterable[str]) -> dict[tuple[int, int, int, int], str]:
        """Hashes of the input files that this store holds, whichever store their URI names."""
        known: dict[tuple[int, int, int, int], str] = {}
        for uri in uris:
            folder = self.root / "artifacts" / uri.rpartition("/artifacts/")[2]
            with suppress(OSError, IntegrityError):
                known |= linkable(folder, Manifest.from_json((folder / MANIFEST).read_bytes(), uri).files)
        return known

    def _resolve(self, place: str) -> Path:
        place = place.removeprefix(self.uri + "/").removeprefix("file://").removeprefix("artifacts/")
        path = Path(place)
        if path.is_absolute():
            return path
        matches = sorted((self.root / "artifacts").glob(f"{place}*"))
        exact = self.root / "artifacts" / place
        return matches[0] if len(matches) == 1 and not exact.exists() else exact

    def _lease_path(self, name: str) -> Path:
        return self.root / "leases" / f"{name.replace('/', '-')[:96]}.lease"

    def _set_aside(self, folder: Path) -> Path:
        trash = self.root / "trash" / f"{folder.parent.name}-{folder.name}-{time.time_ns()}"
        trash.parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder, trash)
        return trash

    def _sweep(self, keep: Path) -> None:
        """Work that nobody came back to, and trash of a crash."""
        oldest = time.time() - STALE_WORK_DAYS * 86400
        for path in [*(self.root / "work").glob("*"), *(self.root / "trash").glob("*")]:
            leased = is_held(self._lease_path(path.name))
            if path != keep and not leased and path.stat().st_mtime < oldest:
                _remove(path)


def next_history(record: dict[str, Any] | None, manifest: Manifest) -> dict[str, Any] | None:
    """The history record after `manifest` was used; None when it already says so."""
    keys: list[dict[str, str]] = (record or {}).get("keys", [])
    if record and record.get("key") == manifest.key and record.get("digest") == manifest.digest:
        return None
    entry = {"key": manifest.dirname, "digest": manifest.digest, "created": manifest.created}
    return {
        "key": manifest.key,
        "digest": manifest.digest,
        "components": manifest.components,
        "size_bytes": manifest.size_bytes,
        "created": manifest.created,
        "cacheable": manifest.cacheable,
        "keys": [entry, *(old for old in keys if old["key"] != manifest.dirname)][:50],
    }


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _size_of(path: Path) -> int | None:
    """None for what is not there as a plain file: a link is not the file it points to."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _size_problem(file: FileEntry, size: int | None) -> str:
    return f"{file.path} is missing" if size is None else f"{file.path} has {size} bytes instead of {file.size}"


def _write_atomic(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.time_ns()}")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
