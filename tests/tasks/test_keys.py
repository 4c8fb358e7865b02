"""Keys see what shapes an artifact, and nothing else; a miss explains itself.

Refuses to run a stage. Run: `pytest tests/tasks/test_keys.py`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specs.schema import Draft
from tasks.edges import machine
from tasks.stages import DRAFT, REGISTRY, STAGES, Stage, downstream
from tasks.store import LocalStore
from tasks.store.keys import CODE_ROOT, Known, SpecView, components, explain, flatten
from tasks.store.memo import Memo

STAGE = Stage(
    "make", reads=("data",), packages=("pyyaml", "no-such-package"), machine=("cpu_isa",), entry="nowhere:make"
)
NOTHING = Known({}, {})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text("one")
    return tmp_path


def parts(root: Path, **tree: object) -> dict[str, str]:
    return components(STAGE, SpecView("a", tree, root), NOTHING, Memo(LocalStore(root / "store")), root)


def test_data_file_is_keyed_by_content(root: Path) -> None:
    before = parts(root, data={"prompts": "file:prompts.jsonl"})
    (root / "prompts.jsonl").write_text("two")
    after = parts(root, data={"prompts": "file:prompts.jsonl"})
    assert explain(before, after) == "rebuild, file:prompts.jsonl changed"


def test_mtime_of_a_data_file_does_not_matter(root: Path) -> None:
    before = parts(root, data={"prompts": "file:prompts.jsonl"})
    os.utime(root / "prompts.jsonl", (1, 1))
    assert parts(root, data={"prompts": "file:prompts.jsonl"}) == before


def test_data_file_is_hashed_once(root: Path) -> None:
    memo = Memo(LocalStore(root / "store"))
    memo.data(root / "prompts.jsonl"), memo.save()
    status = os.stat(root / "prompts.jsonl")
    (root / "prompts.jsonl").write_text("eno")  # same size; with the old mtime only reading could tell
    os.utime(root / "prompts.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns))
    again = Memo(LocalStore(root / "store"))
    assert again.data(root / "prompts.jsonl") == memo.data(root / "prompts.jsonl")


def test_remote_data_is_what_the_lock_says(root: Path) -> None:
    lock = {"files": {}, "data": {"hf://datasets/a": {"sha256": "f" * 64, "size": 1}}}
    view = SpecView("a", {"data": {"dataset": "hf://datasets/a"}}, root, lock)
    found = components(STAGE, view, NOTHING, Memo(LocalStore(root / "store")), root)
    assert found["data.hf://datasets/a"] == "f" * 64


def test_name_of_the_spec_is_no_part_of_a_model_key(root: Path) -> None:
    memo = Memo(LocalStore(root / "store"))
    one, two = (components(STAGE, SpecView(name, {"data": {}}, root), NOTHING, memo, root) for name in ("a", "b"))
    assert one == two


def test_absent_package_is_a_value(root: Path) -> None:
    assert parts(root, data={})["package.no-such-package"] == "absent"


def test_instruction_set_is_in_the_key(root: Path) -> None:
    assert parts(root, data={})["machine.cpu_isa"] == machine.cpu_isa()


def test_token_is_not_in_the_key(root: Path) -> None:
    view = SpecView("a", {"model": {"source": "hf://a/b", "token": "${env:HF_TOKEN}"}}, root)
    found = components(REGISTRY["download"], view, NOTHING, Memo(LocalStore(root / "store")))
    assert not any("token" in name for name in found)


@pytest.mark.parametrize(
    "name, old, new, words",
    [
        ("package.nvidia-modelopt", "0.46.1", "0.47.0", "rebuild, nvidia-modelopt 0.46.1 -> 0.47.0"),
        ("spec.validate.gates[0].at_least", "300", "400", "rebuild, validate.gates[0].at_least 300 -> 400"),
        ("spec.draft.training.epochs", "2", "3", "rebuild, draft.training.epochs 2 -> 3"),
        ("spec.engine.plugins[1]", None, '"verify"', "rebuild, engine.plugins[1] unset -> verify"),
        ("machine.gpu", "1 x NVIDIA H200", "8 x NVIDIA B200", "rebuild, gpu 1 x NVIDIA H200 -> 8 x NVIDIA B200"),
        ("input.quantize", "a" * 64, "b" * 64, "rebuild, quantize changed (aaaaaaaa -> bbbbbbbb)"),
        ("code.tasks/quantize/export.py", "a", "b", "rebuild, tasks/quantize/export.py changed"),
    ],
)
def test_miss_explains_itself(name: str, old: str | None, new: str, words: str) -> None:
    assert explain({"stage": "x"} | ({name: old} if old else {}), {"stage": "x", name: new}) == words


def test_what_the_user_changed_is_told_first() -> None:
    old = {"spec.a": "1", "code.b.py": "1", "package.c": "1", "machine.d": "1"}
    words = "rebuild, a 1 -> 2; c 1 -> 2 and 2 more"
    assert explain(old, {name: "2" for name in old}) == words


def test_flatten_names_every_leaf() -> None:
    assert flatten({"a": [{"b": 1}, {}], "c": None}) == {"a[0].b": 1, "a[1]": {}, "c": None}


def test_slice_holds_only_what_the_stage_reads() -> None:
    view = SpecView("a", {"draft": {"method": "eagle3", "data": {}}, "engine": {"backend": "native"}}, Path("."))
    assert view.slice(("draft.method",)) == {"name": "a", "draft": {"method": "eagle3"}}


def test_gates_reach_validate_and_what_follows_only() -> None:
    readers = [stage.name for stage in STAGES if "validate" in stage.reads]
    assert readers == ["validate", "report"]


def good(build: str, since: str = "", **keys: str) -> dict[str, Any]:
    return {"build": build, "since": since, "stages": [{"stage": name, "key": key} for name, key in keys.items()]}


@pytest.mark.parametrize(
    ("last_good", "since"),
    [
        (None, ""),
        (good("one", quantize="b"), "one"),  # it differs: the page compares with it
        (good("two", "one", quantize="a", report="x"), "one"),  # a run without a change: its page is this one's too
        (good("one", quantize="a"), ""),
    ],
)
def test_report_is_keyed_by_the_last_good_build_that_differs(last_good: dict[str, Any] | None, since: str) -> None:
    assert Known({}, {"quantize": "a"}, last_good).since == since


def test_report_is_keyed_by_what_the_run_built_even_if_it_came_out_the_same(root: Path) -> None:
    view, memo = SpecView("a", {}, root), Memo(LocalStore(root / "store"))
    tells = replace(STAGE, tells=True)
    one, two = (components(tells, view, Known({}, {"quantize": key}), memo, root) for key in ("a" * 64, "b" * 64))
    assert explain(one, two) == "rebuild, quantize changed (aaaaaaaa -> bbbbbbbb)"


def test_edit_of_the_downloader_moves_no_model_again(root: Path) -> None:
    lock = {"files": {"a.safetensors": {"sha256": "f" * 64, "size": 1}}}
    view = SpecView("a", {"model": {"source": "hf://a/b", "revision": "main"}}, root, lock)
    found = components(REGISTRY["download"], view, NOTHING, Memo(LocalStore(root / "store")))
    assert found == {"stage": "download", "format": found["format"], "lock.a.safetensors": "f" * 64}


def test_recipe_file_beside_the_spec_is_keyed_by_content(root: Path) -> None:
    before = parts(root, data={"recipe": "recipe.yaml"})
    (root / "recipe.yaml").write_text("quantize: {}")
    assert explain(before, parts(root, data={"recipe": "recipe.yaml"})) == "rebuild, recipe.yaml is new"


@pytest.mark.parametrize("fact", ["gpu", "container", "compiler"])
def test_accelerator_container_and_compiler_are_in_the_bundles_key(root: Path, fact: str) -> None:
    view, memo = SpecView("a", {}, root), Memo(LocalStore(root / "store"))
    assert components(REGISTRY["build_engine"], view, NOTHING, memo)[f"machine.{fact}"] == machine.FACTS[fact]()


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("build_engine", "engine_plugins/ops/moe_top1/cpu.h"),
        ("build_engine", "engine_plugins/trtllm/versions/1.2.yaml"),
        ("validate", "tasks/validate/lm_tasks/answer_line.yaml"),
        ("validate", "tasks/validate/lm_tasks/answer_line.py"),
        ("report", "tasks/report/page.html.jinja"),
    ],
)
def test_what_a_stage_reads_beside_its_python_is_in_its_key(root: Path, stage: str, file: str) -> None:
    assert file in Memo(LocalStore(root / "store")).code(f"tasks.{stage}", CODE_ROOT)


@pytest.mark.parametrize("stage", ["quantize", "train_draft", "build_engine", "validate", "promote"])
def test_edit_of_the_store_rebuilds_no_model(root: Path, stage: str) -> None:
    code = Memo(LocalStore(root / "store")).code(f"tasks.{stage}", CODE_ROOT)
    assert not [file for file in code if file.startswith("tasks/store/")]


def test_all_of_the_draft_but_its_launch_is_in_its_key() -> None:
    assert {*DRAFT, "launch"} == set(Draft.model_fields)


def test_draft_training_does_not_reach_quantize() -> None:
    assert downstream("train_draft") == ["build_engine", "deploy", "validate", "promote", "report"]


def test_inputs_come_before_the_stage_that_needs_them() -> None:
    order = [stage.name for stage in STAGES]
    assert all(order.index(name) < order.index(s.name) for s in STAGES for name in (*s.inputs, *s.uses))
