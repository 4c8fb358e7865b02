"""What each TensorRT-LLM version accepts, and the check of options against it.

What it is: the YAML files in `versions/`, layered by version, and one walk over the options that names the version
which knows an option, the new name of a renamed one, and the spec's own field where there is one.
What it refuses to be: a guess. An option that is in no file is refused; add it there with its type once it was read.
Run it: `python -m pytest tests/engine_plugins/trtllm`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from specs.errors import SpecError

FOLDER = Path(__file__).parent / "versions"
_PLAIN = {"int": int, "bool": bool, "str": str, "float": (int, float)}
_LAYERS = ("spellings", "fields", "models", "flags", "renamed", "env")


@dataclass(frozen=True)
class Contract:
    """One version's fields (name -> rule), nested models, command line, renames, spellings and environment."""

    line: str  # "1.2"
    versions: tuple[str, ...]
    spellings: dict[str, Any]
    fields: dict[str, dict[str, Any]]
    models: dict[str, dict[str, dict[str, Any]]]
    flags: dict[str, str]
    renamed: dict[str, str]
    env: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Complaint:
    """What is wrong with one option; the caller knows the file and line."""

    path: tuple[str, ...]  # below engine.options, or ("NAME",) below engine.env
    what: str
    fix: str
    value: Any = None


@cache
def lines() -> tuple[str, ...]:
    """The versions there is a contract for, oldest first."""
    return tuple(sorted(path.stem for path in FOLDER.glob("[0-9]*.yaml")))


@cache
def load_contract(line: str) -> Contract:
    """The contract of a version line such as "1.2", its ancestors merged in."""
    merged = _merged(line)
    return Contract(line, tuple(merged["versions"]), **{name: merged[name] for name in _LAYERS})


def contract_for(version: str) -> Contract:
    """The contract of a version such as 1.2.1 or 1.3.0rc22; SpecError for one we know nothing about."""
    line = ".".join(version.split(".")[:2])
    if line not in lines():
        known = ", ".join(entry for one in lines() for entry in load_contract(one).versions)
        what = f"there is no contract for TensorRT-LLM {version}"
        raise SpecError(
            what, "engine.version", f"known: {known}", key="engine.version", value=version, rule="a known version"
        )
    return load_contract(line)


def complaints(contract: Contract, options: dict[str, Any], version: str) -> Iterator[Complaint]:
    """Everything about `options` that this version would refuse, or that the spec says elsewhere."""
    yield from _walk(contract, contract.fields, options, (), version)


def yaml_complaints(contract: Contract, arguments: dict[str, Any], version: str) -> Iterator[Complaint]:
    """Everything about a rendered arguments YAML that this version would refuse."""
    yield from _walk(contract, contract.fields, arguments, (), version, rendered=True)


def env_complaints(contract: Contract, env: dict[str, str], version: str) -> Iterator[Complaint]:
    """Unknown or mis-set variables of TensorRT-LLM; those of other software (NCCL_*, CUDA_*) are left alone."""
    for name, value in env.items():
        rule = contract.env.get(name)
        if rule is None and name.startswith(("TRTLLM_", "TLLM_", "TRT_LLM_")):
            yield Complaint(
                (name,), f"TensorRT-LLM {version} has no variable {name}", _close(name, contract.env), value
            )
        elif rule and "values" in rule and value not in rule["values"]:
            yield Complaint((name,), f"{name} is {value!r}", f"use {' or '.join(rule['values'])}", value)


def argv_complaints(contract: Contract, argv: list[str], version: str) -> Iterator[Complaint]:
    """What `trtllm-serve` of this version would refuse on its command line; `argv` starts with the program and the
    model."""
    words = iter(argv[2:])
    for word in words:
        kind = contract.flags.get(word)
        if kind is None:
            yield Complaint((word,), f"trtllm-serve {version} has no {word}", _close(word, contract.flags))
        elif kind != "flag":
            value = next(words, None)
            if value is None or not _reads_as(kind, value):
                yield Complaint((word,), f"{word} needs {_spoken(kind)}", f"found {value!r}", value)


def _reads_as(kind: str, text: str) -> bool:
    try:
        {"int": int, "float": float, "str": str}[kind](text)
    except ValueError:
        return False
    return True


