"""YAML that remembers where it was written: plain data, and file, line and column of every key and value.

What it is: a thin layer on PyYAML's node graph. Duplicate keys, merge keys and self-referring anchors are refused,
`1e-4` is a number (YAML 1.1 alone would call it text), and only plain data comes out.
What it refuses to be: a loader of arbitrary tags.
Run it: `python -m pytest tests/specs/test_load.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from specs.errors import SpecError

Path_ = tuple[Any, ...]  # keys and list indexes from the document's root


@dataclass(frozen=True)
class Mark:
    """Where a key or a value stands; lines and columns count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass
class Marked:
    """A document and its marks. A mapping's entry is marked at its key, a list's at its value."""

    data: Any
    marks: dict[Path_, Mark] = field(default_factory=dict)
    values: dict[Path_, Mark] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """SafeLoader whose numbers include 1e-4 and 1.5e3 without a sign or a dot."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_marked(path: Path, label: str = "") -> Marked:
    """Read one YAML file; SpecError if it is missing, not UTF-8, broken, or not a mapping."""
    file = label or str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError("no such spec", file, "check the path; specs live in specs/*.yaml", file=file) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the spec: {error}", file, "a spec is a UTF-8 YAML file", file=file) from error
    marked = parse_marked(text, file)
    if not isinstance(marked.data, dict):
        raise SpecError("a spec is a mapping of sections", file, "start with `kilotok: 1`", file=file)
    return marked


def parse_marked(text: str, file: str) -> Marked:
    """Parse YAML text; `file` names it in marks and errors."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        marked = Marked(None)
        if node is not None:
            marked.data = _Builder(loader, file, marked).build(node, (), ())
        return marked
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Mark(file, mark.line + 1, mark.column + 1) if mark else Mark(file, 0, 0)
        raise _broken(
            f"broken YAML: {error.problem or error.context}", place, "check indentation and quotes"
        ) from error
    except yaml.YAMLError as error:  # a character YAML forbids, which carries no mark
        raise _broken(f"broken YAML: {error}", Mark(file, 0, 0), "write plain UTF-8 text") from error
    finally:
        loader.dispose()


class _Builder:
    def __init__(self, loader: _Loader, file: str, marked: Marked) -> None:
        self.loader, self.file, self.marked = loader, file, marked

    def mark(self, node: yaml.Node) -> Mark:
        return Mark(self.file, node.start_mark.line + 1, node.start_mark.column + 1)

    def build(self, node: yaml.Node, path: Path_, above: tuple[int, ...]) -> Any:
        """Plain data of a node; its marks go into `marked`."""
        if id(node) in above:
            raise _broken("an anchor that contains itself", self.mark(node), "write the value out")
        self.marked.values[path] = self.mark(node)
        self.marked.marks.setdefault(path, self.mark(node))
        inside = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path, inside)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, index), inside) for index, child in enumerate(node.value)]
        value = self.loader.construct_object(node)
        # Dates are the only other thing SafeLoader makes; JSON has none, and nobody means one here.
        return value if value is None or isinstance(value, (str, int, float, bool)) else node.value

    def mapping(self, node: yaml.MappingNode, path: Path_, inside: tuple[int, ...]) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else ""
            if key in data:
                raise _broken(f"key {key!r} appears twice", self.mark(key_node), "keep one of them")
            if key == "<<" or not isinstance(key_node, yaml.ScalarNode):
                raise _broken("a key must be plain text", self.mark(key_node), "use `extends` to share values")
            below = (*path, key)
            self.marked.marks[below] = self.mark(key_node)
            data[key] = self.build(value_node, below, inside)
        return data


def _broken(what: str, mark: Mark, fix: str) -> SpecError:
    return SpecError(what, str(mark), fix, file=mark.file, line=mark.line, column=mark.column, rule="YAML")
