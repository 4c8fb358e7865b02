"""The plan says what a run does, and costs next to nothing to ask.

Refuses to need a model. Run: `pytest tests/tasks/test_plan.py`.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

from tasks.plan import Row, plan, why
from tasks.store import FileEntry, LocalStore, Manifest
from tasks.store.keys import CODE_ROOT
from tasks.store.manifest import MANIFEST, content_digest
from tests.tasks.toy import Toy


def rows(toy: Toy) -> dict[str, Row]:
    return {row.stage: row for row in plan(toy.view, toy.store, toy.registry, toy.root).rows}


def test_plan_of_nothing_builds_first_and_lets_the_rest_depend(toy: Toy) -> None:
    found = rows(toy)
    assert (found["make"].state, found["make"].reason) == ("build", "first build")
    assert (found["join"].state, found["join"].reason) == ("depends", "depends on make")


def test_plan_after_a_run_is_all_cached(toy: Toy) -> None:
    toy.run(), toy.run("join")
    assert plan(toy.view, toy.store, toy.registry, toy.root).all_cached


def test_plan_and_run_agree_on_the_reason(toy: Toy) -> None:
    toy.run()
    toy.tree["toy"]["text"] = "other"
    assert rows(toy)["make"].reason == toy.run().reason


def test_dependent_row_tells_its_own_change_too(toy: Toy) -> None:
    toy.run(), toy.run("join")
    toy.tree["toy"]["text"], toy.tree["join"]["tail"] = "other", "?"
    assert rows(toy)["join"].reason == "depends on make; join.tail ! -> ?"


def test_planning_writes_no_artifact_and_no_work(toy: Toy) -> None:
    rows(toy)
    assert not (toy.store.root / "artifacts").exists() and not (toy.store.root / "work").exists()


def test_touched_file_is_announced_not_read(toy: Toy) -> None:
    toy.run()
    os.utime(next(toy.store.root.glob("artifacts/make/*/a.txt")))
    assert rows(toy)["make"].reason == "unchanged, 1 touched files will be read again"


def test_disk_needed_is_what_it_took_last_time(toy: Toy) -> None:
    size = toy.run().size_bytes
    toy.tree["toy"]["text"] = "other"
    assert rows(toy)["make"].disk_bytes == size


def test_why_lists_every_change(toy: Toy) -> None:
    toy.run()
    toy.tree["toy"].update(text="other", act="none")
    words = why(toy.view, toy.store, "make", toy.registry, toy.root)
    assert words[1:] == ["toy.act  -> none", "toy.text hello -> other"]


def test_plan_renders_as_json_and_text(toy: Toy) -> None:
    found = plan(toy.view, toy.store, toy.registry, toy.root)
    assert json.dumps(found.to_dict()) and "first build" in found.to_text()


def sparse_artifact(store: LocalStore, stage: str, key: str, num_files: int, size: int) -> None:
    """A manifest over sparse files: the shape of 800 GB without the bytes."""
    folder = store.root / "artifacts" / stage / key
    folder.mkdir(parents=True)
    files = []
    for index in range(num_files):
        path = folder / f"model-{index:05}.safetensors"
        with open(path, "wb") as stream:
            stream.truncate(size)
        files.append(FileEntry(path.name, size, "0" * 64, path.stat().st_mtime_ns))
    manifest = Manifest(stage, key, {}, tuple(files), content_digest(files))
    (folder / MANIFEST).write_text(manifest.to_json())


def test_plan_of_an_800_gb_store_takes_half_a_second(toy: Toy) -> None:
    """9 stages, 405 files, a fresh interpreter. Processor time, which is wall time on an idle machine."""
    script = toy.root / "plan_it.py"
    script.write_text(PLAN_NINE)
    environment = {**os.environ, "PYTHONPATH": str(CODE_ROOT)}
    command = [sys.executable, str(script), str(toy.store.root)]
    keys = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    for stage in json.loads(keys)["order"]:  # each digest is known, so each key is, once its input is there
        row = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
        sparse_artifact(toy.store, stage, row["keys"][stage], 45, 2_000_000_000)
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert json.loads(done.stdout)["all_cached"]
    assert min(seconds) <= 0.5, seconds


PLAN_NINE = """
import json, sys
from dataclasses import replace
from pathlib import Path
from tasks.plan import plan
from tasks.stages import REGISTRY
from tasks.store import open_store
from tasks.store.keys import SpecView
tree = {name: {} for name in ("model", "quantize", "draft", "engine", "deploy", "validate")}
registry = {name: replace(stage, alive="") for name, stage in REGISTRY.items()}  # nothing is deployed here
found = plan(SpecView("big", tree, Path(".")), open_store(sys.argv[1]), registry)
heavy = {"torch", "prefect", "boto3", "transformers"} & set(sys.modules)
assert not heavy, heavy
keys = {row.stage: row.key for row in found.rows}
print(json.dumps({"order": list(REGISTRY), "keys": keys, "all_cached": found.all_cached}))
"""
