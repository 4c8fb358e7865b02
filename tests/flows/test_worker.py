"""Deployments, schedules, cancellation, late runs and dead workers on a real Prefect server with a real process worker.

The repository is the toy one, pulled from Git by the worker as in production. It hunts for code that is not the pulled
commit, a node that stays taken, a state that is not true, a secret in anything that a run leaves.
Takes about six minutes. Run it: `python -m pytest -m e2e tests/flows/test_worker.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.flows.toy.house import House, kill, postgres, postgres_programs
from tests.flows.toy.repository import Repository

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
SECRETS = {"TOY_STATUS_TOKEN": "status-secret-91d3e7", "HF_TOKEN": "hub-secret-55aa01"}


def deployed(base: Path, database: str = "") -> House:
    """A repository, committed with its prefect.yaml, set up on a server."""
    repository = Repository(base / "repository", [[1.0, 1.0, 1.0]] * 2)
    repository.edit(
        "specs/toy.yaml",
        '0 2 * * *"',
        '0 2 * * *", commit_status: "http://127.0.0.1:9/{commit}", token: "${env:TOY_STATUS_TOKEN}"',
    )
    write_deployments(repository)
    repository.commit("deployments")
    house = House(base, repository, database, SECRETS)
    house.first_setup = house.setup()  # type: ignore[attr-defined]
    return house


def write_deployments(repository: Repository) -> None:
    env = {**os.environ, "PYTHONPATH": str(repository.path)}
    argv = [sys.executable, "infra/prefect/deployments.py", "--write"]
    subprocess.run(argv, cwd=repository.path, env=env, check=True)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory):
    made = deployed(tmp_path_factory.mktemp("house"))
    yield made
    made.close()


@pytest.fixture
def worker(house: House):
    process = house.worker()
    yield process
    kill(process)


def deployments(house: House) -> set[tuple[str, str]]:
    flows = {flow["id"]: flow["name"] for flow in house.api("/flows/filter", {})}
    return {(flows[entry["flow_id"]], entry["name"]) for entry in house.api("/deployments/filter", {})}


def test_setup_deploys_a_rebuild_and_a_nightly_per_spec(house: House) -> None:
    assert deployments(house) == {("rebuild", "toy"), ("nightly", "toy")}


def test_setup_again_changes_nothing(house: House) -> None:
    said = house.setup()
    assert said.startswith("deployed with") and said.count("\n") == 1


def test_prefect_deploy_by_hand_means_the_same(house: House) -> None:
    def deployment() -> dict[str, Any]:
        found = house.api("/deployments/name/nightly/toy")
        return {name: found[name] for name in ("pull_steps", "parameters", "job_variables")}

    before, env = deployment(), {**house.env, "PYTHONPATH": str(house.repository.path)}
    bare = {name: value for name, value in env.items() if not name.startswith("KILOTOK_")}
    argv = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    subprocess.run(argv, cwd=house.repository.path, env=bare, check=True, capture_output=True)
    assert deployment() == before and before["parameters"]["store"] == str(house.store)


def test_parameters_have_a_schema_and_are_refused_when_wrong(house: House) -> None:
    found = house.api("/deployments/name/nightly/toy")
    assert set(found["parameter_openapi_schema"]["properties"]) == {"spec", "store", "night"}
    done = house.prefect("deployment", "run", "nightly/toy", "--param", "specs=typo")
    assert done.returncode != 0


def test_watch_ends_well_and_the_commit_is_recorded(house: House, worker: Any) -> None:
    done = house.prefect("deployment", "run", "nightly/toy", "--param", "night=20261201-020000-1", "--watch")
    assert done.returncode == 0, done.stdout + (house.path / "worker.log").read_text()[-3000:]
    (night,) = house.nights()
    assert night["state"] == "promoted"
    assert night["git"] == {"commit": house.repository.git("rev-parse", "HEAD"), "dirty": False}


def test_the_next_run_is_of_the_next_commit(house: House, worker: Any) -> None:
    house.repository.edit("tasks/build_engine.py", "CYCLE_US = 400.0", "CYCLE_US = 390.0")
    commit = house.repository.commit("faster")
    run = house.start_run("nightly/toy", night="20261202-020000-1")
    assert house.until(run, "Promoted", "Failed", "Crashed") == "Promoted"
    night = house.nights()[-1]
    assert night["git"]["commit"] == commit and "build_engine.py changed" in night["summary"]


def test_a_night_without_change_says_so(house: House, worker: Any) -> None:
    run = house.start_run("nightly/toy", night="20261203-020000-1")
    assert house.until(run, "Unchanged", "Failed", "Crashed") == "Unchanged"


def test_a_failed_gate_fails_the_run_and_is_told(house: House, worker: Any) -> None:
    house.repository.edit("tasks/build_engine.py", "CYCLE_US = 390.0", "CYCLE_US = 600.0")
    house.repository.commit("slow")
    run = house.start_run("nightly/toy", night="20261204-020000-1")
    assert house.until(run, "Kept", "Failed", "Crashed") == "Kept"
    house.repository.git("revert", "--no-edit", "HEAD")
    house.wait(lambda: any("nightly/toy: Kept" in text for text in house.heard.messages), 60, str(house.heard.messages))
    assert any("regressed" in text and "build_engine.py changed" in text for text in house.heard.messages)


def test_a_cancelled_run_frees_the_node_and_says_so(house: House, worker: Any) -> None:
    run = start_hanging(house, "20261205-020000-1")
    assert house.prefect("flow-run", "cancel", run).returncode == 0
    house.until(run, "Cancelled")
    house.wait(lambda: not house.hanging(), 30, "the stage outlived its run")
    assert house.nights()[-1]["state"] == "cancelled"
    finish(house, "20261206-020000-1")


def test_a_server_restart_in_the_middle_is_survived(house: House, worker: Any) -> None:
    run = start_hanging(house, "20261207-020000-1")
    house.stop_server()
    house.start_server()
    house.hang.unlink()
    assert house.until(run, "Promoted", "Unchanged", "Failed", "Crashed") in ("Promoted", "Unchanged")


def test_a_late_run_is_told_and_runs_when_the_worker_comes(house: House) -> None:
    run = house.start_run("nightly/toy", night="20261208-020000-1")
    house.until(run, "Late", timeout_s=90)
    house.wait(lambda: any("nightly/toy: Late" in text for text in house.heard.messages), 60, "nobody was told")
    worker = house.worker()
    try:
        assert house.until(run, "Unchanged", "Failed", "Crashed") == "Unchanged"
    finally:
        kill(worker)


def test_a_killed_worker_leaves_no_child_and_a_crashed_run(house: House) -> None:
    put_zombies(house)
    worker = house.worker()
    run = start_hanging(house, "20261209-020000-1")
    time.sleep(35)  # a heartbeat must have been heard before its absence can be
    kill_all(house, worker)
    house.wait(lambda: not house.hanging(), 30, "the stage outlived its machine")
    house.until(run, "Crashed", timeout_s=240)
    assert house.nights()[-1]["state"] == "running"
    house.hang.unlink()
    again = house.worker()
    try:
        finish(house, "20261210-020000-1")
    finally:
        kill(again)
    states = {night["night"]: night["state"] for night in house.nights()}
    assert states["20261209-020000-1"] == "interrupted"


def test_a_schedule_fires(house: House, worker: Any) -> None:
    house.repository.edit("specs/toy.yaml", "0 2 * * *", "* * * * *")
    write_deployments(house.repository)
    house.repository.commit("every minute")
    house.setup()
    known = {night["night"] for night in house.nights()}

    def came() -> list[str]:
        return [n["state"] for n in house.nights() if n["night"] not in known and n["state"] != "running"]

    house.wait(lambda: bool(came()), 180, "no night came")
    assert came()[0] == "unchanged"


def test_what_leaves_git_is_pruned(house: House) -> None:
    house.repository.edit("specs/toy.yaml", "nightly:", "# nightly:")
    write_deployments(house.repository)
    assert "pruned deployment nightly/toy" in house.setup()
    assert deployments(house) == {("rebuild", "toy")}
    assert house.api("/deployments/name/rebuild/toy")["schedules"] == []


def test_no_secret_is_in_anything_that_the_runs_left(house: House) -> None:
    """Last: it reads the store, Prefect's database and home, the logs, the checkout and every answer of the API."""
    wanted = [value.encode() for value in (*SECRETS.values(), "hook-secret-6f1c2b")]
    found = []
    for path in house.path.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            found += [f"{path}: {secret.decode()}" for secret in wanted if secret in content]
    for kind in ("flow_runs", "logs", "artifacts", "deployments", "block_documents"):
        answer = json.dumps(house.api(f"/{kind}/filter", {})).encode()
        found += [f"{kind}: {secret.decode()}" for secret in wanted if secret in answer]
    assert found == []
    assert any("was not told" in path.read_text() for path in house.path.glob("worker.log"))  # the token was in use


