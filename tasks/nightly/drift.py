"""Has the source moved since it was locked? Says so and proposes the new lock; the build keeps the old one.

Refuses to take a change: a lock is committed by a person, after reading what moved. A hub that does not answer tonight
is no reason to stop, since nothing that is locked needs it.
Run it: by the nightly flow; by hand `kilotok lock SPEC` and `git diff specs/locks`.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from specs.errors import KilotokError
from specs.lock import FileLock, Lock, lock_path, read_lock
from tasks.store.memo import Memo

if TYPE_CHECKING:
    from specs.schema import Spec
    from tasks.store import Store

SAME, MOVED, UNKNOWN = "same", "moved", "unknown"


def lock_drift(spec: Spec, store: Store) -> dict[str, Any]:
    """{"state": same | moved | unknown, "what": [...], "proposal": diff or ""}; never raises for a silent source."""
    locked = read_lock(spec)
    if locked is None:
        return {"state": UNKNOWN, "what": ["not locked"], "proposal": ""}
    try:
        now = _look(spec, locked, store)
    except KilotokError as error:
        return {"state": UNKNOWN, "what": [str(error)], "proposal": ""}
    moved = differences(locked, now)
    return {"state": MOVED if moved else SAME, "what": moved, "proposal": proposal(spec, locked, now) if moved else ""}


def differences(old: Lock, new: Lock) -> list[str]:
    """One phrase per difference."""
    found = []
    if old.revision != new.revision:
        found.append(f"{old.source} moved from {old.revision[:12] or 'none'} to {new.revision[:12] or 'none'}")
    for before, after in ((old.files, new.files), (old.data, new.data)):
        for path in sorted({*before, *after}):
            if path not in after:
                found.append(f"{path} is gone")
            elif path not in before:
                found.append(f"{path} is new")
            elif before[path] != after[path]:
                found.append(f"{path} changed")
    return found


def proposal(spec: Spec, old: Lock, new: Lock) -> str:
    """A patch of specs/locks/NAME.yaml for `git apply`, as `kilotok lock` would write it."""
    name, heading = f"specs/locks/{lock_path(spec).name}", _heading(lock_path(spec))
    before, after = (
        [*heading, *yaml.safe_dump(lock.to_dict(), sort_keys=False).splitlines(keepends=True)] for lock in (old, new)
    )
    return "".join(difflib.unified_diff(before, after, f"a/{name}", f"b/{name}"))


def _heading(path: Path) -> list[str]:
    """The comment above a lock, which a patch has to match."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.startswith("#")]


def _look(spec: Spec, locked: Lock, store: Store) -> Lock:
    """The source as it is now, without reading what its commit or its stat vouches for."""
    from tasks.edges.hub import make_lock, open_source
    from tasks.job import Progress

    model = spec.model
    if model.source.startswith("file:"):
        return _folder(spec, locked, Memo(store.local))
    source = open_source(model.source, spec.root, model.revision, model.token)
    if source.revision() and source.revision() == locked.revision:
        return locked  # a commit vouches for its files; data files are checked when they are fetched
    return make_lock(spec, Progress())


def _folder(spec: Spec, locked: Lock, memo: Memo) -> Lock:
    """Local files, hashed only when their size or mtime says that they may have changed."""
    from tasks.edges.hub import open_source, select

    folder = spec.root / spec.model.source.removeprefix("file://").removeprefix("file:")
    listed = select(open_source(spec.model.source, spec.root).list(), spec.model.files)
    files = {path: FileLock(memo.data(folder / path), file.size) for path, file in listed.items()}
    data = dict(locked.data)
    for uri in locked.data:
        if uri.startswith("file:"):
            path = spec.root / uri.removeprefix("file://").removeprefix("file:")
            data[uri] = FileLock(memo.data(path), path.stat().st_size if path.is_file() else 0)
    memo.save()
    return Lock(locked.source, locked.revision, locked.requested, locked.globs, files, data)
