"""The verbs about artifacts as people and scripts see them: exit codes, names of bad files, nothing deleted unasked.

Refuses to need a model. Run it: `python -m pytest tests/flows/test_artifact_verbs.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import main
from tasks.store import LocalStore, Manifest, Meta
from tasks.store.manifest import MANIFEST, components_key


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def publish(store: LocalStore, text: str = "hello", stage: str = "quantize", **inputs: Manifest) -> Manifest:
    parts = {"stage": stage, "spec.text": json.dumps(text)} | {f"input.{n}": m.digest for n, m in inputs.items()}
    work = store.workdir(stage, components_key(parts))
    (work / "model.safetensors").write_text(text)
    meta = Meta(parts, {"toy.length": float(len(text))}, {}, {n: store.artifact_uri(m) for n, m in inputs.items()})
    manifest = store.publish(stage, components_key(parts), work, meta)
    store.remember("toy", manifest)
    return manifest


def corrupt(store: LocalStore, manifest: Manifest) -> None:
    """Other bytes, the same size, the old mtime: only reading can tell."""
    path = store.checkout(manifest) / "model.safetensors"
    status = path.stat()
    path.write_text("x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def kilotok(store: LocalStore, *argv: str) -> int:
    return main([*argv, "--store", str(store.root)])


def test_verify_exits_0_for_what_is_as_it_was(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    uri = store.artifact_uri(publish(store))
    assert kilotok(store, "verify", uri) == 0 and capsys.readouterr().out.startswith(f"ok     {uri}")


def test_verify_of_two_inputs_finds_nothing_wrong(store: LocalStore) -> None:
    head, checkpoint = publish(store, "head", "train_draft"), publish(store)
    made = publish(store, stage="build_engine", train_draft=head, quantize=checkpoint)  # not in the manifest's order
    assert kilotok(store, "verify", store.artifact_uri(made), "--deep") == 0


def test_verify_exits_1_and_names_the_bad_file(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = publish(store)
    corrupt(store, manifest)
    assert kilotok(store, "verify", store.artifact_uri(manifest)) == 1
    assert "model.safetensors: content changed (sha256)" in capsys.readouterr().out


def test_verify_exits_1_for_a_manifest_edited_by_hand(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = publish(store)
    path = store.checkout(manifest) / MANIFEST
    path.write_text(path.read_text().replace('"toy.length": 5.0', '"toy.length": 99.0'))
    assert kilotok(store, "verify", store.artifact_uri(manifest)) == 1
    assert "edited by hand" in capsys.readouterr().out


def test_verify_deep_reads_the_ancestors_too(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    source = publish(store)
    uri = store.artifact_uri(publish(store, stage="build_engine", quantize=source))
    corrupt(store, source)
    assert [kilotok(store, "verify", uri), kilotok(store, "verify", uri, "--deep")] == [0, 1]


def test_verify_of_nothing_exits_3_with_one_line(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert kilotok(store, "verify", "quantize/ffff") == 3
    assert capsys.readouterr().err == "kilotok: no such artifact [quantize/ffff]: see kilotok store ls\n"


def test_lineage_is_a_tree_back_to_the_source(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = publish(store, stage="build_engine", quantize=publish(store))
    assert kilotok(store, "lineage", store.artifact_uri(manifest)) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["build_engine", "quantize"]


def test_diff_says_what_changed_in_words(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = publish(store), publish(store, "other!")
    assert kilotok(store, "diff", store.artifact_uri(old), store.artifact_uri(new)) == 0
    assert capsys.readouterr().out.splitlines()[0] == "text hello -> other!"


def test_gc_shows_and_deletes_only_when_asked(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    old, _ = publish(store), publish(store, "other!")
    assert kilotok(store, "gc") == 0 and f"would delete {store.artifact_uri(old)}" in capsys.readouterr().out
    assert store.lookup(old.stage, old.key)
    assert kilotok(store, "gc", "--delete") == 0 and store.lookup(old.stage, old.key) is None


def test_ls_and_du_count_what_is_there(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    uri = store.artifact_uri(publish(store))
    assert kilotok(store, "store", "ls") == 0 and uri in capsys.readouterr().out
    assert kilotok(store, "store", "du") == 0 and "quantize          1 artifacts" in capsys.readouterr().out


def test_reader_that_has_seen_enough_is_no_error(store: LocalStore) -> None:
    publish(store)
    command = [sys.executable, "-m", "flows.cli", "store", "ls", "--store", str(store.root)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_push_and_pull_copy_what_is_missing(
    store: LocalStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, other = publish(store), LocalStore(tmp_path / "other")
    assert kilotok(store, "store", "push", str(other.root)) == 0 and other.lookup(manifest.stage, manifest.key)
    capsys.readouterr()
    assert kilotok(store, "store", "pull", str(other.root)) == 0 and capsys.readouterr().out == "nothing to copy\n"


def test_push_without_the_other_store_says_how(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert kilotok(store, "store", "push") == 2 and "kilotok store push s3://bucket" in capsys.readouterr().err


def test_status_shows_who_holds_a_stuck_lease(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    with store.lease("quantize-0123456789abcdef"):
        assert kilotok(store, "status") == 0
    assert f"quantize-0123456789abcdef        held by pid {os.getpid()} on " in capsys.readouterr().out
