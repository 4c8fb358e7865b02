"""Is this machine able to do what a spec asks? Each check says what it found and what to do about it.

Refuses to fix anything. Run it: `kilotok doctor`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "nvidia-modelopt", "transformers", "prefect", "fastapi", "lm_eval", "pandera", "boto3")
MIN_FREE_GB = 5  # the tiny model's store takes well under 1 GB; Maverick's plan names its own need


def examine(store: Path) -> list[dict[str, Any]]:
    """Rows of {check, state: ok | missing | note, found, fix}."""
    return [
        _python(),
        *(_package(name) for name in PACKAGES),
        _compiler(),
        _memory(),
        _disk(store),
        _gpu(),
        _trtllm(),
        _prefect(),
    ]


def _row(check: str, ok: bool | None, found: str, fix: str = "") -> dict[str, Any]:
    return {
        "check": check,
        "state": {True: "ok", False: "missing", None: "note"}[ok],
        "found": found,
        "fix": "" if ok else fix,
    }


def _python() -> dict[str, Any]:
    ok = (3, 10) <= sys.version_info[:2] <= (3, 13)
    return _row("python", ok, platform.python_version(), "use Python 3.10 to 3.13")


def _package(name: str) -> dict[str, Any]:
    try:
        return _row(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return _row(name, False, "not installed", "pip install -e . -c constraints.txt")


def _compiler() -> dict[str, Any]:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return _row(
        "c++ compiler",
        compiler is not None,
        compiler or "none",
        "install g++; without it the engine runs its slow reference",
    )


def _memory() -> dict[str, Any]:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return _row("memory", gib >= 4, f"{gib:.0f} GiB, {os.cpu_count()} cores", "the tiny run needs 4 GiB")


def _disk(store: Path) -> dict[str, Any]:
    existing = next(parent for parent in (store, *store.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 1e9
    return _row(
        "disk for the store",
        free >= MIN_FREE_GB,
        f"{free:.0f} GB free at {store}",
        "free some, or choose another --store",
    )


def _gpu() -> dict[str, Any]:
    if not (tool := shutil.which("nvidia-smi")):
        return _row("gpu", None, "none found", "fine for backend native on the CPU; trtllm needs one")
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return _row(
        "gpu",
        found.returncode == 0 or None,
        (found.stdout or found.stderr).strip().replace("\n", "; "),
        "nvidia-smi fails: check the driver",
    )


def _trtllm() -> dict[str, Any]:
    there = importlib.util.find_spec("tensorrt_llm") is not None
    return _row(
        "tensorrt_llm",
        True if there else None,
        "installed" if there else "not installed",
        "only for backend trtllm: its image has it (docs/dgx.md)",
    )


def _prefect() -> dict[str, Any]:
    url = os.environ.get("PREFECT_API_URL")
    return _row(
        "prefect server",
        True if url else None,
        url or "PREFECT_API_URL not set",
        "fine: `kilotok run` starts one for the run",
    )


def to_text(checks: list[dict[str, Any]]) -> str:
    """One line per check."""
    marks = {"ok": "✓", "missing": "✗", "note": "·"}
    return "\n".join(
        f"  {marks[c['state']]} {c['check']:<20} {c['found']}{'  -> ' + c['fix'] if c['fix'] else ''}" for c in checks
    )
