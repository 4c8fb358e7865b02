"""Fixtures for the store's and runner's tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tasks.toy import Toy


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("toystages", None)
    return Toy(tmp_path)


@pytest.fixture
def child_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    monkeypatch.syspath_prepend(str(tmp_path))
    return Toy(tmp_path, isolated=True)


class SmallDisk:
    """A file system of its own that really fills."""

    def __init__(self, path: Path) -> None:
        self.path, self._ballast = path, path / "ballast"

    def leave(self, num_bytes: int) -> None:
        """Somebody else takes all but so much of it."""
        room = os.statvfs(self.path)
        with open(self._ballast, "wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, room.f_bavail * room.f_frsize - num_bytes)

    @property
    def is_full(self) -> bool:
        return self._ballast.exists()

    def free(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """80 MB: a little more than the room that a download leaves to others."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", path], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)
