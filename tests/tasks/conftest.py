"""Fixtures for the store's and runner's tests."""

from __future__ import annotations

import sys
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
