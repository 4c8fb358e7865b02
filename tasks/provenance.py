"""Where an artifact came from: commit, command, packages, machine, spec; and statements of it that others can check.

Refuses to record a secret: specs hold only references, and the environment is never read.
See it with `kilotok lineage URI` and `kilotok verify URI`.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.edges import machine

if TYPE_CHECKING:
    from tasks.store.keys import SpecView
    from tasks.store.manifest import Manifest


def collect(view: SpecView) -> dict[str, Any]:
    """Everything about this run that is the same for all its artifacts."""
    return {
        "git": git_state(view.root),
        "argv": list(sys.argv),
        "python": sys.version.split()[0],
        "packages": packages(),
        "machine": machine.describe(),
        "spec": dict(view.tree),
    }


@cache
def git_state(root: Path) -> dict[str, Any]:
    """The commit and whether the tree differs from it; empty outside a repository or without git."""
    commit = _git(root, "rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(_git(root, "status", "--porcelain", "-uno"))} if commit else {}


@cache
def packages() -> dict[str, str]:
    """Every installed distribution with its version."""
    found = {dist.metadata["Name"]: dist.version for dist in metadata.distributions() if dist.metadata["Name"]}
    return dict(sorted(found.items(), key=lambda pair: pair[0].lower()))


def write_statements(manifest: Manifest, folder: Path, store_uri: str) -> None:
    """Leave the statements beside an artifact's files."""


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
