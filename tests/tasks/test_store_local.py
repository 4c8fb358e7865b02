"""The local store: nothing half, nothing outside, nothing believed that changed.

Refuses to run a stage. Run: `pytest tests/tasks/test_store_local.py`.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from specs.errors import IntegrityError, StoreError
from tasks.store import LocalStore, Manifest, Meta
from tasks.store.hashing import record_hash
from tasks.store.manifest import MANIFEST

KEY = "a" * 64
META = Meta({"stage": "make"}, {"x": 1.0}, {}, {})


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def publish(store: LocalStore, text: str = "hello", key: str = KEY, meta: Meta = META) -> Manifest:
    work = store.workdir("make", key)
    (work / "sub").mkdir(exist_ok=True)
    (work / "sub" / "file.txt").write_text(text)
    (work / ".scratch").mkdir(exist_ok=True)
    return store.publish("make", key, work, meta)


def edit_manifest(folder: Path, **changes: object) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**data, **changes}))


def test_published_is_found(store: LocalStore) -> None:
    assert publish(store).digest == store.lookup("make", KEY).digest


def test_scratch_is_not_published(store: LocalStore) -> None:
    assert not (store.checkout(publish(store)) / ".scratch").exists()


def test_half_a_manifest_of_a_kill_is_no_content(store: LocalStore) -> None:
    (store.workdir("make", KEY) / f".{MANIFEST}.123.456").write_text("{")
    manifest = publish(store)
    assert manifest.digest == publish(store, key="b" * 64).digest and store.verify(manifest) == []


def test_equal_content_has_an_equal_digest_under_another_key(store: LocalStore) -> None:
    assert publish(store).digest == publish(store, key="b" * 64).digest


def test_provenance_is_outside_the_digest(store: LocalStore) -> None:
    other = Meta({}, {}, {"argv": ["x"]}, {})
    assert publish(store).digest == publish(store, key="b" * 64, meta=other).digest


def test_copied_store_is_still_a_hit_after_one_reading(store: LocalStore) -> None:
    manifest = publish(store)
    os.utime(store.checkout(manifest) / "sub" / "file.txt", (1, 1))
    assert store.inspect("make", KEY).touched == ("sub/file.txt",)
    assert store.lookup("make", KEY) and store.inspect("make", KEY).touched == ()


def test_same_size_corruption_with_a_new_mtime_is_no_hit(store: LocalStore) -> None:
    (store.checkout(publish(store)) / "sub" / "file.txt").write_text("jello")
    assert store.lookup("make", KEY) is None


def test_truncated_file_is_no_hit(store: LocalStore) -> None:
    os.truncate(store.checkout(publish(store)) / "sub" / "file.txt", 3)
    assert store.inspect("make", KEY).problem == "damaged: sub/file.txt has 3 bytes instead of 5"


def test_verify_names_each_bad_file(store: LocalStore) -> None:
    manifest = publish(store)
    path = store.checkout(manifest) / "sub" / "file.txt"
    status = path.stat()
    path.write_text("jello")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    (store.checkout(manifest) / "extra.bin").write_text("x")
    assert store.verify(manifest) == ["extra.bin: not in the manifest", "sub/file.txt: content changed (sha256)"]


def test_damaged_artifact_is_moved_aside_for_the_new_one(store: LocalStore) -> None:
    (store.checkout(publish(store)) / MANIFEST).unlink()
    assert publish(store) and store.lookup("make", KEY)


def test_artifact_without_manifest_says_so(store: LocalStore) -> None:
    (store.checkout(publish(store)) / MANIFEST).unlink()
    assert store.inspect("make", KEY).problem == "damaged: no manifest"


def test_manifest_cut_short_is_no_hit(store: LocalStore) -> None:
    path = store.checkout(publish(store)) / MANIFEST
    os.truncate(path, path.stat().st_size // 2)
    assert "unreadable manifest" in store.inspect("make", KEY).problem


@pytest.mark.parametrize(
    "path", ["../out", "/etc/passwd", "a/../../b", "", "a//b", "./a", "a\nb", "manifest.json", "a\\b"]
)
def test_file_list_that_leaves_the_artifact_is_refused(store: LocalStore, path: str) -> None:
    folder = store.checkout(publish(store))
    edit_manifest(folder, files=[{"path": path, "size": 1, "sha256": "0" * 64, "mtime_ns": 0}])
    assert "refused file name" in store.inspect("make", KEY).problem


def test_manifest_edited_by_hand_is_refused(store: LocalStore) -> None:
    folder = store.checkout(publish(store))
    edit_manifest(folder, files=[{"path": "a", "size": 1, "sha256": "0" * 64, "mtime_ns": 0}])
    assert "edited by hand" in store.inspect("make", KEY).problem


def test_symlink_is_not_published(store: LocalStore) -> None:
    work = store.workdir("make", KEY)
    (work / "link").symlink_to("/etc/passwd")
    with pytest.raises(IntegrityError, match="'link': not a plain file"):
        store.publish("make", KEY, work, META)


def test_file_replaced_by_a_symlink_is_no_hit(store: LocalStore, tmp_path: Path) -> None:
    path = store.checkout(publish(store)) / "sub" / "file.txt"
    path.unlink()
    path.symlink_to("hello")  # a link as long as the file it replaces
    assert store.inspect("make", KEY).problem == "damaged: sub/file.txt is not a plain file"


def test_hash_recorded_while_writing_is_not_made_again(store: LocalStore) -> None:
    work = store.workdir("make", KEY)
    (work / "big.bin").write_text("x")
    record_hash(work, "big.bin", "1" * 64)
    assert store.publish("make", KEY, work, META).files[0].sha256 == "1" * 64


def test_hard_link_to_an_input_is_not_read_again(store: LocalStore) -> None:
    work = store.workdir("source", KEY)
    (work / "big.bin").write_text("x")
    record_hash(work, "big.bin", "1" * 64)  # a hash that reading would not give
    source = store.publish("source", KEY, work, META)
    work = store.workdir("make", KEY)
    os.link(store.checkout(source) / "big.bin", work / "linked.bin")
    made = store.publish("make", KEY, work, replace(META, inputs={"source": store.artifact_uri(source)}))
    assert made.files[0].sha256 == "1" * 64


def test_recorded_hash_of_a_file_that_changed_is_ignored(store: LocalStore) -> None:
    work = store.workdir("make", KEY)
    (work / "big.bin").write_text("x")
    record_hash(work, "big.bin", "1" * 64)
    (work / "big.bin").write_text("xy")
    assert store.publish("make", KEY, work, META).files[0].sha256 != "1" * 64


def test_old_work_is_swept_and_fresh_work_is_not(store: LocalStore) -> None:
    old, fresh = store.workdir("make", "b" * 64), store.workdir("make", "c" * 64)
    os.utime(old, (1, 1))
    store.workdir("make", KEY)
    assert not old.exists() and fresh.exists()


def test_store_below_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        LocalStore(tmp_path / "file" / "store").workdir("make", KEY)


def test_artifact_is_found_by_uri_and_by_the_start_of_its_key(store: LocalStore) -> None:
    manifest = publish(store)
    assert store.load(store.artifact_uri(manifest)) == store.load("make/aaaa") == manifest


def test_unknown_artifact_is_one_clear_error(store: LocalStore) -> None:
    with pytest.raises(StoreError, match="no such artifact"):
        store.load("make/ffff")


def test_records_survive_a_crash_of_the_writer(store: LocalStore) -> None:
    store.write_json("builds/a/1", {"x": 1})
    assert store.read_json("builds/a/1") == {"x": 1} and store.list_json("builds") == ["builds/a/1"]


def test_lease_names_its_owner_while_it_is_held(store: LocalStore) -> None:
    with store.lease("make-a"):
        assert [(lease["name"], lease["pid"]) for lease in store.leases()] == [("make-a", os.getpid())]
    assert store.leases() == []
