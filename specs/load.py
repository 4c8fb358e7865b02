"""From a YAML file to a checked, frozen spec.

What it is: read, `extends` (deep-merged, nearest wins), `--set`, check. Every error names file, line, column, key,
value, rule and fix, and says what the key was probably meant to be.
What it refuses to be: forgiving, or a place for secrets: what looks like one is refused, and the message hides it.
Run it: `kilotok plan SPEC --set engine.draft_tokens=2`.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from specs.errors import SpecError
from specs.marks import Mark, Marked, Path_, parse_marked, read_marked
from specs.rules import find_secrets
from specs.schema import Spec


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """The spec in `path` with `overrides` ("a.b=c") applied; SpecError for anything it may not say."""
    file = Path(path)
    marked = _with_extends(file, ())
    for override in overrides:
        _apply_override(marked, override)
    for where, kind in find_secrets(marked.data):
        raise _secret(marked, where, kind)
    try:
        spec = Spec.model_validate(marked.data)
    except ValidationError as error:
        raise _explain(error, marked) from None
    spec._path = file
    spec._marks = {".".join(map(str, path)): str(mark) for path, mark in marked.marks.items() if path}
    return spec


# ---------------------------------------------------------------- extends and --set


def _with_extends(file: Path, seen: tuple[Path, ...]) -> Marked:
    marked = read_marked(file)
    base_name = marked.data.pop("extends", None)
    if base_name is None:
        return marked
    mark = marked.values[("extends",)]
    if not isinstance(base_name, str):
        raise _at(
            mark, "extends", base_name, "extends must name a spec", "the name of another spec, as text", "extends: NAME"
        )
    base = file.parent / base_name
    base = base if base.suffix in (".yaml", ".yml") else base.with_name(base.name + ".yaml")
    chain = (*seen, file.resolve())
    if base.resolve() in chain:
        loop = " -> ".join(link.name for link in (*chain, base))
        raise _at(mark, "extends", base_name, f"extends goes in a circle: {loop}", "no cycles", "drop one `extends`")
    if not base.is_file():
        raise _at(
            mark, "extends", base_name, f"extends names {base}, which does not exist", "an existing spec", _near(base)
        )
    if "name" not in marked.data:
        raise _at(
            mark, "name", None, "a spec that extends another needs its own name", "name is required", "add `name:`"
        )
    return _merge(_with_extends(base, chain), marked)


def _merge(base: Marked, top: Marked) -> Marked:
    """Mappings are merged key by key; anything else of `top`, lists included, replaces what `base` says."""
    merged = Marked(base.data, dict(base.marks), dict(base.values))
    merged.marks.update({(): top.marks[()]})

    def put(target: dict[str, Any], source: dict[str, Any], path: Path_) -> None:
        for key, value in source.items():
            here = (*path, key)
            if isinstance(value, dict) and isinstance(target.get(key), dict):
                put(target[key], value, here)
                continue
            for table, new in ((merged.marks, top.marks), (merged.values, top.values)):
                for stale in [place for place in table if place[: len(here)] == here]:
                    del table[stale]
                table.update({place: mark for place, mark in new.items() if place[: len(here)] == here})
            target[key] = value

    put(merged.data, top.data, ())
    return merged


def _apply_override(marked: Marked, override: str) -> None:
    dotted, separator, text = override.partition("=")
    label = f"--set {dotted}" if any(find_secrets({dotted.rpartition(".")[2]: text})) else f"--set {override}"
    mark = Mark(label, 0, 0)
    keys: Path_ = tuple(int(key) if key.isdigit() else key for key in dotted.strip().split("."))
    if not separator or "" in keys:
        raise _at(
            mark, dotted, None, f"--set {override!r} is no assignment", "KEY=VALUE", "--set engine.draft_tokens=2"
        )
    value = parse_marked(text, label).data
    place = marked.data
    for depth, key in enumerate(keys[:-1]):
        if isinstance(place, dict) and isinstance(key, str):
            place = place[key] if isinstance(place.get(key), (dict, list)) else place.setdefault(key, {})
        elif isinstance(place, list) and isinstance(key, int) and key < len(place):
            place = place[key]
        else:
            place = None
        if not isinstance(place, (dict, list)):
            inner = ".".join(map(str, keys[: depth + 1]))
            raise _at(mark, dotted, text, f"{inner} holds no keys", "a path through sections", "see `kilotok schema`")
    last = keys[-1]
    fits = isinstance(place, dict) or (isinstance(last, int) and last < len(place))
    if not fits:
        raise _at(mark, dotted, text, f"there is no item {last!r} in the list", "an existing index", "count from 0")
    place[str(last) if isinstance(place, dict) else last] = value
    for table in (marked.marks, marked.values):
        for stale in [other for other in table if other[: len(keys)] == keys]:
            del table[stale]
        table[keys] = mark


# ---------------------------------------------------------------- errors


def _explain(error: ValidationError, marked: Marked) -> SpecError:
    """pydantic's findings as one error: the first in the file in full, the others in a line each."""
    found = [_finding(details, marked) for details in error.errors(include_url=False)]
    distinct = {(one.where, one.what): one for one in found}
    ordered = sorted(distinct.values(), key=lambda one: (one.file or "", one.line or 0, one.column or 0))
    first = ordered[0]
    others = [f"\n  also {one.what} [{one.where}]: {one.fix}" for one in ordered[1:]]
    details = {name: getattr(first, name) for name in SpecError.extras}
    return SpecError(first.what, first.where, first.fix + "".join(others), **details)


