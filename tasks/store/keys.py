"""Keys: everything that shapes an artifact, as flat named strings, and what changed between two of them, in words.

Refuses to be clever: a component that differs is a miss, whatever it is; one that is not listed here cannot matter.
Ask with `kilotok why SPEC STAGE` or read `components` in any manifest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tasks
from tasks.edges import machine
from tasks.stages import Stage
from tasks.store import Store
from tasks.store.manifest import components_key
from tasks.store.memo import Memo

if TYPE_CHECKING:
    from specs.schema import Spec

FORMAT = "1"  # raise when the meaning of a key or the layout of an artifact changes: everything is built again
CODE_ROOT = Path(tasks.__file__).resolve().parent.parent
START = "start"  # the component, and the input, of a stage that starts from an earlier artifact of its own
_PATH_FIELDS = {"prompts", "problems", "dataset", "recipe"}  # may hold a path even without `file:`


@dataclass(frozen=True)
class SpecView:
    """The little of a spec that stages and keys need; made once per run from the loaded spec."""

    name: str
    tree: Mapping[str, Any]
    root: Path
    lock: Mapping[str, Any] | None = None

    def slice(self, reads: tuple[str, ...]) -> dict[str, Any]:
        """The nested dict of only these dotted paths, plus the name."""
        result: dict[str, Any] = {"name": self.name}
        for dotted in reads:
            parts = dotted.split(".")
            value: Any = self.tree
            for part in parts:
                value = value.get(part) if isinstance(value, Mapping) else None
            target = result
            for part in parts[:-1]:
                target = target.setdefault(part, {})
            target[parts[-1]] = value
        return result


def view_of(spec: Spec | SpecView) -> SpecView:
    """A loaded spec with its root and its lock."""
    if isinstance(spec, SpecView):
        return spec
    from specs.lock import read_lock

    lock = read_lock(spec)
    return SpecView(spec.name, spec.to_dict(), spec.root, lock.to_dict() if lock else None)


@dataclass(frozen=True)
class Known:
    """What is known of the stages before: digests of their artifacts, their keys, and the last good build's record."""

    digests: dict[str, str]
    keys: dict[str, str]
    last_good: Mapping[str, Any] | None = None

    @property
    def since(self) -> str:
        """The last good build that differs from this one: "" for none.

        A build like the last good one shares its past, so that running again without a change changes no key.
        """
        if not self.last_good:
            return ""
        theirs = {row["stage"]: row["key"] for row in self.last_good["stages"]}
        same = all(theirs.get(stage) == key for stage, key in self.keys.items())
        return str((self.last_good.get("since") or "") if same else self.last_good["build"])


def components(stage: Stage, view: SpecView, known: Known, memo: Memo, code_root: Path = CODE_ROOT) -> dict[str, str]:
    """Every component of a stage's key; inputs that are not known yet are left out."""
    found = {"stage": stage.name, "format": FORMAT}
    if view.lock and "model" in stage.reads:
        found |= {f"lock.{path}": entry["sha256"] for path, entry in view.lock["files"].items()}
    if stage.pinned:
        return found
    sliced = view.slice(stage.reads)
    if "name" not in stage.reads:
        sliced.pop("name")
    leaves = flatten(sliced)
    found |= {f"spec.{name}": json.dumps(value, ensure_ascii=False) for name, value in leaves.items()}
    found |= {f"data.{name}": digest for name, digest in _data(leaves, view, memo).items()}
    found |= {f"input.{name}": known.digests[name] for name in stage.inputs if name in known.digests}
    found |= {f"code.{file}": digest for file, digest in memo.code(stage.entry.partition(":")[0], code_root).items()}
    found |= {f"package.{name}": _version(name) for name in stage.packages}
    found |= {f"machine.{name}": machine.FACTS[name]() for name in stage.machine}
    if stage.tells:
        found |= {f"key.{name}": key for name, key in known.keys.items() if key}
        found["key.since"] = known.since
    return found


def key_of(found: Mapping[str, str]) -> str:
    return components_key(found)


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts and lists as "a.b[0].c" -> leaf; empty containers are leaves."""
    if isinstance(value, Mapping) and value:
        pairs = [(f"{name}.{key}" if name else str(key), child) for key, child in value.items()]
    elif isinstance(value, (list, tuple)) and value:
        pairs = [(f"{name}[{index}]", child) for index, child in enumerate(value)]
    else:
        return {name: value}
    return {path: leaf for prefix, child in pairs for path, leaf in flatten(child, prefix).items()}


def data_path(name: str, value: Any, root: Path) -> Path | None:
    """The local file or folder that a spec value names, or None if it names none (or the model, which has its lock)."""
    if not isinstance(value, str) or name == "model.source":
        return None
    field = name.rpartition(".")[2].partition("[")[0]
    if value.startswith("file:"):
        return root / value.removeprefix("file://").removeprefix("file:")
    plain = field in _PATH_FIELDS and "://" not in value and value and (root / value).exists()
    return root / value if plain else None


def _data(leaves: Mapping[str, Any], view: SpecView, memo: Memo) -> dict[str, str]:
    """Content of every data file a slice names: local ones are hashed, remote ones are what the lock says."""
    locked = (view.lock or {}).get("data") or {}
    found: dict[str, str] = {}
    for name, value in leaves.items():
        path = data_path(name, value, view.root)
        if path is not None:
            found[str(value)] = memo.data(path)
        elif isinstance(value, str) and value in locked:
            found[value] = locked[value]["sha256"]
    return found


@cache
def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"


# -- in words --------------------------------------------------------------------------------------------------------
_ORDER = ("spec", "package", "data", "lock", "code", "input", START, "key", "machine", "format", "stage")


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """One phrase per component that differs, what a person changed first."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    names.sort(key=lambda name: (_ORDER.index(name.partition(".")[0]), name))
    return [_phrase(name, old.get(name), new.get(name)) for name in names]


def explain(old: Mapping[str, str] | None, new: Mapping[str, str], limit: int = 2) -> str:
    """Why it must be built, in one line."""
    if not old:
        return "first build"
    words = changes(old, new)
    if not words:
        return "rebuild, the artifact is gone"
    more = f" and {len(words) - limit} more" if len(words) > limit else ""
    return "rebuild, " + "; ".join(words[:limit]) + more


def why_build(stage: Stage, parts: Mapping[str, str], store: Store, spec_name: str) -> str:
    """The reason in words that this key has no artifact to reuse."""
    record = store.history(stage.name, spec_name)
    key = key_of(parts)
    problem = store.inspect(stage.name, key).problem
    if problem:
        return f"rebuild, {problem}"
    if record and record["key"] == key and not record.get("cacheable", True):
        return "measured again, the last verdict was not a pass"
    return explain(record and record["components"], parts)


def _phrase(name: str, old: str | None, new: str | None) -> str:
    kind, _, rest = name.partition(".")
    if kind in ("code", "data", "lock"):
        return f"{rest} " + ("is new" if old is None else "is gone" if new is None else "changed")
    if name == "key.since":
        return f"compared with {new or 'nothing'} instead of {old or 'nothing'}"
    if kind in ("input", START, "key"):
        return f"{rest or name} changed ({(old or 'none')[:8]} -> {(new or 'none')[:8]})"
    return f"{rest or name} {_shown(kind, old)} -> {_shown(kind, new)}"


def _shown(kind: str, value: str | None) -> str:
    if value is None:
        return "unset"
    text = value.strip('"') if kind == "spec" else value
    return text if len(text) <= 60 else text[:57] + "..."
