"""A stage that starts from an earlier artifact of its own: what it is given, and which builds stay hits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from specs.errors import InputError, StoreError
from specs.receipts import Receipt
from tasks.plan import plan
from tasks.provenance import verify
from tests.tasks.toy import Toy

SOURCE = """
def make(job, progress):
    before = job.inputs.get("start")
    text = (before / "a.txt").read_text() if before else ""
    (job.out / "a.txt").write_text(text + job.spec["toy"]["text"])
    return {}
"""


@pytest.fixture
def chain(toy: Toy) -> Toy:
    toy.module.write_text(SOURCE)
    toy.registry = {"make": replace(toy.registry["make"], starts_from="toy.warm_start")}
    toy.tree["toy"] = {"text": "a", "warm_start": "last_good"}
    return toy


def good(receipt: Receipt, build: str = "b1") -> dict[str, Any]:
    return {"build": build, "stages": [{"stage": "make", "key": receipt.key, "uri": receipt.uri}]}


def text(toy: Toy, receipt: Receipt) -> str:
    return (toy.store.path(receipt) / "a.txt").read_text()


def test_the_first_build_starts_from_nothing(chain: Toy) -> None:
    assert text(chain, chain.run()) == "a"


def test_a_changed_build_goes_on_from_the_last_good_one(chain: Toy) -> None:
    first = chain.run()
    chain.tree["toy"]["text"] = "b"
    second = chain.run(last_good=good(first))
    assert (second.state, text(chain, second)) == ("built", "ab")
    assert chain.store.load(second.uri).inputs["start"] == first.uri


def test_an_unchanged_build_is_a_hit_however_often_it_was_promoted(chain: Toy) -> None:
    first = chain.run()
    assert chain.run(last_good=good(first)).state == "cached"
    chain.tree["toy"]["text"] = "b"
    second = chain.run(last_good=good(first))
    assert chain.run(last_good=good(second, "b2")).state == "cached"
    chain.store.write_json("last_good/toy", good(second, "b2"))
    assert plan(chain.view, chain.store, chain.registry, chain.root).all_cached


def test_a_refused_build_is_nobodys_start(chain: Toy) -> None:
    first = chain.run()
    for tried in ("b", "c"):
        chain.tree["toy"]["text"] = tried
        assert text(chain, chain.run(last_good=good(first))) == f"a{tried}"


def test_the_reason_names_the_start(chain: Toy) -> None:
    first = chain.run()
    chain.tree["toy"]["text"] = "b"
    reason = chain.run(last_good=good(first)).reason
    assert "toy.text a -> b" in reason and f"start changed (none -> {first.digest[:8]})" in reason


def test_a_named_artifact_is_a_start(chain: Toy) -> None:
    first = chain.run()
    chain.tree["toy"] = {"text": "b", "warm_start": f"make/{first.key[:12]}"}
    assert text(chain, chain.run()) == "ab"


def test_a_start_that_is_not_there_is_named(chain: Toy) -> None:
    chain.tree["toy"]["warm_start"] = "make/0123456789ab"
    with pytest.raises(StoreError, match="make/0123456789ab"):
        chain.run()


def test_an_artifact_of_another_stage_is_no_start(chain: Toy) -> None:
    first = chain.run()
    chain.registry["make"] = replace(chain.registry["make"], name="other")
    chain.registry["other"] = chain.registry["make"]
    chain.tree["toy"]["warm_start"] = first.uri
    with pytest.raises(InputError, match="an artifact of make"):
        chain.run("other")


def test_lineage_reaches_through_the_start(chain: Toy) -> None:
    first = chain.run()
    chain.tree["toy"]["text"] = "b"
    second = chain.run(last_good=good(first))
    (chain.store.path(first) / "a.txt").chmod(0o644)
    (chain.store.path(first) / "a.txt").write_text("other")
    assert any(first.uri in line for line in verify(chain.store, second.uri, deep=True).wrong)