def fits(contract: Contract, kind: str, value: Any) -> bool:
    """Whether a value has a contract type; models are checked key by key elsewhere."""
    if "|" in kind and not kind.startswith("dict"):
        return any(fits(contract, arm, value) for arm in kind.split("|"))
    if kind == "any":
        return True
    if kind == "null":
        return value is None
    inner = re.fullmatch(r"list\[(\w+)\]", kind)
    if inner:
        return isinstance(value, list) and all(fits(contract, inner[1], item) for item in value)
    inner = re.fullmatch(r"dict\[(\w+),(\w+)\](\|null)?", kind)
    if inner:
        pairs = value.items() if isinstance(value, dict) else None
        whole = pairs is not None and all(_key_fits(inner[1], k) and fits(contract, inner[2], v) for k, v in pairs)
        return whole or (value is None and bool(inner[3]))
    if kind in contract.models:
        return isinstance(value, dict)
    return isinstance(value, _PLAIN[kind]) and (kind == "bool" or not isinstance(value, bool))  # type: ignore[arg-type]


def _key_fits(kind: str, key: Any) -> bool:
    """YAML keys reach us as text (specs keep them so); a whole number is one that reads as such."""
    return kind == "str" or str(key).isdigit()


def _walk(
    contract: Contract,
    rules: dict[str, dict[str, Any]],
    options: dict[str, Any],
    path: tuple[str, ...],
    version: str,
    rendered: bool = False,
) -> Iterator[Complaint]:
    for name, value in options.items():
        here, rule = (*path, name), rules.get(name)
        if rule is None:
            yield Complaint(
                here, f"TensorRT-LLM {version} does not know {'.'.join(here)}", _advice(contract, here, rules), value
            )
        elif "set_by" in rule and not rendered:
            yield Complaint(here, f"{'.'.join(here)} is set by {rule['set_by']}", "drop it from engine.options", value)
        elif not fits(contract, rule["type"], value):
            yield Complaint(here, f"{'.'.join(here)} must be {_spoken(rule['type'])}", f"found {value!r}", value)
        elif value is not None:
            yield from _limits(here, rule, value, version)
            model = next((arm for arm in rule["type"].split("|") if arm in contract.models), None)
            if model:
                yield from _walk(contract, contract.models[model], value, here, version, rendered)


def _limits(path: tuple[str, ...], rule: dict[str, Any], value: Any, version: str) -> Iterator[Complaint]:
    name = ".".join(path)
    if "values" in rule and value not in rule["values"]:
        allowed = ", ".join(map(str, rule["values"]))
        yield Complaint(
            path, f"{name} is {value!r}, which TensorRT-LLM {version} does not know", f"use one of {allowed}", value
        )
    if "min" in rule and value < rule["min"]:
        yield Complaint(path, f"{name} is {value}", f"use at least {rule['min']}", value)
    if "max" in rule and value > rule["max"]:
        yield Complaint(path, f"{name} is {value}", f"use at most {rule['max']}", value)


def _advice(contract: Contract, path: tuple[str, ...], rules: dict[str, dict[str, Any]]) -> str:
    """The version that knows the option, its new name, or the nearest one."""
    if len(path) == 1 and path[0] in contract.renamed:
        return (
            f"write {contract.renamed[path[0]]}" if "," not in contract.renamed[path[0]] else contract.renamed[path[0]]
        )
    knowing = [line for line in lines() if _knows(load_contract(line), path)]
    if knowing:
        return f"known in {', '.join(knowing)}: change engine.version or drop it"
    return _close(path[-1], rules)


def _knows(contract: Contract, path: tuple[str, ...]) -> bool:
    rules = contract.fields
    for depth, name in enumerate(path):
        rule = rules.get(name)
        if rule is None or depth == len(path) - 1:
            return rule is not None
        model = next((arm for arm in rule["type"].split("|") if arm in contract.models), "")
        rules = contract.models.get(model, {})
    return False


def _close(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return (
        f"did you mean {close[0]}?"
        if close
        else "drop it, or add it to engine_plugins/trtllm/versions once it was read"
    )


def _spoken(kind: str) -> str:
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "null": "null"}
    return " or ".join(words.get(arm, f"a {arm}") for arm in kind.split("|"))


def _merged(line: str) -> dict[str, Any]:
    own = yaml.safe_load((FOLDER / f"{line}.yaml").read_text(encoding="utf-8"))
    if "extends" not in own:
        return {name: own.get(name, {}) for name in (*_LAYERS, "versions")}
    base = _merged(own["extends"])
    return {"versions": own["versions"], **{name: _overlay(base[name], own.get(name, {})) for name in _LAYERS}}


def _overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in top.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = _overlay(merged[name], value)
        else:
            merged[name] = value
    return merged
