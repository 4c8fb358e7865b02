"""Which changed input did it: from a good build to a bad one, one input swapped at a time, through the cache.

Swapped are spec values (one by one), the lock with the data files, and the code: a commit is checked out beside the
repository, and what both sides share is never built twice. The inputs are applied in the order of suspicion and the
flip is found by halves; then the culprit alone is taken back out of the bad side, which must be good again.
Refuses to blame what it cannot swap (packages, container, driver): it names those as what is left, and to trust an old
measurement: both ends are measured again first, so a slow machine is not taken for a slow build.
Run it: `kilotok bisect GOOD BAD`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from specs.errors import InputError, StageFailed
from tasks.edges.process import last_lines
from tasks.edges.service import free_port
from tasks.nightly.attribution import ENVIRONMENT, Cause, causes, inputs_of
from tasks.store.keys import flatten

if TYPE_CHECKING:
    from tasks.store import Store

CODE = ("tasks", "engine_plugins", "specs", "flows", ":!specs/*.yaml", ":!specs/locks", ":!specs/models")
SWAPPABLE = ("spec", "lock", "data", "code")
_GROUPS = {"code": "code", "lock": "lock and data", "data": "lock and data"}
Measure = Callable[[frozenset[str]], float]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Side:
    """One of the two builds: its commit, its whole spec, and what went into each stage."""

    build: str
    name: str
    commit: str
    tree: dict[str, Any]
    inputs: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Verdict:
    """`culprit` is "" when no input that was swapped explains the difference; `trials` are (inputs, value)."""

    culprit: str
    text: str
    trials: tuple[tuple[tuple[str, ...], float], ...]
    confirmed: bool = False


def search(units: Sequence[str], measure: Measure, say: Say) -> Verdict:
    """Find the unit whose swap turns the good value into the bad one; about log2(n) + 3 measurements."""
    trials: list[tuple[tuple[str, ...], float]] = []

    def at(chosen: Sequence[str]) -> float:
        value = measure(frozenset(chosen))
        trials.append((tuple(chosen), value))
        say(f"{value:.6g} with {', '.join(chosen) if chosen else 'nothing'} of the bad side")
        return value

    good, bad = at(()), at(units)

    def is_bad(value: float) -> bool:
        return abs(value - bad) < abs(value - good)

    if not units or abs(bad - good) < 0.01 * max(abs(good), abs(bad), 1e-12):
        return Verdict("", "both sides measure the same now: no input that can be swapped here did it", tuple(trials))
    low, high = 0, len(units)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_bad(at(units[:middle])) else (middle, high)
    culprit = units[low]
    if len(units) == 1:
        return Verdict(culprit, f"{culprit}: the only input that changed", tuple(trials), True)
    alone = not is_bad(at([unit for unit in units if unit != culprit]))
    text = f"{culprit}: without it the bad side is good" if alone else f"{culprit}: but not alone, see the trials"
    return Verdict(culprit, text, tuple(trials), alone)


def units_of(found: Sequence[Cause]) -> tuple[list[str], list[str]]:
    """(what can be swapped, in order of suspicion; what cannot, in words)."""
    units: dict[str, None] = {}
    for cause in found:
        if cause.kind in SWAPPABLE:
            # A list is swapped whole: one element of it has no meaning of its own.
            units[_GROUPS.get(cause.kind) or cause.name.partition("[")[0]] = None
    left = [f"{cause.kind}: {cause.what}" for cause in found if cause.kind not in SWAPPABLE]
    return list(units), left


def side(store: Store, build: str) -> Side:
    """A build by its id. Raises InputError when it is unknown, or was made from a tree that no commit holds."""
    entry = next((name for name in store.list_json("builds") if name.endswith(f"/{build}")), None)
    record = store.read_json(entry) if entry else None
    if not record:
        raise InputError(f"no build {build!r}", store.uri, "kilotok history SPEC lists them")
    night = store.read_json(f"nights/{record['spec']}/{build}") or {}
    inputs = night.get("inputs") or inputs_of(store, record)
    given = night or next(_provenance(store, record), {})
    git, tree = given.get("git") or {}, given.get("spec_tree") or given.get("spec")
    if not isinstance(tree, dict) or not git.get("commit"):
        raise InputError(
            f"build {build} has no recorded spec and commit", store.uri, "its artifacts are gone; take another"
        )
    if git.get("dirty"):
        raise InputError(
            f"build {build} was made from uncommitted changes", git["commit"], "commit, build, then bisect"
        )
    return Side(build, record["spec"], git["commit"], tree, dict(inputs))


def _provenance(store: Store, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for row in reversed(record["stages"]):
        if row.get("uri"):
            yield dict(store.load(row["uri"]).provenance)


def bisect(
    store: Store, root: Path, good: str, bad: str, metric: str, runs: int, say: Say
) -> tuple[Verdict, list[str]]:
    """(verdict, what could not be swapped). Raises InputError for builds of two specs, or commits that are not here."""
    sides = side(store, good), side(store, bad)
    if sides[0].name != sides[1].name:
        raise InputError(f"{good} is of {sides[0].name}, {bad} of {sides[1].name}", "", "two builds of one spec")
    before, after = (_without_environment(one.inputs) for one in sides)
    units, left = units_of(causes(before, after, metric))
    say(f"{len(units)} changed inputs can be swapped: {', '.join(units) or 'none'}")
    with checkout(root, sides[0].commit) as folder:
        trial = Trial(store, folder, *sides, metric, runs)
        return search(units, trial.measure, say), left


def _without_environment(inputs: Mapping[str, Mapping[str, str]]) -> dict[str, Mapping[str, str]]:
    return {stage: found for stage, found in inputs.items() if stage != ENVIRONMENT}


@contextmanager
def checkout(root: Path, commit: str) -> Iterator[Path]:
    """A worktree of its own at a commit, gone afterwards."""
    parent = Path(tempfile.mkdtemp(prefix="kilotok-bisect-"))
    folder = parent / "tree"
    _git(root, "worktree", "add", "--quiet", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        _git(root, "worktree", "remove", "--force", str(folder))
        shutil.rmtree(parent, ignore_errors=True)


class Trial:
    """Puts chosen inputs of the bad side onto the good one and measures in a child that runs that checkout's code."""

    def __init__(self, store: Store, folder: Path, good: Side, bad: Side, metric: str, runs: int) -> None:
        self.store, self.folder, self.good, self.bad = store, folder, good, bad
        self.metric, self.runs = metric, runs

    def measure(self, chosen: frozenset[str]) -> float:
        """The metric with these units of the bad side. Raises StageFailed, with the log's end, when the build fails."""
        spec = self._prepare(chosen)
        answer, log = self.folder / "answer.json", self.folder / "trial.log"
        answer.unlink(missing_ok=True)
        argv = [
            sys.executable,
            "-m",
            "tasks.nightly.trial",
            str(spec),
            self.store.uri,
            self.metric,
            str(self.runs),
            str(answer),
        ]
        env = {**os.environ, "PYTHONPATH": str(self.folder)}
        with open(log, "ab") as output:
            status = subprocess.run(
                argv, cwd=self.folder, env=env, stdout=output, stderr=output, check=False
            ).returncode
        if status or not answer.is_file():
            raise StageFailed(f"the trial with {sorted(chosen) or 'nothing swapped'} failed", "", last_lines(log))
        return float(json.loads(answer.read_text())[self.metric])

    def _prepare(self, chosen: frozenset[str]) -> Path:
        """Files and spec of this trial."""
        locks = [f"specs/locks/{self.good.name}.yaml", *self._data_files()]
        for unit, paths in (("code", list(CODE)), ("lock and data", locks)):
            commit = self.bad.commit if unit in chosen else self.good.commit
            known = [path for path in paths if path in CODE or self._holds(commit, path)]
            _git(self.folder, "restore", f"--source={commit}", "--worktree", "--", *known)
        tree = mixed(self.good.tree, self.bad.tree, {unit for unit in chosen if unit.startswith("spec.")})
        tree["name"] = name = f"{self.good.name}-bisect"[:63]
        tree["deploy"]["port"] = free_port(tree["deploy"]["host"])
        tree["nightly"] = None
        lock = self.folder / "specs/locks" / f"{self.good.name}.yaml"
        if lock.is_file():
            shutil.copyfile(lock, lock.with_name(f"{name}.yaml"))
        spec = self.folder / "specs" / f"{name}.yaml"
        spec.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        return spec

    def _data_files(self) -> list[str]:
        """Files and folders of the repository that either spec names."""
        leaves = {**flatten(self.good.tree), **flatten(self.bad.tree)}.values()
        return sorted(
            {leaf.removeprefix("file:") for leaf in leaves if isinstance(leaf, str) and leaf.startswith("file:")}
        )

    def _holds(self, commit: str, path: str) -> bool:
        return bool(_git(self.folder, "ls-tree", "--name-only", commit, "--", path))


def mixed(good: Mapping[str, Any], bad: Mapping[str, Any], components: set[str]) -> dict[str, Any]:
    """The good spec with these values of the bad one; a component is `spec.` and the dotted key it stands for."""
    tree: dict[str, Any] = json.loads(json.dumps(good))
    for component in components:
        keys = component.removeprefix("spec.").split(".")
        target, source = tree, bad
        for key in keys[:-1]:
            target, source = target.setdefault(key, {}), source.get(key) or {}
        target[keys[-1]] = source.get(keys[-1])
    return tree


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(
            f"git {arguments[0]}: {done.stderr.strip()}", str(root), "run it in the repository, with both commits"
        )
    return done.stdout.strip()
