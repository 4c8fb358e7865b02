"""kill -9 at any moment, two runs at once, a disk that fills: nothing half, nothing lost, nothing done twice.

Refuses to mock a crash: each is a real process that really dies. Run: `pytest tests/tasks/test_runner_crash.py`.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from specs.errors import StoreError
from tasks.edges.process import is_alive
from tasks.store import LocalStore
from tasks.store.keys import CODE_ROOT
from tests.tasks.conftest import SmallDisk
from tests.tasks.toy import Toy

RUN = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from specs.errors import KilotokError
from tests.tasks.toy import Toy
toy = Toy(Path(sys.argv[1]), isolated=True)
toy.tree["toy"].update(act=sys.argv[2], text=sys.argv[3])
try:
    receipt = toy.run()
    print(json.dumps({"state": receipt.state, "reason": receipt.reason, "digest": receipt.digest}))
except KilotokError as error:
    print(json.dumps(error.to_dict()))
    sys.exit(error.exit_code)
"""


def start(
    toy: Toy, act: str = "", preexec: Callable[[], None] | None = None, text: str = "hello"
) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(toy.root), act, text]
    return subprocess.Popen(command, cwd=CODE_ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=preexec)


def result(process: subprocess.Popen[str]) -> dict[str, str]:
    return json.loads(process.communicate(timeout=60)[0])


def wait_for(check: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 30
    while not check():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.01)


def test_killed_anywhere_the_store_is_whole_and_the_next_run_ends_it(child_toy: Toy) -> None:
    seconds = random.Random(os.getpid())
    expected = result(start(child_toy))["digest"]
    for manifest in list(child_toy.store.entries()):
        child_toy.store.delete(manifest)
    for _ in range(10):
        process = start(child_toy)
        time.sleep(seconds.uniform(0.05, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert all(child_toy.store.verify(manifest) == [] for manifest in child_toy.store.entries())
    assert result(start(child_toy))["digest"] == expected


def test_child_dies_with_a_killed_run_and_frees_the_lease(child_toy: Toy) -> None:
    process = start(child_toy, "wait")
    wait_for(lambda: child_toy.num_calls == 1, "the child")
    child = int((child_toy.root / "calls.txt").read_text().split()[0])
    process.send_signal(signal.SIGKILL)
    wait_for(lambda: not is_alive(child), "the child's death")
    assert child_toy.store.leases() == []


def test_run_after_a_kill_finds_the_finished_parts(child_toy: Toy) -> None:
    process = start(child_toy, "wait")
    wait_for(lambda: child_toy.num_calls == 1, "the child")
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    (child_toy.root / "go").touch()
    result(start(child_toy, "wait"))
    assert (child_toy.root / "calls.txt").read_text().split()[1::2] == ["fresh", "resumed"]


def test_of_two_runs_one_builds_and_the_other_waits_and_uses_it(child_toy: Toy) -> None:
    first = start(child_toy, "wait")
    wait_for(lambda: child_toy.num_calls == 1, "the first run")
    second = start(child_toy, "wait")
    time.sleep(0.8)
    (child_toy.root / "go").touch()
    assert [result(first)["state"], result(second)["reason"]] == ["built", "built by another run"]
    assert child_toy.num_calls == 1


def test_two_different_specs_are_built_side_by_side(child_toy: Toy) -> None:
    runs = [start(child_toy, "wait", text=text) for text in ("one", "two")]
    wait_for(lambda: child_toy.num_calls == 2, "both to be at work")
    (child_toy.root / "go").touch()
    assert [result(run)["state"] for run in runs] == ["built", "built"]


def test_waiting_run_takes_over_from_a_killed_one(child_toy: Toy) -> None:
    first = start(child_toy, "wait")
    wait_for(lambda: child_toy.num_calls == 1, "the first run")
    second = start(child_toy, "wait")
    time.sleep(0.8)
    first.send_signal(signal.SIGKILL)
    (child_toy.root / "go").touch()
    assert result(second)["state"] == "built"


def test_interrupted_run_takes_its_child_along(child_toy: Toy) -> None:
    # A test run that a shell put in the background ignores SIGINT, and its children would inherit that.
    process = start(child_toy, "wait", lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    wait_for(lambda: child_toy.num_calls == 1, "the child")
    child = int((child_toy.root / "calls.txt").read_text().split()[0])
    process.send_signal(signal.SIGINT)
    process.wait(30)
    assert not is_alive(child)


@pytest.mark.parametrize("limit_bytes", [2000, 5500])
def test_disk_that_fills_is_one_clear_error_and_leaves_no_artifact(child_toy: Toy, limit_bytes: int) -> None:
    """Files may not grow past the limit: 2000 stops the stage, 5500 the longer manifest."""
    process = start(child_toy, "", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes)))
    error = result(process)
    assert process.returncode == 3 and error["what"] == "the store is not allowed files this large"
    assert list(child_toy.store.entries()) == [] and list((child_toy.store.root / "artifacts").glob("*/*")) == []


@pytest.mark.parametrize("room_bytes", range(0, 48 << 10, 8 << 10))  # before, in and after the stage
def test_disk_that_is_full_loses_nothing_and_is_enough_once_there_is_room(
    child_toy: Toy, small_disk: SmallDisk, room_bytes: int
) -> None:
    """A real file system, filled by somebody else; what was finished on it is still there, and so is the way on."""
    child_toy.store = LocalStore(small_disk.path / "store")
    before = child_toy.run()
    child_toy.tree["toy"]["text"] = "another"
    small_disk.leave(room_bytes)
    with pytest.raises(StoreError, match="the store is full"):
        child_toy.run()
    (whole,) = child_toy.store.entries()
    assert (whole.digest, child_toy.store.verify(whole)) == (before.digest, [])
    small_disk.free()
    assert child_toy.run().state == "built"


def test_read_only_store_is_one_clear_error(child_toy: Toy, small_disk: SmallDisk) -> None:
    """A file system, since root writes into any folder."""
    child_toy.store = LocalStore(small_disk.path)
    subprocess.run(["mount", "-o", "remount,ro", small_disk.path], check=True)
    with pytest.raises(StoreError, match="the store cannot be written"):
        child_toy.run()


def test_hit_in_a_read_only_store_needs_no_writing(child_toy: Toy, tmp_path: Path) -> None:
    child_toy.run()
    folders = [path for path in child_toy.store.root.rglob("*") if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert child_toy.run().state == "cached"
    finally:
        for folder in folders:
            folder.chmod(0o755)
