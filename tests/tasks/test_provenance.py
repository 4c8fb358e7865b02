"""Statements that tools can read, signatures that mean something, lineage back to the source, changes in words.

Refuses to need a model. Run: `pytest tests/tasks/test_provenance.py`.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specs.errors import InputError, IntegrityError
from tasks.attest import ENVELOPE, SBOM, STATEMENT, check_signature, trusted_keys
from tasks.plan import plan
from tasks.provenance import diff, lineage, lineage_text, verify
from tasks.store import LocalStore
from tasks.store.manifest import MANIFEST, PROVENANCE, Manifest
from tasks.store.upkeep import copy, gc, usage
from tests.tasks.toy import Toy


def folder_of(toy: Toy, name: str = "make") -> Path:
    return toy.store.path(toy.receipts[name])


def statement(toy: Toy, name: str = "make") -> dict[str, object]:
    return json.loads((folder_of(toy, name) / PROVENANCE / STATEMENT).read_text())


@pytest.fixture
def signing(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A configured key; returns the public keys that the toy's project trusts."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private, public = toy.root / "signing.pem", toy.root / "specs" / "keys" / "team.pem"
    public.parent.mkdir(parents=True)
    private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    private.chmod(0o600)
    public.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    monkeypatch.setenv("KILOTOK_SIGNING_KEY", str(private))
    return trusted_keys(toy.root)


def test_statement_is_slsa_v1_about_every_file(toy: Toy) -> None:
    toy.run()
    found = statement(toy)
    assert found["predicateType"] == "https://slsa.dev/provenance/v1"
    assert [subject["name"] for subject in found["subject"]][1:] == ["a.txt", "sub/b.txt"]


def test_statement_names_the_inputs_by_digest(toy: Toy) -> None:
    made = toy.run()
    toy.run("join")
    dependency = statement(toy, "join")["predicate"]["buildDefinition"]["resolvedDependencies"][0]
    assert (dependency["uri"], dependency["digest"]["sha256"]) == (made.uri, made.digest)


def test_sbom_is_cyclonedx_with_the_packages(toy: Toy) -> None:
    toy.run()
    sbom = json.loads((folder_of(toy) / PROVENANCE / SBOM).read_text())
    assert sbom["bomFormat"] == "CycloneDX" and "PyYAML" in [part["name"] for part in sbom["components"]]


def test_nothing_is_signed_without_a_key(toy: Toy) -> None:
    toy.run()
    assert check_signature(folder_of(toy) / PROVENANCE, []) == "not signed"


def test_signature_of_a_trusted_key_holds(toy: Toy, signing: list[Path]) -> None:
    toy.run()
    assert check_signature(folder_of(toy) / PROVENANCE, signing) == ""


def test_signature_of_an_unknown_key_is_not_trusted(toy: Toy, signing: list[Path]) -> None:
    toy.run()
    assert "not trusted" in check_signature(folder_of(toy) / PROVENANCE, [])


def test_changed_statement_is_not_the_signed_one(toy: Toy, signing: list[Path]) -> None:
    toy.run()
    path = folder_of(toy) / PROVENANCE / STATEMENT
    path.write_text(path.read_text().replace("make", "fake"))
    assert check_signature(path.parent, signing) == "the statement is not the one that was signed"


def test_forged_signature_is_found(toy: Toy, signing: list[Path]) -> None:
    toy.run()
    path = folder_of(toy) / PROVENANCE / ENVELOPE
    envelope = json.loads(path.read_text())
    envelope["signatures"][0]["sig"] = "A" * 86 + "=="
    path.write_text(json.dumps(envelope))
    assert "bad signature" in check_signature(path.parent, signing)


def test_private_key_that_others_can_read_is_refused(toy: Toy, signing: list[Path]) -> None:
    path = Path(os.environ["KILOTOK_SIGNING_KEY"])
    path.chmod(path.stat().st_mode | stat.S_IRGRP)
    with pytest.raises(InputError, match="others can read"):
        toy.run()
    assert toy.num_calls == 0  # found out before the work, not after it


def test_verify_finds_nothing_wrong_with_a_fresh_build(toy: Toy) -> None:
    toy.run()
    verdict = verify(toy.store, toy.run("join").uri)
    assert verdict.wrong == () and len(verdict.checked) == 2


def test_verify_names_the_bad_file(toy: Toy) -> None:
    receipt = toy.run()
    path = folder_of(toy) / "a.txt"
    status = path.stat()
    path.write_text("x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert verify(toy.store, receipt.uri).wrong == (f"{receipt.uri}: a.txt: content changed (sha256)",)


def test_verify_names_a_manifest_edited_by_hand(toy: Toy) -> None:
    receipt = toy.run()
    path = folder_of(toy) / MANIFEST
    path.write_text(path.read_text().replace('"toy.length": 5', '"toy.length": 50'))
    assert verify(toy.store, receipt.uri).wrong == (
        f"{receipt.uri}: manifest is not as it was written: edited by hand?",
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"components": {"stage": "make"}}, "its key is not that of its components"),
        ({"metrics": {"toy.length": 50.0}}, "the provenance statement and the manifest disagree"),
        ({"inputs": {"download": "file:///elsewhere"}}, "the provenance statement and the manifest disagree"),
    ],
)
def test_verify_finds_a_manifest_forged_with_its_seal(toy: Toy, change: dict[str, Any], words: str) -> None:
    receipt = toy.run()
    path = folder_of(toy) / MANIFEST
    path.write_text(replace(Manifest.from_json(path.read_text(), ""), **change).to_json())
    assert any(words in line for line in verify(toy.store, receipt.uri).wrong)


def test_verify_names_a_damaged_ancestor(toy: Toy) -> None:
    toy.run()
    joined = toy.run("join")
    (folder_of(toy) / MANIFEST).write_text("{")
    assert "unreadable manifest" in verify(toy.store, joined.uri).wrong[0]


def test_lineage_goes_back_to_the_source(toy: Toy) -> None:
    toy.run()
    ancestors = lineage(toy.store, toy.run("join").uri)
    assert [one.manifest.stage for one in ancestors] == ["join", "make"] and "make" in lineage_text(ancestors)


def test_lineage_says_what_is_gone(toy: Toy) -> None:
    made, joined = toy.run(), toy.run("join")
    toy.store.delete(toy.store.load(made.uri))
    assert any("no longer in the store" in note for note in verify(toy.store, joined.uri).notes)


def test_diff_tells_cause_file_and_figure(toy: Toy) -> None:
    old = toy.run()
    toy.tree["toy"]["text"] = "other!"
    assert diff(toy.store, old.uri, toy.run().uri) == [
        "toy.text hello -> other!",
        "a.txt: changed (5000 -> 6000 bytes)",
        "toy.length 5 -> 6",
    ]


def builds(toy: Toy, *texts: str, verdict: str = "PASS") -> list[str]:
    """One build with a record per text; returns what each made."""
    uris = []
    for number, text in enumerate(texts, len(toy.store.list_json("builds"))):
        toy.tree["toy"]["text"] = text
        uris.append(toy.run().uri)
        record = {"verdict": verdict, "stages": [{"stage": "make", "uri": uris[-1]}]}
        toy.store.write_json(f"builds/toy/20260101-{number:06}-1", record)
    return uris


def test_gc_keeps_the_last_builds_and_shows_before_it_deletes(toy: Toy) -> None:
    uris = builds(toy, "one", "two", "three")
    shown = gc(toy.store, keep=2)
    assert [one.uri for one in shown.garbage] == uris[:1] and toy.store.load(uris[0])


def test_gc_counts_good_builds_not_failed_ones_nor_the_same_again(toy: Toy) -> None:
    good = builds(toy, "one", "two", "two", "two")
    failed = builds(toy, "bad", "worse", verdict="FAIL")
    gone = {one.uri for one in gc(toy.store, keep=2).garbage}
    assert gone == {failed[0]} and good[0] not in gone  # the newest failure is what the next attempt goes on from


def test_gc_deletes_what_it_showed(toy: Toy) -> None:
    builds(toy, "one", "two", "three")
    assert gc(toy.store, keep=2, dry_run=False).num_kept == 2 and usage(toy.store)["make"][0] == 2


def test_gc_spares_what_is_live(toy: Toy) -> None:
    uris = builds(toy, "one", "two", "three")
    toy.store.write_json("deployments/toy", {"slots": {"blue": {"bundle": uris[0]}}})
    assert gc(toy.store, keep=1).garbage[0].uri == uris[1]


def test_gc_spares_what_is_leased(toy: Toy) -> None:
    builds(toy, "one", "two")
    key = toy.store.load(builds(toy, "one", "two")[0]).key
    with toy.store.lease(f"make-{key[:16]}"):
        assert gc(toy.store, keep=1).garbage == ()


def test_gc_spares_the_inputs_of_a_build_under_way(toy: Toy) -> None:
    builds(toy, "one", "two", "three")
    with toy.store.lease("join-0123456789abcdef"):
        assert gc(toy.store, keep=1).garbage == ()


def test_copied_builds_are_still_good_builds_to_gc(toy: Toy, tmp_path: Path) -> None:
    builds(toy, "one", "two", "three")
    other = LocalStore(tmp_path / "other")
    copy(toy.store, other)
    shown = gc(other, keep=2)
    assert [one.manifest.components["spec.toy.text"] for one in shown.garbage] == ['"one"'] and shown.num_kept == 2
    assert other.read_json("builds/toy/20260101-000002-1")["stages"][0]["uri"].startswith(other.uri)


def test_damaged_artifact_is_not_copied(toy: Toy, tmp_path: Path) -> None:
    toy.run()
    path = folder_of(toy) / "a.txt"
    status = path.stat()
    path.write_text("x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    other = LocalStore(tmp_path / "other")
    with pytest.raises(IntegrityError, match="a.txt: content changed"):
        copy(toy.store, other)
    assert list(other.entries()) == []


def test_copied_artifact_is_a_hit_in_the_other_store(toy: Toy, tmp_path: Path) -> None:
    toy.run()
    other = LocalStore(tmp_path / "other")
    assert len(copy(toy.store, other)) == 1
    toy.store = other
    assert toy.run().state == "cached" and plan(toy.view, other, toy.registry, toy.root).rows[0].state == "cached"
