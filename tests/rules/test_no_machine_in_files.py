"""No tracked file knows the machine it was written on, or which package index that machine used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.rules.test_architecture import name_of, tracked

# Spelled in pieces, so that this file obeys its own rule.
MACHINE_PATH = re.compile(r"(?<![\w.}\"$-])/(?:wo" + r"rk|ro" + r"ot)/\w|(?<![\w.}])/t" + r"mp/\w")
REGISTRY = re.compile(
    "|".join(("pypi" + r"\.org", "python" + r"hosted\.org", "download" + r"\.pytorch", "npm" + r"js\.org"))
)
INDEX = re.compile("--(?:extra-)?index" + r"-url[ =]+https?:")
TEXT = (
    ".py",
    ".md",
    ".toml",
    ".yaml",
    ".yml",
    ".txt",
    ".cfg",
    ".sh",
    ".cpp",
    ".h",
    ".cu",
    ".json",
    ".html",
    ".service",
    "",
)


@pytest.mark.parametrize("path", [path for path in tracked() if path.suffix in TEXT], ids=name_of)
def test_file_names_no_machine_and_no_index(path: Path) -> None:
    text = path.read_text(errors="replace")
    for pattern in (MACHINE_PATH, REGISTRY, INDEX):
        found = pattern.search(text)
        assert not found, f"{name_of(path)}: {text[max(0, found.start() - 30) : found.end() + 30]!r}"
