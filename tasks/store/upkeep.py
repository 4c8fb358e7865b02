"""Housekeeping: what is in the store, how large, what may go, and copies between stores.

Refuses to delete what is live, promoted, leased or among the last good builds of a spec; and to delete at all before it
was shown. Run it: `kilotok gc`, `kilotok store ls|du|pull|push`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specs.errors import IntegrityError, StoreError
from tasks.edges.machine import num_cores
from tasks.store import FileEntry, Manifest, Store
from tasks.store.hashing import copy_hashed
from tasks.store.local import store_errors
from tasks.store.manifest import PROVENANCE

POINTERS = ("deployments", "last_good")  # records whose artifact URIs are promises


@dataclass(frozen=True)
class Garbage:
    uri: str
    size_bytes: int
    manifest: Manifest


@dataclass(frozen=True)
class Collected:
    """What goes (or would, in a dry run) and how many stay."""

    garbage: tuple[Garbage, ...]
    num_kept: int
    dry_run: bool

    @property
    def size_bytes(self) -> int:
        return sum(one.size_bytes for one in self.garbage)

    def to_text(self) -> str:
        verb = "would delete" if self.dry_run else "deleted"
        lines = [f"{verb} {one.uri} ({one.size_bytes / 1e9:.3f} GB)" for one in self.garbage]
        return "\n".join([*lines, f"{verb} {self.size_bytes / 1e9:.3f} GB, kept {self.num_kept} artifacts"])


def gc(store: Store, keep: int = 2, dry_run: bool = True) -> Collected:
    """Drop every artifact that is not of the last `keep` good builds of a spec, nor newest, promised or being built."""
    leased = {lease["name"] for lease in store.leases()}
    wanted = _of_good_builds(store, keep) | _used_lately(store, 50 if leased else 1)
    promised = " ".join(_promises(store) + (_promises(store.local) if store.local is not store else []))
    garbage, num_kept = [], 0
    for manifest in store.entries():
        name = f"{manifest.stage}/{manifest.dirname}"
        if name in wanted or name in promised or f"{manifest.stage}-{manifest.key[:16]}" in leased:
            num_kept += 1
        else:
            garbage.append(Garbage(store.artifact_uri(manifest), manifest.size_bytes, manifest))
    for one in [] if dry_run else garbage:
        store.delete(one.manifest)
    if sweep := getattr(store, "sweep", None):
        sweep(dry_run)
    return Collected(tuple(garbage), num_kept, dry_run)


def usage(store: Store) -> dict[str, tuple[int, int]]:
    """Stage -> (artifacts, bytes)."""
    found: dict[str, tuple[int, int]] = {}
    for manifest in store.entries():
        count, size = found.get(manifest.stage, (0, 0))
        found[manifest.stage] = (count + 1, size + manifest.size_bytes)
    return found


def listing(store: Store) -> list[dict[str, Any]]:
    """One row per artifact, oldest first."""
    rows = [
        {
            "stage": manifest.stage,
            "key": manifest.key,
            "created": manifest.created,
            "size_bytes": manifest.size_bytes,
            "files": len(manifest.files),
            "usable": manifest.cacheable,
            "uri": store.artifact_uri(manifest),
        }
        for manifest in store.entries()
    ]
    return sorted(rows, key=lambda row: row["created"])


def copy(source: Store, target: Store, places: Iterable[str] = ()) -> list[str]:
    """Bring artifacts (all, or the named ones) from one store to another; what is there already is left alone.

    Raises IntegrityError for the first file that is not what its manifest says.
    """
    manifests = [source.load(place) for place in places] or list(source.entries())
    copied = []
    for manifest in manifests:
        if _has(target, manifest):
            continue
        folder = source.checkout(manifest)
        with target.lease(f"{manifest.stage}-{manifest.key[:16]}"):
            if source.local.root != target.local.root:
                with store_errors(target.local.root):
                    manifest = target.local.adopt(manifest, _copy_files(folder, manifest, target))
            push = getattr(target, "push", None)
            copied.append(target.artifact_uri(push(manifest) if push else manifest))
    if copied:
        _copy_records(source, target, {_name_of(uri) for uri in copied})
    return copied


def _copy_records(source: Store, target: Store, names: set[str]) -> None:
    """The builds that made them go along: without them the other side's `gc` would see artifacts that nobody made."""
    for name in [*source.list_json("builds"), *source.list_json("history")]:
        record = source.read_json(name) or {}
        stage = name.rpartition("/")[2]
        made = {_name_of(row["uri"]) for row in record.get("stages", [])}
        made |= {f"{stage}/{entry['key']}" for entry in record.get("keys", [])}
        if made & names and target.read_json(name) is None:
            target.write_json(name, json.loads(json.dumps(record).replace(source.uri + "/", target.uri + "/")))


def _has(store: Store, manifest: Manifest) -> bool:
    if manifest.cacheable and store.local is store:
        return store.lookup(manifest.stage, manifest.key) is not None
    try:  # no lookup finds a verdict that failed, and one in a bucket would share what only this machine has
        return store.load(f"{manifest.stage}/{manifest.dirname}").digest == manifest.digest
    except (StoreError, IntegrityError):
        return False


def _copy_files(folder: Path, manifest: Manifest, target: Store) -> Path:
    """A work directory of `target` with the artifact's files, each hashed on its way."""
    workdir = target.local.workdir(f"copy-{manifest.stage}", manifest.digest)

    def one(file: FileEntry) -> None:
        if copy_hashed(folder / file.path, workdir / file.path) != file.sha256:
            raise IntegrityError(f"{file.path}: content changed (sha256)", str(folder), "kilotok verify, then rebuild")

    with ThreadPoolExecutor(max(2, num_cores())) as pool:
        for future in [pool.submit(one, file) for file in manifest.files]:
            future.result()
    (workdir / PROVENANCE).mkdir(exist_ok=True)
    for statement in (folder / PROVENANCE).iterdir():
        shutil.copyfile(statement, workdir / PROVENANCE / statement.name)
    return workdir


def _name_of(uri: str) -> str:
    """STAGE/KEY, the same in every store."""
    return "/".join(uri.rsplit("/", 2)[-2:])


def _promises(store: Store) -> list[str]:
    return [json.dumps(store.read_json(name)) for folder in POINTERS for name in store.list_json(folder)]


def _of_good_builds(store: Store, keep: int) -> set[str]:
    """STAGE/KEY of the last `keep` builds of each spec that passed; builds of the same artifacts count once."""
    found: dict[str, list[set[str]]] = {}
    for name in sorted(store.list_json("builds"), reverse=True):  # newest first: an id begins with its time
        good = found.setdefault(name.split("/")[1], [])
        if len(good) < keep and (record := store.read_json(name)) and record["verdict"] == "PASS":
            names = {_name_of(row["uri"]) for row in record["stages"]}
            good += [names] if names not in good else []
    return {name for builds in found.values() for names in builds for name in names}


def _used_lately(store: Store, num_keys: int) -> set[str]:
    """STAGE/KEY of the newest of each stage and spec: what an unfinished build goes on from.

    While something is being built, its inputs may be older ones, so more of them are kept.
    """
    wanted: set[str] = set()
    for name in store.list_json("history"):
        keys = (store.read_json(name) or {}).get("keys", [])
        wanted |= {f"{name.rpartition('/')[2]}/{entry['key']}" for entry in keys[:num_keys]}
    return wanted