def _finding(details: ErrorDetails, marked: Marked) -> SpecError:
    kind, context = details["type"], details.get("ctx", {})
    known = kind not in ("extra_forbidden", "missing")
    path = _yaml_path(details["loc"], marked) if known else tuple(details["loc"])
    key, value = ".".join(map(str, path)), details["input"]
    if kind == "extra_forbidden":
        return _at(
            marked.marks.get(path, _nearest(marked, path)),
            key,
            value,
            f"unknown key {path[-1]!r}",
            "known keys only",
            _meant(path),
        )
    if kind == "missing":
        where = _nearest(marked, path[:-1])
        return _at(where, key, None, f"{key} is missing", "required", f"add `{path[-1]}:`, {_description(path)}")
    mark = marked.values.get(path, _nearest(marked, path))
    if kind == "value_error":
        return _broken_rule(str(context["error"]), path, value, marked)
    if kind == "string_type" and isinstance(value, (int, float)):
        return _at(mark, key, value, f"{key} must be text", "text", f'write it in quotes: "{value}"')
    rule, allowed = _sentence(details["msg"]), context.get("le", context.get("ge"))
    nearest = "" if allowed is None else f"use {path[-1]}: {allowed}; "
    return _at(mark, key, value, f"{key}: {rule}", rule, nearest + (_description(path) or "see `kilotok schema`"))


def _broken_rule(message: str, path: Path_, value: Any, marked: Marked) -> SpecError:
    """A rule of ours reads "what is wrong; what to do"; one between fields is shown at the first field it names."""
    what, _, fix = message.partition("; ")
    if isinstance(value, dict):
        named = [word for word in re.findall(r"\w+", what) if (*path, word) in marked.marks]
        path, value = ((*path, named[0]), value.get(named[0])) if named else (path, None)
    mark = marked.values.get(path, _nearest(marked, path))
    return _at(mark, ".".join(map(str, path)), value, what, what, fix or _description(path))


def _yaml_path(loc: tuple[int | str, ...], marked: Marked) -> Path_:
    """pydantic adds the arm of a union ("str", "float") to its locations; the file has no such key."""
    path = tuple(loc)
    while path and path not in marked.marks and _annotation(path) is None:
        path = path[:-1]
    return path or tuple(loc)


def _sentence(message: str) -> str:
    text = re.sub(r"^Input should be", "must be", message)
    return text.replace("a valid integer", "a whole number").replace("a valid string", "text")


def _at(mark: Mark, key: str, value: Any, what: str, rule: str, fix: str) -> SpecError:
    shown = "" if value is None or isinstance(value, (dict, list)) else f" {key}={value!r}"
    shown = shown if mark.line else ""  # --set shows key and value itself
    location = {"file": mark.file, "line": mark.line or None, "column": mark.column or None}
    return SpecError(
        what, f"{mark}{shown}", fix, **location, key=key, value=None if value is None else str(value), rule=rule
    )


def _secret(marked: Marked, path: Path_, kind: str) -> SpecError:
    key = ".".join(map(str, path))
    mark = marked.values.get(path, _nearest(marked, path))
    what = f"{key} holds {kind}"
    return _at(mark, key, None, what, "a spec holds no secrets", "write ${env:NAME} or prefect://secret/NAME")


def _nearest(marked: Marked, path: Path_) -> Mark:
    while path and path not in marked.marks:
        path = path[:-1]
    return marked.marks[path]


def _near(base: Path) -> str:
    names = [other.name for other in base.parent.glob("*.yaml")] if base.parent.is_dir() else []
    close = difflib.get_close_matches(base.name, names, 1)
    return f"did you mean {close[0]}?" if close else f"specs beside it: {', '.join(sorted(names)) or 'none'}"


def _meant(path: Path_) -> str:
    """What an unknown key was probably meant to be: a near name here, or the same name in another section."""
    here = _models(_annotation(path[:-1]))
    names = [field.alias or name for model in here for name, field in model.model_fields.items()]
    close = difflib.get_close_matches(str(path[-1]), names, 1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    homes = [home for home in _homes(Spec, ()) if home[-1] == path[-1]]
    if homes:
        return f"{path[-1]} belongs at {' or '.join('.'.join(home) for home in homes)}"
    return f"known here: {', '.join(names)}"


def _homes(model: type[BaseModel], path: tuple[str, ...]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, field in model.model_fields.items():
        here = (*path, field.alias or name)
        found.append(here)
        for below in _models(field.annotation):
            found += _homes(below, here)
    return found


def _description(path: Path_) -> str:
    for model in _models(_annotation(path[:-1])):
        for name, field in model.model_fields.items():
            if path[-1] == (field.alias or name) and field.description:
                text = field.description.strip().splitlines()[0]
                return text[0].lower() + text[1:] if text[1:2].islower() else text
    return ""


def _annotation(path: Path_) -> Any:
    """The type at a path of the schema, None where the schema has nothing."""
    current: Any = Spec
    for key in path:
        if isinstance(key, int):
            inner = [arg for arg in _flat(current) if get_origin(arg) in (tuple, list)]
            current = get_args(inner[0])[0] if inner else None
        else:
            fields = [f for m in _models(current) for n, f in m.model_fields.items() if key == (f.alias or n)]
            current = fields[0].annotation if fields else None
        if current is None:
            return None
    return current


def _flat(annotation: Any) -> list[Any]:
    """The arms of a union, with Annotated taken off."""
    if hasattr(annotation, "__metadata__"):
        return _flat(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [arm for arg in get_args(annotation) for arm in _flat(arg)]
    return [annotation]


def _models(annotation: Any) -> list[type[BaseModel]]:
    return [arm for arm in _flat(annotation) if isinstance(arm, type) and issubclass(arm, BaseModel)]
