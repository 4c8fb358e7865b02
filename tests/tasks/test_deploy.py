"""Deploy, promote, roll back and drain with real processes and the toy engine, under load where it matters.

Run it: `python -m pytest tests/tasks/test_deploy.py`
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from specs.errors import GateFailed, InputError, IntegrityError, KilotokError, StageFailed
from tasks import deployment, promote
from tasks.deployment.record import Record
from tasks.edges import service
from tasks.store import open_store
from tests.tasks.deploy_driver import NAME, deploy_job, run_deploy, run_promote

ROOT = Path(__file__).resolve().parents[2]


class Bench:
    """A store, a public port, and toy bundles whose answers tell them apart."""

    backend = "native"
    num_processes = 2  # keeper and server

    def __init__(self, folder: Path) -> None:
        self.root = folder / "store"
        self.root.mkdir()
        self.store = open_store(self.root)
        self.port = service.free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{self.port}"

    def bundle(self, name: str, **toy: Any) -> Path:
        folder = self.root.parent / f"bundle-{name}"
        folder.mkdir(exist_ok=True)
        (folder / "toy.json").write_text(json.dumps({"text": f"I am {name}, at your service.", "step_s": 0.002, **toy}))
        (folder / "bundle.json").write_text(json.dumps({"name": name}))
        return folder

    def job(self, text: str, toy: dict[str, Any] | None = None, **settings: Any) -> Any:
        return deploy_job(self.root, self.bundle(text, **(toy or {})), self.port, self.backend, **settings)

    def up(self, text: str, **settings: Any) -> Any:
        """Deploy and promote."""
        job = self.job(text, **settings)
        run_deploy(job)
        run_promote(job)
        return job

    def says(self) -> str:
        return ask(self.url)

    def status(self) -> dict[str, Any]:
        found = deployment.status(self.store, NAME)
        assert found is not None
        return found

    def record(self) -> Record:
        return Record(self.root, NAME).load()

    def pids(self) -> set[int]:
        """Every process that has this store on its command line."""
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    if os.fsencode(self.root) in (entry / "cmdline").read_bytes() and service.identity(int(entry.name)):
                        found.add(int(entry.name))
                except OSError:
                    continue
        return found


def ask(url: str, **options: Any) -> str:
    body = {"model": NAME, "messages": [{"role": "user", "content": "who?"}], "temperature": 0, "max_tokens": 100}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20, **options)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"]).split(",")[0].removeprefix("I am ")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    if Record(made.root, NAME).exists:
        deployment.drain(made.store, NAME)
    assert not made.pids(), "processes were left behind"


class Load:
    """Clients that ask without pause: over kept-alive connections, over new ones, and streaming."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []
        self.refused: list[float] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=target) for target in (self._kept, self._new, self._stream, self._kept)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, text: str, count: int = 5) -> None:
        deadline = time.monotonic() + 20
        start = self.answers[text]
        while self.answers[text] < start + count:
            assert time.monotonic() < deadline, (text, self.answers, self.failures[:3])
            time.sleep(0.01)

    def _loop(self, client: httpx.Client | None, stream: bool) -> None:
        body = {"model": NAME, "prompt": "who?", "temperature": 0, "max_tokens": 100, "stream": stream}
        while not self._stop.is_set():
            try:
                post = client.post if client else httpx.post
                answer = post(f"{self.url}/v1/completions", json=body, timeout=30)
                self._count(answer, stream)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")

    def _count(self, answer: httpx.Response, stream: bool) -> None:
        if answer.status_code == 503 and answer.headers.get("retry-after"):
            self.refused.append(time.monotonic())
            time.sleep(0.02)
            return
        if answer.status_code != 200 or (stream and not answer.text.endswith("data: [DONE]\n\n")):
            self.failures.append(f"{answer.status_code}: {answer.text[:100]}")
            return
        lines = (
            [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            if stream
            else [answer.json()]
        )
        text = "".join(line["choices"][0]["text"] for line in lines)
        assert text.endswith("service."), text
        self.answers[text.split(",")[0].removeprefix("I am ")] += 1

    def _kept(self) -> None:
        with httpx.Client() as client:
            self._loop(client, stream=False)

    def _new(self) -> None:
        self._loop(None, stream=False)

    def _stream(self) -> None:
        with httpx.Client() as client:
            self._loop(client, stream=True)


def test_candidate_runs_beside_the_live_one_and_promotion_flips(bench: Bench) -> None:
    bench.up("one")
    assert bench.says() == "one"
    second = bench.job("two")
    artifact = run_deploy(second)
    started = json.loads((artifact / "deployment.json").read_text())["started"]
    assert (bench.says(), ask(started["base_url"])) == ("one", "two")
    assert started["smoke"]["acceptance_length"] > 2
    run_promote(second)
    assert bench.says() == "two"
    found = bench.status()
    assert (found["state"], found["url"]) == ("live", bench.url)
    assert deployment.live_url(bench.store, NAME) == bench.url
    assert sum(slot["up"] for slot in found["slots"].values()) == 1


def test_no_request_is_lost_in_promotions_and_a_rollback(bench: Bench) -> None:
    bench.up("one")
    with Load(bench.url) as load:
        load.wait_for("one")
        for text in ("two", "three"):
            bench.up(text)
            load.wait_for(text)
        assert deployment.rollback(bench.store, NAME) == bench.url
        load.wait_for("two")
        answers_before = load.answers["three"]
        load.wait_for("two", 20)
        assert load.answers["three"] == answers_before, "the version that was rolled back still answers"
    assert load.failures == [] and load.refused == []
    assert min(load.answers[text] for text in ("one", "two", "three")) >= 5


def test_long_stream_survives_the_promotion_on_the_old_server(bench: Bench) -> None:
    bench.up("one", toy={"step_s": 0.01})
    body = {"model": NAME, "prompt": "who?", "temperature": 0, "max_tokens": 1500, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{bench.url}/v1/completions", json=body, timeout=20) as stream:
        lines = stream.iter_lines()
        next(lines)
        promotion = threading.Thread(target=bench.up, args=("two",))
        promotion.start()
        rest = "".join(lines)
    promotion.join()
    assert rest.endswith("data: [DONE]") and bench.says() == "two"


def test_drain_swap_refuses_politely_while_it_swaps_and_loses_nothing(bench: Bench) -> None:
    start_s = 1.0
    bench.up("one", strategy="drain_swap", toy={"start_s": start_s})
    with Load(bench.url) as load:
        load.wait_for("one")
        bench.up("two", strategy="drain_swap", toy={"start_s": start_s})
        load.wait_for("two")
    assert load.failures == []
    assert load.refused
    at = {event["what"]: event["at"] for event in bench.record().data["events"]}  # the last of each name
    start_time_s = at["start: smoke"] - at["start: spawn"]
    assert load.refused[-1] - load.refused[0] < start_time_s + 2.0


def test_drain_swap_brings_the_old_one_back_when_the_new_one_fails(bench: Bench) -> None:
    bench.up("one", strategy="drain_swap")
    with Load(bench.url) as load:
        load.wait_for("one")
        with pytest.raises(StageFailed, match="acceptance is exactly 1.0"):
            run_deploy(bench.job("two", strategy="drain_swap", toy={"accepted": [0]}))
        load.wait_for("one")
    assert load.failures == [] and load.answers["two"] == 0


def test_discard_after_a_failed_gate_brings_the_old_one_back(bench: Bench) -> None:
    bench.up("one", strategy="drain_swap")
    run_deploy(bench.job("two", strategy="drain_swap"))
    assert (bench.says(), bench.status()["state"]) == ("two", "trial")
    deployment.discard(bench.store, NAME)
    assert (bench.says(), bench.status()["state"]) == ("one", "live")


@pytest.mark.parametrize(
    ("toy", "match"),
    [
        ({"accepted": [0]}, "acceptance is exactly 1.0"),
        ({"text": "ab" * 40}, "gibberish"),
        ({"text": ""}, "gibberish"),
        ({"text": 1}, "ended while starting|smoke request failed"),
    ],
)
def test_bad_candidate_is_refused_and_the_old_one_serves(bench: Bench, toy: dict[str, Any], match: str) -> None:
    bench.up("one")
    with pytest.raises(StageFailed, match=match) as caught:
        run_deploy(bench.job("two", toy=toy))
    assert Path(str(caught.value.log_path)).exists()
    assert bench.says() == "one"
    assert sum(slot["up"] for slot in bench.status()["slots"].values()) == 1


def test_server_that_dies_in_start_up_is_named_with_its_last_words(bench: Bench) -> None:
    job = bench.job("one")
    (job.inputs["build_engine"] / "toy.json").write_text("{broken")
    with pytest.raises(StageFailed, match=r"ended while starting[\s\S]*JSONDecodeError"):
        run_deploy(job)


def test_health_that_never_turns_200(bench: Bench) -> None:
    with pytest.raises(StageFailed, match=r"not healthy after 0.5 s \(no answer\)"):
        run_deploy(bench.job("one", toy={"start_s": 30}, start_timeout_s=0.5))


def test_port_in_use_is_refused_before_anything_starts(bench: Bench) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", bench.port))
        other.listen()
        with pytest.raises(InputError, match=f"{bench.port}.*deploy.port"):
            run_deploy(bench.job("one"))
    assert not bench.pids()


def test_too_little_memory_for_blue_green_is_refused(bench: Bench) -> None:
    job = bench.job("one")
    with (job.inputs["build_engine"] / "weights.safetensors").open("wb") as huge:
        huge.truncate(1 << 42)
    with pytest.raises(InputError, match=r"4096.0 GiB .*drain_swap"):
        run_deploy(job)


def test_missing_and_unsigned_bundles_are_refused(bench: Bench) -> None:
    job = bench.job("one")
    with pytest.raises(IntegrityError, match="not signed"):
        run_deploy(bench.job("one", require_signature=True))
    (job.inputs["build_engine"] / "bundle.json").unlink()
    with pytest.raises(InputError, match="no bundle"):
        run_deploy(job)


def test_only_a_pass_is_promoted(bench: Bench) -> None:
    job = bench.job("one")
    run_deploy(job)
    for verdict in ("FAIL", "UNDERPOWERED"):
        with pytest.raises(GateFailed, match=verdict):
            run_promote(job, verdict=verdict)
    assert deployment.live_url(bench.store, NAME) is None


def test_candidate_that_breaks_under_its_first_public_requests_is_taken_back(bench: Bench) -> None:
    bench.up("one")
    job = bench.job("two")
    run_deploy(job)

    def break_it(step: str) -> None:
        if step == "promote:canary":
            os.kill(bench.record().slots["b"]["process"]["pid"], signal.SIGKILL)

    with Load(bench.url) as load:
        load.wait_for("one")
        with pytest.raises(StageFailed, match="smoke request failed"):
            run_promote(job, break_it)
        load.wait_for("one")
    assert (bench.says(), bench.status()["state"], bench.status()["operation"]) == ("one", "live", None)


def test_ensure_running_starts_what_was_stopped_and_finds_what_runs(bench: Bench) -> None:
    artifact = run_deploy(bench.job("one")) / "deployment.json"
    first = deployment.ensure_running(artifact)
    assert deployment.ensure_running(artifact) == first and ask(first) == "one"
    assert deployment.drain(bench.store, NAME) == 1
    again = deployment.ensure_running(artifact)
    assert ask(again) == "one" and deployment.live_url(bench.store, NAME) is None


def test_promotion_stays_true_until_something_changes(bench: Bench) -> None:
    job = bench.up("one")
    promoted = job.out.parent / f"promote-{job.out.name}"
    assert promote.alive(promoted) == promote.revive(promoted) == ""
    live = bench.record().slots["a"]["process"]
    os.kill(live["pid"], signal.SIGKILL)
    assert service.wait_gone(live, 5)
    assert bench.status()["state"] == "down"
    answer = httpx.get(f"{bench.url}/health")
    assert answer.status_code == 503 and answer.headers["retry-after"], "the keeper answers for the dead server"
    assert promote.revive(promoted) == "its server was started again" and bench.says() == "one"
    bench.up("two")
    assert (promote.alive(promoted), promote.revive(promoted)) == ("another version is live", "")
    deployment.drain(bench.store, NAME)
    assert bench.status()["state"] == "stopped"


def test_promotion_that_was_drained_is_brought_back(bench: Bench) -> None:
    job = bench.up("one")
    deployment.drain(bench.store, NAME)
    assert promote.revive(job.out.parent / f"promote-{job.out.name}") and bench.says() == "one"
    assert bench.status()["state"] == "live"


def test_keeper_that_was_killed_is_replaced_without_losing_the_port(bench: Bench) -> None:
    bench.up("one")
    keeper = bench.record().data["keepers"][str(bench.port)]["process"]["pid"]
    with Load(bench.url) as load:
        load.wait_for("one")
        os.kill(keeper, signal.SIGKILL)
        bench.up("two")
        load.wait_for("two")
    assert load.failures == []


def test_recycled_pid_is_not_trusted_and_not_killed(bench: Bench) -> None:
    job = bench.up("one")
    deployment.drain(bench.store, NAME)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as stranger:
        record = bench.record()
        record.slots["a"]["process"] = {**service.identity(stranger.pid).to_dict(), "start_ticks": 1}  # type: ignore[union-attr]
        record.save()
        assert bench.status()["state"] == "stopped"
        run_deploy(job)
        assert stranger.poll() is None
        stranger.kill()


def test_rollback_without_an_earlier_version_and_unknown_names(bench: Bench) -> None:
    bench.up("one")
    with pytest.raises(InputError, match="no earlier version"):
        deployment.rollback(bench.store, NAME)
    with pytest.raises(InputError, match="no deployment 'other'"):
        deployment.drain(bench.store, "other")
    assert deployment.status(bench.store, "other") is None


# kill -9 of the deployer at every step

START = ["before-spawn", "spawn", "spawned", "before-health", "health", "before-smoke", "smoke"]
SWAP = ["before-close", "close", *START, "before-open", "open"]
PROMOTE = [
    f"{when}{step}" for step in ("listen", "accept", "flip", "release", "canary", "drain") for when in ("before-", "")
]
STEPS = [*(f"start:{step}" for step in START), *(f"promote:{step}" for step in PROMOTE), "before-end"]
SWAP_STEPS = [*(f"start:{step}" for step in SWAP), *(f"promote:{step}" for step in PROMOTE)]


def drive(bench: Bench, action: str, text: str, strategy: str, die_at: str = "") -> subprocess.CompletedProcess[str]:
    argv = [
        sys.executable,
        "-m",
        "tests.tasks.deploy_driver",
        action,
        str(bench.root),
        str(bench.bundle(text)),
        str(bench.port),
    ]
    return subprocess.run(
        [*argv, "--strategy", strategy, "--backend", bench.backend, "--die-at", die_at],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_list_of_steps_is_complete(bench: Bench) -> None:
    bench.up("one")
    seen = drive(bench, "both", "two", "blue_green").stdout.split()
    assert set(seen) == set(STEPS)
    seen = drive(bench, "both", "three", "drain_swap").stdout.split()
    assert set(seen) == {*SWAP_STEPS, "before-end"}


def kill_at_each(bench: Bench, load: Load, strategy: str, steps: list[str]) -> None:
    """For each step: a deployer dies there, the next one finishes; one server, one keeper, and no request lost."""
    bench.up("v0", strategy=strategy)
    for number, step in enumerate(steps, 1):
        old, new = f"v{number - 1}", f"v{number}"
        assert drive(bench, "both", new, strategy, step).returncode == -signal.SIGKILL, step
        if strategy == "blue_green":
            assert bench.says() in (old, new), step
        done = drive(bench, "both", new, strategy)
        assert done.returncode == 0, (step, done.stderr)
        assert bench.says() == new, step
        assert load.failures == [], step
        found = bench.status()
        assert (found["state"], found["operation"], len(bench.pids())) == ("live", None, bench.num_processes), step


@pytest.mark.e2e
def test_deployer_killed_at_any_step_of_blue_green_never_costs_a_request(bench: Bench) -> None:
    bench.up("first")
    with Load(bench.url) as load:
        load.wait_for("first", 2)
        kill_at_each(bench, load, "blue_green", STEPS)
    assert load.failures == [] and load.refused == []


@pytest.mark.e2e
def test_deployer_killed_at_any_step_of_drain_swap_loses_no_request(bench: Bench) -> None:
    bench.up("first", strategy="drain_swap")
    with Load(bench.url) as load:
        load.wait_for("first", 2)
        kill_at_each(
            bench, load, "drain_swap", [step for step in SWAP_STEPS if "before" not in step or "start" in step]
        )
    assert load.failures == []


@pytest.mark.parametrize("step", ["start:spawned", "promote:release"])
def test_rollback_killed_midway_is_finished_by_the_next_one_or_left_as_it_was(bench: Bench, step: str) -> None:
    bench.up("one")
    bench.up("two")
    assert drive(bench, "rollback", "two", "blue_green", step).returncode == -signal.SIGKILL
    assert bench.says() in ("one", "two")
    before = bench.status()["state"]
    assert before == "live" or before.startswith("interrupted")
    bench.up("three")
    assert bench.says() == "three" and bench.status()["operation"] is None


@pytest.mark.parametrize("step", ["drain:close", "drain:finish", "drain:keepers"])
def test_drain_killed_midway_is_finished_by_the_next_one(bench: Bench, step: str) -> None:
    bench.up("one")
    assert drive(bench, "drain", "one", "blue_green", step).returncode == -signal.SIGKILL
    deployment.drain(bench.store, NAME)
    assert not bench.pids() and bench.status()["state"] == "stopped"


def test_two_deployers_do_not_meet(bench: Bench) -> None:
    from tasks.deployment.record import locked

    errors: list[KilotokError] = []

    def second() -> None:
        try:
            with locked(bench.root, NAME, wait_s=0.2):
                pass
        except KilotokError as error:
            errors.append(error)

    with locked(bench.root, NAME):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "another deployer" in str(errors[0])
