"""The runner: hits, misses with a reason, failures that leave nothing, the isolated child.

Refuses to test a real stage. Run: `pytest tests/tasks/test_runner.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from specs.errors import InputError, StageFailed, StoreError
from tests.tasks.toy import Toy


def test_first_run_builds_and_second_is_cached(toy: Toy) -> None:
    assert [toy.run().state, toy.run().state] == ["built", "cached"]


def test_first_build_says_so(toy: Toy) -> None:
    assert toy.run().reason == "first build"


def test_spec_change_names_the_field_and_both_values(toy: Toy) -> None:
    toy.run()
    toy.tree["toy"]["text"] = "other"
    assert toy.run().reason == "rebuild, toy.text hello -> other"


def test_edited_code_names_the_file(toy: Toy) -> None:
    toy.run()
    toy.module.write_text(toy.module.read_text().replace("b.txt", "c.txt"))
    assert toy.run().reason == "rebuild, toystages.py changed"


def test_comment_in_the_code_is_still_a_hit(toy: Toy) -> None:
    toy.run()
    toy.module.write_text("# a thought\n" + toy.module.read_text())
    assert toy.run().state == "cached"


def test_order_of_keys_in_the_spec_does_not_matter(toy: Toy) -> None:
    toy.run()
    toy.tree["toy"] = {"act": "", "text": "hello"}
    assert toy.run().state == "cached"


def test_rebuilt_but_identical_input_is_a_hit_downstream(toy: Toy) -> None:
    toy.run(), toy.run("join")
    toy.tree["toy"]["unused"] = 1
    assert toy.run().state == "built"
    assert toy.run("join").state == "cached"


def test_metrics_survive_the_cache(toy: Toy) -> None:
    toy.run()
    assert toy.run().metrics == {"toy.length": 5.0}


def test_damaged_artifact_is_rebuilt_with_the_reason(toy: Toy) -> None:
    toy.run()
    next(toy.store.root.glob("artifacts/make/*/sub/b.txt")).unlink()
    assert toy.run().reason == "rebuild, damaged: sub/b.txt is missing"


def test_failed_verdict_is_kept_but_measured_again(toy: Toy) -> None:
    toy.tree["toy"]["act"] = "fail verdict"
    first = toy.run()
    again = toy.run()
    assert again.state == "built" and again.reason == "measured again, the last verdict was not a pass"
    assert toy.store.load(first.uri).cacheable is False


def test_cached_artifact_that_is_no_longer_true_is_built_again(toy: Toy) -> None:
    toy.registry["make"] = replace(toy.registry["make"], alive="toystages:alive")
    toy.run()
    (toy.root / "gone").touch()
    assert toy.run().reason == "rebuild, the endpoint is gone"


def test_cached_artifact_is_brought_back_to_truth_and_stays_cached(toy: Toy) -> None:
    toy.registry["make"] = replace(toy.registry["make"], revive="toystages:revive")
    toy.run()
    assert (toy.run().state, toy.run().reason) == ("cached", "unchanged; started again")


def test_missing_receipt_is_the_callers_error(toy: Toy) -> None:
    with pytest.raises(InputError, match="receipts of make"):
        toy.run("join")


@pytest.mark.parametrize(
    "act, kind, words",
    [
        ("bad input", InputError, "no such prompts"),
        ("bug", StageFailed, "ZeroDivisionError"),
        ("die", StageFailed, "killed by SIGKILL .out of memory"),
        ("full", StoreError, "the store is full"),
    ],
)
def test_child_failure_is_told_in_its_own_words(child_toy: Toy, act: str, kind: type[Exception], words: str) -> None:
    child_toy.tree["toy"]["act"] = act
    with pytest.raises(kind, match=words):
        child_toy.run()


def test_failure_is_never_cached(child_toy: Toy) -> None:
    child_toy.tree["toy"]["act"] = "bug"
    for _ in range(2):
        with pytest.raises(StageFailed):
            child_toy.run()
    assert child_toy.num_calls == 2


def test_failed_stage_shows_its_log(child_toy: Toy) -> None:
    child_toy.tree["toy"]["act"] = "bug"
    with pytest.raises(StageFailed) as caught:
        child_toy.run()
    assert "about to divide" in caught.value.fix and caught.value.log_path


def test_second_attempt_finds_the_first_ones_parts(child_toy: Toy) -> None:
    child_toy.tree["toy"]["act"] = "bug"
    for _ in range(2):
        with pytest.raises(StageFailed):
            child_toy.run()
    assert (child_toy.root / "calls.txt").read_text().split()[1::2] == ["fresh", "resumed"]


def test_child_progress_reaches_the_report(child_toy: Toy) -> None:
    child_toy.run()
    assert (1.0, 2.0, "half") in [(event.done, event.total, event.text) for event in child_toy.events]
