"""The parts of a night, one fact each, on a real store and a copy of the tiny spec; the whole: test_twenty_nights.py.

Run it: `python -m pytest tests/tasks/nightly/test_night.py`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from specs.errors import InputError, SpecError
from specs.load import load_spec
from tasks.nightly import drift, judge, notify, refresh
from tasks.nightly.check import check, spec_files
from tasks.nightly.history import FILE, history, series, sparkline
from tasks.nightly.night import opened, recover
from tasks.store import LocalStore

ROOT = Path(__file__).resolve().parents[3]
TINY = "tiny-llama4-cpu"


def quiet(_text: str) -> None:
    return None


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A folder with the tiny spec, its lock and its model: a repository's root."""
    (tmp_path / "specs/locks").mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    shutil.copyfile(ROOT / f"specs/{TINY}.yaml", tmp_path / f"specs/{TINY}.yaml")
    shutil.copyfile(ROOT / f"specs/locks/{TINY}.yaml", tmp_path / f"specs/locks/{TINY}.yaml")
    shutil.copytree(ROOT / "specs/models/tiny-llama4", tmp_path / "specs/models/tiny-llama4")
    return tmp_path


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def spec_of(house: Path, **nightly: Any):
    overrides = [f"nightly.{name}={value}" for name, value in nightly.items()]
    return load_spec(house / f"specs/{TINY}.yaml", overrides)


def last_night(store: LocalStore, name: str) -> dict[str, Any]:
    return dict(store.read_json(store.list_json(f"nights/{name}")[-1]) or {})


# -- the record -------------------------------------------------------------------------------------------------------
def test_a_spec_that_no_longer_parses_leaves_a_failed_night_with_line_and_key(house: Path, store: LocalStore) -> None:
    path = house / f"specs/{TINY}.yaml"
    path.write_text(path.read_text().replace("draft_tokens: 3", "draft_tokenz: 3"))
    with pytest.raises(SpecError), opened(str(path), store.uri, "20261201-020000-1", quiet):
        pass
    record = last_night(store, TINY)
    assert record["state"] == "failed" and "draft_tokenz" in record["summary"] and record["error"]["line"]


def test_the_night_after_a_broken_spec_is_an_ordinary_one(house: Path, store: LocalStore) -> None:
    test_a_spec_that_no_longer_parses_leaves_a_failed_night_with_line_and_key(house, store)
    shutil.copyfile(ROOT / f"specs/{TINY}.yaml", house / f"specs/{TINY}.yaml")
    with opened(str(house / f"specs/{TINY}.yaml"), store.uri, "20261202-020000-1", quiet) as tonight:
        tonight.look()
        tonight.built({"stages": [], "build": tonight.id, "verdict": "PASS"})
    assert last_night(store, TINY)["state"] == "unchanged"


def test_whatever_ends_a_night_is_in_its_record_and_still_raised(house: Path, store: LocalStore) -> None:
    path = str(house / f"specs/{TINY}.yaml")
    for number, (error, state) in enumerate([(ValueError("bug"), "failed"), (KeyboardInterrupt(), "cancelled")]):
        with pytest.raises(type(error)), opened(path, store.uri, f"2026120{number}-020000-1", quiet):
            raise error
        assert last_night(store, TINY)["state"] == state


def test_a_night_that_nobody_holds_was_interrupted(store: LocalStore) -> None:
    store.write_json("nights/x/20261201", {"state": "running", "night": "20261201", "host": "a"})
    assert recover(store, "x") == ["20261201"]
    assert last_night(store, "x")["state"] == "interrupted" and recover(store, "x") == []


def test_two_nights_of_one_spec_do_not_overlap(house: Path, store: LocalStore) -> None:
    path, order, waiting = str(house / f"specs/{TINY}.yaml"), [], threading.Event()

    def wait(text: str) -> None:
        order.append(text)
        waiting.set()

    def second() -> None:
        with opened(path, store.uri, "20261202-020000-1", wait):
            order.append("second")

    thread = threading.Thread(target=second)
    with opened(path, store.uri, "20261201-020000-1", quiet):
        thread.start()
        assert waiting.wait(30)
        order.append("first")
    thread.join(20)
    assert order[0].startswith("waiting for pid") and order[1:] == ["first", "second"]
    assert [store.read_json(name)["state"] for name in store.list_json("nights")] == ["failed", "failed"]


def test_a_clock_that_was_set_back_does_not_reorder_the_nights(house: Path, store: LocalStore) -> None:
    """The first night believed it was next century; those after it, by the right clock, must still come after it."""
    path, order = str(house / f"specs/{TINY}.yaml"), ["21260101-020000-1"]
    for night in (order[0], "", ""):
        with opened(path, store.uri, night, quiet) as tonight:
            tonight.built({"stages": [], "build": tonight.id, "verdict": "PASS"})
        assert last_night(store, TINY)["night"] == tonight.id and tonight.record["seconds"] >= 0
        order.append(tonight.id)
    assert order[1:] == sorted(set(order))


