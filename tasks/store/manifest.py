"""A manifest: what an artifact is made of and what it was made from. No manifest, no artifact.

Refuses file lists that could reach outside the artifact: absolute paths, `..`, symlinks, devices.
Read one: `cat STORE/artifacts/quantize/KEY/manifest.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from specs.errors import IntegrityError

MANIFEST = "manifest.json"
PROVENANCE = ".provenance"  # beside the files, not of them: outside the digest
_RESERVED = {MANIFEST, PROVENANCE, ".scratch"}
_HEX64 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True)
class FileEntry:
    path: str
    size: int
    sha256: str
    mtime_ns: int = 0  # as published here: lets a hit be confirmed without reading; not part of any digest


@dataclass(frozen=True)
class Manifest:
    stage: str
    key: str
    components: dict[str, str]
    files: tuple[FileEntry, ...]
    digest: str
    metrics: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)  # stage -> URI it was built from: the lineage
    created: str = ""
    cacheable: bool = True

    @property
    def seal(self) -> str:
        """One hash over everything it says, except when its files were written here."""
        said = {**asdict(self), "files": [[file.path, file.size, file.sha256] for file in self.files]}
        return hashlib.sha256(json.dumps(said, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def dirname(self) -> str:
        """A verdict that failed is kept for its report, under its own name, where no lookup by key finds it."""
        return self.key if self.cacheable else f"{self.key}.{self.digest[:16]}"

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "seal": self.seal}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Parse and distrust: a manifest edited by hand or cut short is refused, not half believed."""
        try:
            data = json.loads(text)
            seal = data.pop("seal")
            files = tuple(
                FileEntry(str(f["path"]), int(f["size"]), str(f["sha256"]), int(f["mtime_ns"])) for f in data["files"]
            )
            manifest = cls(**{**data, "files": files})
            names = [manifest.stage, manifest.dirname]
            hashes = [manifest.key, manifest.digest, *(file.sha256 for file in files)]
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"unreadable manifest ({error})", where, "delete the artifact; it will be built again"
            ) from error
        for file in files:
            check_path(file.path, where)
        if not all(_NAME.fullmatch(name) for name in names) or not all(_HEX64.fullmatch(value) for value in hashes):
            raise IntegrityError(
                "manifest with a malformed name or hash", where, "delete the artifact; it will be built again"
            )
        if content_digest(files) != manifest.digest or seal != manifest.seal:
            raise IntegrityError(
                "manifest is not as it was written: edited by hand?",
                where,
                "delete the artifact; it will be built again",
            )
        return manifest


def content_digest(files: Iterable[FileEntry]) -> str:
    """One hash for the content, whatever key it was built under: equal artifacts are equal inputs downstream."""
    lines = sorted(f"{file.sha256} {file.size} {file.path}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def components_key(components: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(components.items()), ensure_ascii=False).encode()).hexdigest()


def check_path(path: str, where: str) -> str:
    """Refuse a listed path that is not plainly inside the artifact."""
    pure = PurePosixPath(path)
    ugly = not path or pure.is_absolute() or any(part in ("..", ".") for part in path.split("/"))
    if ugly or str(pure) != path or any(ord(char) < 32 for char in path) or "\\" in path or pure.parts[0] in _RESERVED:
        raise IntegrityError(
            f"refused file name {path!r}", where, "an artifact lists only plain files below its own folder"
        )
    return path


def walk(folder: Path) -> list[tuple[str, os.stat_result]]:
    """Every publishable file below a work directory, sorted; symlinks and special files are refused by name."""
    found: list[tuple[str, os.stat_result]] = []
    for base, folders, names in os.walk(folder):
        if Path(base) == folder:
            folders[:] = [name for name in folders if name not in _RESERVED]
            # A manifest renewed in place (LocalStore._forgive) is written beside it first; a kill may leave that.
            names = [name for name in names if name not in _RESERVED and not name.startswith(f".{MANIFEST}.")]
        for name in [*folders, *names]:
            path = Path(base, name)
            relative = path.relative_to(folder).as_posix()
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode):
                raise IntegrityError(
                    f"refused {relative!r}: not a plain file", str(folder), "copy what a link points to"
                )
            found.append((check_path(relative, str(folder)), status))
    return sorted(found, key=lambda pair: pair[0])
