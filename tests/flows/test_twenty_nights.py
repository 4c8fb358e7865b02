"""Twenty nights of a toy pipeline through the real flow on a real Prefect server, with faults put in on known nights.

What it hunts: a fault that is promoted, an alarm on a quiet night, a cause that is not the input that was changed, a
night without a clear state, and a night after it that does not recover. The test drives the clock: it names each night.
Takes about three minutes. Run it: `python -m pytest -m e2e tests/flows/test_twenty_nights.py`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.local_server import prefect_server
from tests.flows.toy.repository import Repository, night_id
from tests.tasks.nightly.recorded import factors

pytestmark = pytest.mark.e2e
NOISE = 0.005  # of one night, as a node has that nobody shares; the shape is recorded, see recorded.py
CYCLE = "CYCLE_US = 400.0"
QUIET = [*range(2, 9), 10, 12, 14, 16]


class Story:
    """The repository after its twenty nights, and what each of them said."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.nights: dict[int, dict[str, Any]] = {}

    def night(self, number: int, **env: str) -> None:
        self.nights[number] = self.repository.night(number, **env)

    def fault(self, number: int, file: str, old: str, new: str, lock: bool = False) -> None:
        """One night with an edit, and the next one with the edit taken back."""
        self.repository.edit(file, old, new)
        if lock:
            self.repository.lock()
        self.repository.commit(f"fault of night {number}")
        self.night(number)
        self.repository.git("revert", "--no-edit", "HEAD")
        self.night(number + 1)

    def killed(self, number: int) -> None:
        """A real change whose night is killed in the middle of a stage, while the next one already waits for it."""
        self.repository.edit("specs/toy.yaml", "{epochs: 4}", "{epochs: 5}")
        self.repository.commit("train longer")
        logs = self.repository.store / "logs"
        known = set(logs.glob("train_draft-*.json"))
        process = self.repository.start(number, TOY_HANG=str(self.repository.spec))  # a file that is there
        wait_for(lambda: set(logs.glob("train_draft-*.json")) != known, "the night did not reach its stage")
        following = self.repository.start(number + 1, PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL="INFO")
        wait_for(lambda: "waiting for pid" in self.log(number + 1), "the next night does not wait")
        self.nights[number] = self.repository.record(number)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        following.wait(300)
        self.nights[number + 1] = self.repository.record(number + 1)

    def log(self, number: int) -> str:
        return (self.repository.path.parent / f"night-{number:02d}.log").read_text()

    def alarms(self, number: int) -> list[dict[str, Any]]:
        return [finding for finding in self.nights[number]["findings"] if finding["alarm"]]


def wait_for(what: Callable[[], bool], failure: str) -> None:
    deadline = time.monotonic() + 200
    while not what():
        assert time.monotonic() < deadline, failure
        time.sleep(0.1)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory):
    base = tmp_path_factory.mktemp("nights")
    with prefect_server(base / "prefect", print) as url:
        os.environ["PREFECT_API_URL"] = url
        try:
            told = Story(Repository(base / "repository", factors(32, seed=4, size=NOISE)))
            tell(told)
        finally:
            del os.environ["PREFECT_API_URL"]
        yield told


def tell(story: Story) -> None:
    """The twenty nights."""
    for number in range(1, 9):
        story.night(number)
    story.fault(9, "tasks/build_engine.py", CYCLE, "CYCLE_US = 520.0")
    story.fault(11, "specs/toy.yaml", "{epochs: 4}", "{epochs: 1}")
    story.fault(13, "model/tokenizer.json", "hello", "hallo", lock=True)
    records = story.repository.store / "records"
    records.rename(records.with_name("away"))
    records.write_text("a full or broken disk: no folder any more")
    story.night(15)
    records.unlink()
    records.with_name("away").rename(records)
    story.night(16)
    story.killed(17)
    story.repository.edit("tasks/build_engine.py", CYCLE, "CYCLE_US = 420.0")
    story.repository.commit("five percent slower: too little for the gate")
    story.night(19)
    story.night(20)


def test_the_first_night_builds_and_promotes(story: Story) -> None:
    assert story.nights[1]["state"] == "promoted"


@pytest.mark.parametrize("number", QUIET)
def test_a_quiet_night_changes_nothing_and_raises_no_alarm(story: Story, number: int) -> None:
    assert story.nights[number]["state"] == "unchanged" and story.alarms(number) == []


@pytest.mark.parametrize(
    ("number", "metric", "kind", "name"),
    [
        (9, "latency.tps_per_user.p50", "code", "code.tasks/build_engine.py"),
        (11, "acceptance.length", "spec", "spec.draft.training.epochs"),
        (13, "accuracy.difference", "lock", "lock.tokenizer.json"),
    ],
)
def test_a_fault_is_kept_out_and_named(story: Story, number: int, metric: str, kind: str, name: str) -> None:
    assert story.nights[number]["state"] == "kept"
    found = next(alarm for alarm in story.alarms(number) if alarm["metric"] == metric)
    assert (found["causes"][0]["kind"], found["causes"][0]["name"]) == (kind, name)


def test_nothing_bad_was_ever_live(story: Story) -> None:
    live = [(bundle["cycle"], bundle["draft"]["epochs"], bundle["tokenizer"]) for bundle in story.repository.promoted()]
    assert live == [(400.0, 4, '"hello world"'), (400.0, 5, '"hello world"'), (420.0, 5, '"hello world"')]


def test_a_night_without_a_store_fails_in_one_line_and_leaves_no_record(story: Story) -> None:
    assert story.nights[15] == {} and "the store cannot be written" in story.log(15)


def test_a_killed_night_is_closed_by_the_one_that_waited_for_it_which_builds_it(story: Story) -> None:
    assert story.nights[17]["state"] == "running"  # as the dead left it
    assert story.repository.record(17)["state"] == "interrupted"
    assert story.nights[18]["state"] == "promoted"


def test_a_small_step_passes_the_gate_and_is_told_the_second_night(story: Story) -> None:
    assert story.nights[19]["state"] == "promoted" and story.alarms(19) == []
    (alarm,) = story.alarms(20)
    assert (alarm["since"], alarm["kind"], alarm["source"]) == (night_id(19), "step", "live")
    true = (2.8 / 420) / (2.75 / 400) - 1  # night 18's longer draft gained back a part
    assert alarm["step"]["low"] < true < alarm["step"]["high"] < 0
    assert [cause["name"] for cause in alarm["causes"]] == ["code.tasks/build_engine.py"]


def test_the_history_names_the_culprit_again_by_bisection(story: Story) -> None:
    argv = [sys.executable, "-m", "flows.cli", "bisect", night_id(16), night_id(19), "--store"]
    done = subprocess.run(
        [*argv, str(story.repository.store)],
        cwd=story.repository.path, env=story.repository.environment(0), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("code: without it the bad side is good"), done.stdout + done.stderr


def test_the_page_is_one_offline_file_that_tells_the_story(story: Story) -> None:
    page = (story.repository.store / "pages" / "toy.html").read_text()
    assert "interrupted" in page and "build_engine.py changed" in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_the_history_is_made_again_from_the_store(story: Story) -> None:
    ask = [sys.executable, "-m", "flows.cli", "history", "toy", "--json", "--store", str(story.repository.store)]

    def table() -> dict[str, Any]:
        done = subprocess.run(
            ask, cwd=story.repository.path, env=story.repository.environment(0), capture_output=True, check=True
        )
        return json.loads(done.stdout)

    before = table()
    Path(before["table"]).unlink()
    assert table() == before and len(before["nights"]) == 19  # all but the one that had no store
