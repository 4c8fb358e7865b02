"""Where an artifact came from, and whether that can still be believed: collect, verify, lineage, diff.

Refuses to record a secret: specs hold only references, and the environment is never written down.
Run it: `kilotok verify URI`, `kilotok lineage URI`, `kilotok diff A B`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.errors import IntegrityError, StoreError
from tasks.attest import STATEMENT, check_signature, slsa_statement
from tasks.edges import machine
from tasks.store import Manifest, Store
from tasks.store.manifest import PROVENANCE, components_key

if TYPE_CHECKING:
    from tasks.store.keys import SpecView


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
    return {"commit": commit, "dirty": bool(_git(root, "status", "--porcelain"))} if commit else {}


@cache
def packages() -> dict[str, str]:
    """Every installed distribution with its version."""
    found = {dist.metadata["Name"]: dist.version for dist in metadata.distributions() if dist.metadata["Name"]}
    return dict(sorted(found.items(), key=lambda pair: pair[0].lower()))


# -- lineage ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Ancestor:
    """One artifact of a lineage; without a manifest it is no longer in the store, or `problem` says what is wrong."""

    uri: str
    depth: int
    manifest: Manifest | None
    problem: str = ""


def lineage(store: Store, place: str) -> list[Ancestor]:
    """The artifact and all it was built from, each once, nearest first."""
    start = _ancestor(store, place, 0)
    found = {start.uri: start}
    waiting = [start]
    while waiting:
        child = waiting.pop(0)
        for uri in child.manifest.inputs.values() if child.manifest else ():
            if uri not in found:
                found[uri] = _ancestor(store, uri, child.depth + 1)
                waiting.append(found[uri])
    return list(found.values())


def _ancestor(store: Store, place: str, depth: int) -> Ancestor:
    """Raises StoreError when there is no artifact to begin with."""
    try:
        manifest = store.load(place)
    except StoreError:
        if not depth:
            raise
        return Ancestor(place, depth, None)
    except IntegrityError as error:
        return Ancestor(place, depth, None, error.what)
    return Ancestor(store.artifact_uri(manifest), depth, manifest)


def lineage_text(ancestors: Iterable[Ancestor]) -> str:
    """A line each: stage, key, when, from which commit."""
    lines = []
    for one in ancestors:
        if one.manifest is None:
            lines.append(f"{'  ' * one.depth}{one.uri}  {one.problem or 'no longer in the store'}")
            continue
        git = one.manifest.provenance.get("git") or {}
        commit = f"{git['commit'][:10]}{' + changes' if git.get('dirty') else ''}" if git else "no commit"
        lines.append(
            f"{'  ' * one.depth}{one.manifest.stage:<13} {one.manifest.key[:12]}  {one.manifest.created[:19]}  {commit}"
        )
    return "\n".join(lines)


# -- verify ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Verdict:
    """`wrong` names each bad file or broken link; `notes` are what could not be checked."""

    checked: tuple[str, ...]
    wrong: tuple[str, ...]
    notes: tuple[str, ...]

    def to_text(self) -> str:
        lines = [f"ok     {uri}" for uri in self.checked if not any(line.startswith(uri) for line in self.wrong)]
        return "\n".join(
            [*lines, *(f"WRONG  {line}" for line in self.wrong), *(f"note   {line}" for line in self.notes)]
        )


def verify(store: Store, place: str, trusted: Iterable[Path] = (), deep: bool = False) -> Verdict:
    """Read the artifact again; check its key, statement and signature, and its lineage back to the locked source.

    Ancestors are checked without reading their files unless `deep`.
    """
    keys = list(trusted)
    wrong: list[str] = []
    notes: list[str] = []
    checked: list[str] = []
    for one in lineage(store, place):
        if one.manifest is None:
            wrong += [f"{one.uri}: {one.problem}"] if one.problem else []
            notes += [] if one.problem else [f"{one.uri} is no longer in the store: its inputs cannot be checked"]
            continue
        checked.append(one.uri)
        wrong += [f"{one.uri}: {problem}" for problem in _link_problems(store, one.manifest)]
        if one.depth == 0 or deep:
            wrong += [f"{one.uri}: {problem}" for problem in store.verify(one.manifest)]
            problem, note = _statement_problem(store, one.manifest, keys)
            wrong += [f"{one.uri}: {problem}"] if problem else []
            notes += [f"{one.uri}: {note}"] if note else []
    return Verdict(tuple(checked), tuple(wrong), tuple(notes))


def _link_problems(store: Store, manifest: Manifest) -> Iterator[str]:
    """Is it under the key of its components, made from the inputs it names, and (the source) what was locked?"""
    if components_key(manifest.components) != manifest.key:
        yield "its key is not that of its components"
    said = manifest.components
    for name, uri in manifest.inputs.items():
        parent = _ancestor(store, uri, 1).manifest
        if parent and said.get(f"input.{name}", said.get(name, parent.digest)) != parent.digest:
            yield f"built from another {name} than {uri}"
    hashes = {file.path: file.sha256 for file in manifest.files}
    locked = {name[5:]: value for name, value in manifest.components.items() if name.startswith("lock.")}
    for path, sha256 in locked.items():
        if hashes.get(path) != sha256:
            yield f"{path}: not what the lock says"


def _statement_problem(store: Store, manifest: Manifest, trusted: list[Path]) -> tuple[str, str]:
    """(what is wrong, what could not be checked) about the statement and its signature."""
    try:
        folder = store.checkout(manifest) / PROVENANCE
        statement = json.loads((folder / STATEMENT).read_bytes())
    except (OSError, ValueError, IntegrityError):
        return "no readable provenance statement", ""
    expected = slsa_statement(manifest, store.uri)
    if statement.get("subject") != expected["subject"]:
        return "the provenance statement is about other files", ""
    said, true = statement.get("predicate", {}), expected["predicate"]
    byproducts = said.get("runDetails", {}).get("byproducts")
    if said.get("buildDefinition") != true["buildDefinition"] or byproducts != true["runDetails"]["byproducts"]:
        return "the provenance statement and the manifest disagree", ""
    problem = check_signature(folder, trusted)
    return ("", problem) if problem == "not signed" or problem.startswith("signed by a key") else (problem, "")


# -- diff ------------------------------------------------------------------------------------------------------------
def diff(store: Store, old: str, new: str) -> list[str]:
    """What changed between two artifacts of a stage, in words: causes, then files, then figures."""
    from tasks.store.keys import changes

    before, after = store.load(old), store.load(new)
    lines = changes(before.components, after.components) or ["same key components"]
    files = {file.path: file for file in before.files}
    fresh = {file.path: file for file in after.files}
    for path in sorted({*files, *fresh}):
        if path not in fresh:
            lines.append(f"{path}: gone")
        elif path not in files:
            lines.append(f"{path}: new")
        elif files[path].sha256 != fresh[path].sha256:
            lines.append(f"{path}: changed ({files[path].size} -> {fresh[path].size} bytes)")
    for name in sorted({*before.metrics, *after.metrics}):
        was, now = before.metrics.get(name), after.metrics.get(name)
        if was != now:
            lines.append(f"{name} {_figure(was)} -> {_figure(now)}")
    return lines


def _figure(value: float | None) -> str:
    return "unset" if value is None else f"{value:.6g}"


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
