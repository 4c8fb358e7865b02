"""Housekeeping: what is in the store, how large, what may go, and copies between stores.

Refuses to delete what is live, promoted, leased or among the last good builds of a spec; and to delete at all before it
was shown. Run it: `kilotok gc`, `kilotok store ls|du|pull|push`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tasks.store import Manifest, Store
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
    """Drop every artifact that no spec used in its last `keep` builds and that no pointer or lease names."""
    wanted = _used_lately(store, keep)
    promised = " ".join(_promises(store) + (_promises(store.local) if store.local is not store else []))
    leased = {lease["name"] for lease in store.leases()}
    garbage, num_kept = [], 0
    for manifest in store.entries():
        uri = store.artifact_uri(manifest)
        busy = f"{manifest.stage}-{manifest.key[:16]}" in leased
        if (manifest.stage, manifest.dirname) in wanted or busy or f"{manifest.stage}/{manifest.dirname}" in promised:
            num_kept += 1
        else:
            garbage.append(Garbage(uri, manifest.size_bytes, manifest))
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
    """Bring artifacts (all, or the named ones) from one store to another; what is there already is left alone."""
    manifests = [source.load(place) for place in places] or list(source.entries())
    copied = []
    for manifest in manifests:
        if manifest.cacheable and target.lookup(manifest.stage, manifest.key):
            continue
        folder = source.checkout(manifest)
        name = f"{manifest.stage}-{manifest.key[:16]}"
        with target.lease(name):
            workdir = target.local.workdir(f"copy-{manifest.stage}", manifest.digest)
            shutil.copytree(folder, workdir, dirs_exist_ok=True, copy_function=shutil.copy2)
            (workdir / PROVENANCE).mkdir(exist_ok=True)
            here = target.local.adopt(manifest, workdir)
            push = getattr(target, "push", None)
            copied.append(target.artifact_uri(push(here) if push else here))
    return copied


def _promises(store: Store) -> list[str]:
    return [json.dumps(store.read_json(name)) for folder in POINTERS for name in store.list_json(folder)]


def _used_lately(store: Store, keep: int) -> set[tuple[str, str]]:
    """(stage, folder name) of the newest `keep` that passed, per spec and stage, and of the newest of all."""
    wanted: set[tuple[str, str]] = set()
    for name in store.list_json("history"):
        record = store.read_json(name) or {}
        stage = name.rpartition("/")[2]
        keys = [entry["key"] for entry in record.get("keys", [])]
        good = [key for key in keys if "." not in key]
        wanted |= {(stage, key) for key in {*good[:keep], *keys[:1]}}
    return wanted