def test_the_same_on_postgresql(tmp_path: Path) -> None:
    if not (programs := postgres_programs()):
        pytest.skip("no PostgreSQL here")
    with postgres(programs) as url:
        house = deployed(tmp_path, url)
        try:
            assert house.setup().count("\n") == 1
            house.worker()
            done = house.prefect("deployment", "run", "nightly/toy", "--watch")
            assert done.returncode == 0, done.stdout + (house.path / "worker.log").read_text()[-3000:]
            assert house.nights()[0]["state"] == "promoted"
        finally:
            house.close()


def start_hanging(house: House, night: str) -> str:
    """A run that is in the middle of train_draft, of a new spec, until the file is gone."""
    house.hang.touch()
    rate = time.time_ns() % 10**6
    house.repository.write("specs/toy.yaml", house.repository.spec.read_text().split("\n# ")[0] + f"\n# {rate}\n")
    text = house.repository.spec.read_text()
    epochs = int(text.split("epochs: ")[1].split("}")[0])
    house.repository.edit("specs/toy.yaml", f"epochs: {epochs}", f"epochs: {epochs + 1}")
    house.repository.commit(f"epochs {epochs + 1}")
    run = house.start_run("nightly/toy", night=night)
    house.wait(lambda: any("train_draft" in line for line in house.hanging()), 120, "train_draft did not start")
    return run


def finish(house: House, night: str) -> None:
    """The next night does what the last one did not."""
    house.hang.unlink(missing_ok=True)
    run = house.start_run("nightly/toy", night=night)
    assert house.until(run, "Promoted", "Failed", "Crashed") == "Promoted"


def kill_all(house: House, worker: Any) -> None:
    """The worker and the flow's own process, as a power cut does."""
    children = subprocess.run(["pgrep", "-P", str(worker.pid)], capture_output=True, text=True).stdout.split()
    for pid in (str(worker.pid), *children):
        os.kill(int(pid), signal.SIGKILL)
    worker.wait()


def put_zombies(house: House) -> None:
    """The automation of setup.py with a window for tests: here every flow beats each 30 s."""
    location = importlib.util.spec_from_file_location("kilotok_setup", ROOT / "infra/prefect/setup.py")
    assert location and location.loader
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    automation = module.zombies(timedelta(seconds=75))
    automation.name = "test: crash runs without heartbeat"
    house.api("/automations/", json.loads(automation.model_dump_json(exclude={"id"})))
