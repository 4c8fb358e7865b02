"""Digests of source and data files, remembered by size and mtime, so that planning again reads nothing.

Refuses to be trusted blindly: any stat that differs means the file is read again. A lost memo costs seconds,
never truth.
It lives in the local store under `records/memo/`; delete it at will.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from specs import digest
from specs.errors import StoreError
from tasks.store.hashing import sha256_file
from tasks.store.local import LocalStore

_CODE, _DATA = "memo/code", "memo/data"


class Memo:
    """Open, ask, `save()`. Saving to a store that cannot be written is skipped: it is only a memo."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self._code: dict[str, Any] = store.read_json(_CODE) or {}
        self._data: dict[str, Any] = store.read_json(_DATA) or {}
        self._changed: set[str] = set()

    def code(self, module: str, root: Path) -> dict[str, str]:
        """file -> digest for a module and all project files it reaches (specs.digest decides which and what counts)."""
        name = f"{module} @ {root}"
        known = self._code.get(name)
        if known and all(_stamp(root / file) == stamp for file, stamp in known["stamps"].items()):
            return known["parts"]
        parts, watched = _code_parts(module, root)
        self._code[name] = {"parts": parts, "stamps": {file: _stamp(root / file) for file in watched}}
        self._changed.add(_CODE)
        return parts

    def data(self, path: Path) -> str:
        """sha256 of a data file, or of the listing of a folder of them; "absent" is a value too."""
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            return digest.json_sha256({file.relative_to(path).as_posix(): self.data(file) for file in files})
        stamp = _stamp(path)
        if stamp is None:
            return "absent"
        known = self._data.get(str(path))
        if known and known[:2] == stamp:
            return known[2]
        value = sha256_file(path)
        self._data[str(path)] = [*stamp, value]
        self._changed.add(_DATA)
        return value

    def save(self) -> None:
        contents = {_CODE: self._code, _DATA: self._data}
        try:
            for name in self._changed:
                self._store.write_json(name, contents[name])
        except StoreError:
            return
        self._changed.clear()


def _code_parts(module: str, root: Path) -> tuple[dict[str, str], set[str]]:
    """The parts, and every file and folder whose stat would betray a change (a folder's, when a file is added)."""
    parts = digest.module_parts(module, root)
    watched = set(parts) | {str(Path(file).parent) for file in parts}
    return parts, watched


def _stamp(path: Path) -> list[int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]