def test_one_cause_is_told_once_however_many_gates_it_fails() -> None:
    gates = [{"alarm": True, "text": f"gate {n}: too low", "why": "spec: draft_tokens 3 -> 1"} for n in (1, 2, 3)]
    record = {"state": "kept", "plan": [], "findings": gates, "drift": {}, "unmeasured": ""}
    assert judge.summary(record).endswith("; gate 1: too low and 2 figures more (spec: draft_tokens 3 -> 1)")


def test_a_night_that_could_not_measure_says_so(house: Path, store: LocalStore) -> None:
    with opened(str(house / f"specs/{TINY}.yaml"), store.uri, "20261201-020000-1", quiet) as tonight:
        tonight.built({"stages": [], "build": tonight.id, "verdict": "PASS"})
        assert tonight.measure() == 0
    assert last_night(store, TINY)["summary"].endswith("what is live was not measured: nothing is live")


# -- drift ------------------------------------------------------------------------------------------------------------
def test_an_untouched_source_has_not_moved(house: Path, store: LocalStore) -> None:
    assert drift.lock_drift(spec_of(house), store)["state"] == "same"


def test_a_moved_source_is_proposed_as_a_patch_and_not_taken(house: Path, store: LocalStore) -> None:
    lock = house / f"specs/locks/{TINY}.yaml"
    before = lock.read_text()
    card = house / "specs/models/tiny-llama4/config.json"
    card.write_text(card.read_text() + "\n")
    found = drift.lock_drift(spec_of(house), store)
    assert (found["state"], found["what"]) == ("moved", ["config.json changed"])
    assert lock.read_text() == before
    subprocess.run(["git", "init", "-q"], cwd=house, check=True)
    subprocess.run(["git", "apply"], cwd=house, input=found["proposal"], text=True, check=True)
    assert lock.read_text() != before and drift.lock_drift(spec_of(house), store)["state"] == "same"


def test_a_hub_that_does_not_answer_is_no_reason_to_stop(
    house: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    path = house / f"specs/{TINY}.yaml"
    path.write_text(path.read_text().replace("file:specs/models/tiny-llama4\n", "hf://org/name\n", 1))
    found = drift.lock_drift(spec_of(house), store)
    assert found["state"] == "unknown" and "did not answer" in found["what"][0]


# -- refresh ----------------------------------------------------------------------------------------------------------
def drop(store: LocalStore, night: str) -> None:
    finding = {"kind": "step", "metric": "acceptance.length", "worse": True, "since": night, "alarm": True}
    store.write_json(f"nights/{TINY}/{night}", {"state": "unchanged", "findings": [finding]})


def test_the_default_policy_never_trains_anew(house: Path, store: LocalStore) -> None:
    drop(store, "20261201-020000-1")
    assert refresh.tonight(spec_of(house), store, "20261202-020000-1")["seed"] is None


def test_always_is_another_seed_every_night(house: Path, store: LocalStore) -> None:
    spec = spec_of(house, refresh_draft="always")
    assert [refresh.tonight(spec, store, f"2026120{n}-020000-1")["seed"] for n in (1, 2)] == [20261201, 20261202]


def test_drift_answers_a_drop_once_and_keeps_the_seed_that_passed(house: Path, store: LocalStore) -> None:
    spec = spec_of(house, refresh_draft="drift")
    assert refresh.tonight(spec, store, "20261201-020000-1")["seed"] is None
    drop(store, "20261201-020000-1")
    asked = refresh.tonight(spec, store, "20261202-020000-1")
    assert asked["seed"] == 20261202 and asked["why"]
    refresh.settle(spec, store, asked, passed=True)
    assert refresh.tonight(spec, store, "20261203-020000-1") == {**asked, "why": "", "answers": None}


def test_a_refreshed_draft_that_fails_its_gates_is_forgotten(house: Path, store: LocalStore) -> None:
    spec = spec_of(house, refresh_draft="drift")
    drop(store, "20261201-020000-1")
    refresh.settle(spec, store, refresh.tonight(spec, store, "20261202-020000-1"), passed=False)
    assert refresh.tonight(spec, store, "20261203-020000-1")["seed"] is None


# -- history ----------------------------------------------------------------------------------------------------------
def build(store: LocalStore, night: str, speed: float, state: str = "built") -> None:
    stages = [{"stage": "validate", "state": state, "uri": "", "key": "k"}]
    metrics = {"latency.tps_per_user.p50": speed}
    record = {
        "build": night,
        "spec": "x",
        "started": night,
        "seconds": 1,
        "verdict": "PASS",
        "gates": [],
        "error": None,
    }
    store.write_json(f"builds/x/{night}", {**record, "stages": stages, "metrics": metrics})


def test_only_fresh_measurements_are_points(store: LocalStore) -> None:
    build(store, "20261201", 100.0)
    build(store, "20261202", 100.0, state="cached")  # the same figure again says nothing new
    with history(store) as table:
        assert [point.night for point in series(table, "x", "latency.tps_per_user.p50", "build")] == ["20261201"]


def test_the_table_follows_the_store_and_can_be_lost(store: LocalStore) -> None:
    for number in (1, 2, 3):
        build(store, f"2026120{number}", 100.0 + number)
        with history(store) as table:
            assert len(series(table, "x", "latency.tps_per_user.p50", "build")) == number
    (store.root / FILE).unlink()
    with history(store) as table:
        assert [point.value for point in series(table, "x", "latency.tps_per_user.p50", "build")] == [101, 102, 103]


def test_a_sparkline_has_gaps_where_nothing_was_measured() -> None:
    assert sparkline([1.0, None, 2.0]) == "▁ █"


# -- check ------------------------------------------------------------------------------------------------------------
def test_a_sound_spec_is_ok_and_says_what_a_night_would_build(house: Path, store: LocalStore) -> None:
    result = check(house / f"specs/{TINY}.yaml", store)
    assert result.wrong == [] and "would build download" in result.notes[0]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("draft_tokens: 3", "draft_tokenz: 3", "draft_tokens"),
        ("name: tiny-llama4-cpu", "name: other", "give both the same name"),
        ('files: ["*.json", "*.safetensors", "*.jinja"]', 'files: ["*.json", "*.safetensors"]', "kilotok lock"),
    ],
)
def test_what_would_be_refused_at_night_is_refused_before_the_merge(
    house: Path, store: LocalStore, old: str, new: str, words: str
) -> None:
    path = house / f"specs/{TINY}.yaml"
    path.write_text(path.read_text().replace(old, new))
    wrong = " ".join(check(path, store).wrong)
    assert words in wrong


