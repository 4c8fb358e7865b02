"""Digests change with meaning, and with nothing else."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from specs.digest import canonical_json, json_sha256, module_closure, module_closure_digest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """tasks.a imports tasks.b at the top and engine_plugins.native.c inside a function; c has a kernel beside it."""
    files = {
        "tasks/__init__.py": "",
        "tasks/a.py": "from tasks import b\ndef run():\n    from engine_plugins.native.c import go\n    return go(b)\n",
        "tasks/b.py": "X = 1\n",
        "tasks/d.py": "Y = 1\n",
        "engine_plugins/__init__.py": "",
        "engine_plugins/native/__init__.py": "",
        "engine_plugins/native/c.py": "def go(x):\n    return x\n",
        "engine_plugins/native/csrc/step.cpp": "int x;",
        "tasks/page/__init__.py": "",
        "tasks/page/page.jinja": "<p>",
        "tasks/page/loaded/by_path.py": "Z = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def changed(tree: Path, file: str, text: str) -> bool:
    before = module_closure_digest("tasks.a", tree)
    (tree / file).write_text(text)
    return module_closure_digest("tasks.a", tree) != before


def test_comments_docstrings_and_blank_lines_do_not_count(tree: Path) -> None:
    assert not changed(tree, "tasks/b.py", '"""New docstring."""\n\n# a comment\nX   =  1\n')


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tasks/a.py", "X = 3\n"),
        ("tasks/b.py", "X = 2\n"),
        ("engine_plugins/native/c.py", "def go(x):\n    return -x\n"),
        ("engine_plugins/native/__init__.py", "Z = 1\n"),
        ("engine_plugins/native/csrc/step.cpp", "int y;"),
    ],
)
def test_meaning_counts_wherever_it_is_imported_from(tree: Path, file: str, text: str) -> None:
    assert changed(tree, file, text)


@pytest.mark.parametrize("file", ["tasks/page/page.jinja", "tasks/page/loaded/by_path.py"])
def test_template_and_python_loaded_by_its_path_count(tree: Path, file: str) -> None:
    (tree / "tasks/a.py").write_text("from tasks import page\n")
    assert changed(tree, file, "other = 1\n")


def test_import_for_type_checkers_does_not_count(tree: Path) -> None:
    (tree / "tasks/a.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tasks.d import Y\nelse:\n    import tasks.b\n"
    )
    assert not changed(tree, "tasks/d.py", "Y = 2\n") and changed(tree, "tasks/b.py", "X = 2\n")


def test_module_that_is_not_imported_does_not_count(tree: Path) -> None:
    assert not changed(tree, "tasks/d.py", "Y = 2\n")


def test_relative_imports_are_followed(tree: Path) -> None:
    (tree / "tasks/a.py").write_text("from . import b\nfrom .d import Y\n")
    assert {"tasks.b", "tasks.d"} <= set(module_closure("tasks.a", tree))


def test_program_named_in_a_string_counts(tree: Path) -> None:
    (tree / "tasks/a.py").write_text('ARGV = ["python", "-m", "tasks.d"]\n')
    assert "tasks.d" in module_closure("tasks.a", tree)


def test_real_tree_is_fast() -> None:
    """The whole native engine, once parsed; processor time, because other work may share the machine."""
    module_closure_digest("tasks.build_engine", ROOT)
    start = time.process_time()
    module_closure_digest("tasks.build_engine", ROOT)
    assert time.process_time() - start < 0.05


def test_json_has_one_spelling() -> None:
    assert json_sha256({"b": 1, "a": "ü"}) == json_sha256({"a": "ü", "b": 1})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))
