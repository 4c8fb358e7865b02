"""Digests that decide whether work is done again.

What it is: sha256 of canonical JSON, of files, and of a module's source with everything it imports here.
What it refuses to be: sensitive to what changes nothing. Comments, blank lines, docstrings and modules imported only
for type checkers do not count; any other edit of any project module in the import closure does, also when imported
inside a function.
Run it: `python -m specs.digest tasks.quantize` prints a digest and the modules behind it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

PROJECT_PACKAGES = ("specs", "engine_plugins", "tasks", "flows")
# What a module reads, fills or compiles beside its Python: kernel sources, contracts and tasks kept as data, templates.
BESIDE_SUFFIXES = (".cpp", ".h", ".hpp", ".cu", ".cuh", ".yaml", ".jinja", ".css", ".py")
_CHUNK_BYTES = 8 << 20


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def json_sha256(value: Any) -> str:
    """Hex sha256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read once in large pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def module_closure_digest(module: str, root: Path | None = None) -> str:
    """Hex sha256 over the meaning of a module and of all project modules it imports, directly or not.

    In the packages below engine_plugins and tasks the C++, CUDA, YAML and template files beside an imported module
    count as well, byte by byte: they are compiled or read when the module runs.
    """
    return json_sha256(module_parts(module, root))


def module_parts(module: str, root: Path | None = None) -> dict[str, str]:
    """File below the root -> digest of its meaning, for the closure: so that a miss can name the file that changed."""
    base = root or Path(__file__).resolve().parent.parent
    closure = module_closure(module, base)
    parts = {path.relative_to(base).as_posix(): _source(path).digest for path in closure.values()}
    beside = _beside(closure, base) - set(closure.values())
    return parts | {path.relative_to(base).as_posix(): _bytes_digest(path) for path in sorted(beside)}


def module_closure(module: str, root: Path | None = None) -> dict[str, Path]:
    """Dotted name -> file of a module and of every project module it reaches through imports."""
    base = root or Path(__file__).resolve().parent.parent
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _find(name, base)
        if name in found or path is None:
            continue
        found[name] = path
        waiting += _parents(name)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        waiting += _absolute(_source(path).imports, package)
    return dict(sorted(found.items()))


class _Source:
    """One parsed module: its normalised digest and its import statements."""

    def __init__(self, path: Path) -> None:
        tree = ast.parse(path.read_bytes(), filename=str(path))
        imports: list[tuple[int, str, tuple[str, ...]]] = []  # level, module, names
        never_run = _for_type_checkers(tree)
        for node in ast.walk(tree):
            if node in never_run:
                continue
            if isinstance(node, ast.Import):
                imports += [(0, alias.name, ()) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imports.append((node.level, node.module or "", tuple(alias.name for alias in node.names)))
            elif isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                _drop_docstring(node)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                imports += _named_module(node.value)
        self.imports = tuple(imports)
        self.digest = hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _for_type_checkers(tree: ast.Module) -> set[ast.AST]:
    """Everything below `if TYPE_CHECKING:`."""
    guards = (node for node in ast.walk(tree) if isinstance(node, ast.If) and isinstance(node.test, ast.Name))
    bodies = (child for node in guards if node.test.id == "TYPE_CHECKING" for child in node.body)  # type: ignore[attr-defined]
    return {node for child in bodies for node in ast.walk(child)}


def _named_module(text: str) -> list[tuple[int, str, tuple[str, ...]]]:
    """A program is started by its dotted name in a string; "module:function" is a registry entry and starts nothing."""
    head = text.split(".", 1)[0]
    named = head in PROJECT_PACKAGES and "." in text and all(part.isidentifier() for part in text.split("."))
    return [(0, text, ())] if named else []


def _drop_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        node.body = node.body[1:]


def _absolute(imports: Iterable[tuple[int, str, tuple[str, ...]]], package: str) -> list[str]:
    names: list[str] = []
    for level, module, members in imports:
        if level:
            above = package.split(".")[: len(package.split(".")) - level + 1]
            module = ".".join(above + ([module] if module else []))
        if module.split(".", 1)[0] not in PROJECT_PACKAGES:
            continue
        names.append(module)
        names += [f"{module}.{member}" for member in members]  # `from package import module`
    return names


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _find(name: str, root: Path) -> Path | None:
    place = root.joinpath(*name.split("."))
    module, package = place.with_suffix(".py"), place / "__init__.py"
    if module.is_file():
        return module
    return package if package.is_file() else None


def _beside(closure: dict[str, Path], base: Path) -> set[Path]:
    layers = {base / "engine_plugins", base / "tasks"}
    folders = {path.parent for path in closure.values() if layers & {path.parent.parent, *path.parent.parent.parents}}
    return {path for folder in folders for path in _data_below(folder)}


def _data_below(folder: Path, plain: bool = False) -> list[Path]:
    """Files of a folder and below it.

    Python counts in plain subfolders only: nothing imports it from there, somebody loads it by its path.
    """
    found: list[Path] = []
    for path in folder.iterdir():
        if path.suffix in BESIDE_SUFFIXES and (plain or path.suffix != ".py"):
            found.append(path)
        elif path.is_dir():
            found += _data_below(path, plain=not (path / "__init__.py").is_file())
    return found


def _stamp(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path), status.st_mtime_ns, status.st_size


def _source(path: Path) -> _Source:
    return _parsed(*_stamp(path))


@lru_cache(maxsize=4096)
def _parsed(path: str, mtime_ns: int, size: int) -> _Source:
    return _Source(Path(path))


def _bytes_digest(path: Path) -> str:
    return _hashed(*_stamp(path))


@lru_cache(maxsize=4096)
def _hashed(path: str, mtime_ns: int, size: int) -> str:
    return file_sha256(Path(path))


if __name__ == "__main__":
    for target in sys.argv[1:]:
        print(module_closure_digest(target), target)
        for reached in module_closure(target):
            print("   ", reached)