def test_an_option_that_tensorrt_llm_does_not_know_is_refused(store: LocalStore, tmp_path: Path) -> None:
    spec = tmp_path / "llama4-maverick-b200.yaml"
    text = (ROOT / "specs/llama4-maverick-b200.yaml").read_text()
    spec.write_text(text.replace("enable_min_latency: true", "enable_min_latencyy: true"))
    assert "enable_min_latencyy" in " ".join(check(spec, store, locked=False).wrong)


def test_a_gate_that_the_last_good_build_would_fail_is_noted(house: Path, store: LocalStore) -> None:
    good = {"build": "1", "stages": [], "metrics": {"latency.tps_per_user.p50": 10.0}}
    store.write_json(f"last_good/{TINY}", good)
    assert any(
        "last good build would fail: latency" in note for note in check(house / f"specs/{TINY}.yaml", store).notes
    )


def test_a_gate_below_the_floor_of_physics_is_refused(store: LocalStore, tmp_path: Path) -> None:
    spec = tmp_path / "llama4-maverick-b200.yaml"
    text = (ROOT / "specs/llama4-maverick-b200.yaml").read_text()
    spec.write_text(text.replace("at_least: 1000}", "at_least: 9000}"))
    assert "below the floor: impossible" in " ".join(check(spec, store, locked=False).wrong)


def test_a_folder_that_is_not_there_is_an_input_error() -> None:
    with pytest.raises(InputError):
        spec_files([Path("no/such/folder")])


# -- telling ----------------------------------------------------------------------------------------------------------
class Webhook:
    """A commit-status API of one answer."""

    def __init__(self, status: int = 201) -> None:
        self.heard: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        heard = self.heard

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                heard.append((self.path, dict(self.headers), body))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_arguments: Any) -> None:
                return None

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/repos/o/r/statuses/{{commit}}"


RECORD = {"git": {"commit": "abc123"}, "state": "kept", "summary": "s" * 300, "findings": []}


def test_the_commit_is_told_in_githubs_form(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATUS_TOKEN", "a-secret-value")
    hook = Webhook()
    spec = spec_of(house, commit_status=hook.url, token="${env:STATUS_TOKEN}")
    assert notify.commit_status(spec, RECORD)
    ((path, headers, body),) = hook.heard
    assert path.endswith("/statuses/abc123") and headers["Authorization"] == "Bearer a-secret-value"
    assert body["state"] == "failure" and body["context"] == f"kilotok/{TINY}" and len(body["description"]) == 140


def test_a_silent_webhook_is_a_warning_without_the_token(
    house: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("STATUS_TOKEN", "a-secret-value")
    spec = spec_of(house, commit_status=Webhook(500).url, token="${env:STATUS_TOKEN}")
    assert not notify.commit_status(spec, RECORD)
    assert "was not told" in caplog.text and "a-secret-value" not in caplog.text


def test_a_spec_that_asks_for_no_status_tells_nobody(house: Path) -> None:
    assert not notify.commit_status(spec_of(house), RECORD)


@pytest.mark.parametrize(("error", "told"), [(ValueError("bug"), ["failed"]), (KeyboardInterrupt(), [])])
def test_a_failed_night_is_published_and_a_cancelled_one_is_not(
    house: Path, store: LocalStore, error: BaseException, told: list[str]
) -> None:
    heard: list[str] = []
    path = str(house / f"specs/{TINY}.yaml")
    with (
        pytest.raises(type(error)),
        opened(path, store.uri, "20261201-020000-1", quiet, lambda night: heard.append(night.record["state"])),
    ):
        raise error
    assert heard == told
