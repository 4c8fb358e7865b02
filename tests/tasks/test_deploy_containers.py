"""The same deployment, its servers in real containers: promote, roll back, refuse. Skipped where no engine answers.

The image is empty; interpreter and project are mounted read-only, so nothing is pulled.
Run it: `DOCKER_HOST=unix://... python -m pytest tests/tasks/test_deploy_containers.py`
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specs.errors import InputError, StageFailed
from tasks import deploy, deployment
from tasks.deploy import make_plan
from tasks.edges.containers import create_options
from tasks.job import Progress
from tests.tasks.deploy_driver import NAME, TOY_SERVER, run_promote
from tests.tasks.test_deploy import ROOT, Bench, Load, ask

IMAGE = "localhost/kilotok-test:scratch"
DOCKERFILE = ROOT / "infra" / "images" / "mounted.Dockerfile"
MOUNTS = [str(path) for path in map(Path, ("/usr", "/lib", "/lib64", "/bin")) if path.exists()]
MOUNTS += sorted({str(ROOT), sys.prefix, *(() if sys.base_prefix.startswith("/usr") else (sys.base_prefix,))})


@pytest.fixture(scope="session")
def engine() -> Any:
    """A client of the container engine, with the empty image built."""
    docker = pytest.importorskip("docker")
    if not os.environ.get("DOCKER_HOST") and not Path("/var/run/docker.sock").exists():
        pytest.skip("no container engine: set DOCKER_HOST")
    client = docker.from_env()
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        for name, data in (("Dockerfile", DOCKERFILE.read_bytes()), ("empty", b"")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    context.seek(0)
    client.images.build(fileobj=context, custom_context=True, tag=IMAGE, rm=True)
    return client


@pytest.fixture
def bench(engine: Any, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    if deployment.status(made.store, NAME):
        deployment.drain(made.store, NAME)
    left = engine.containers.list(all=True, filters={"label": f"kilotok.deployment={NAME}"})
    assert not made.pids() and not left, "something was left behind"


def start(bench: Bench, text: str, toy: dict[str, Any] | None = None, **settings: Any) -> Any:
    job = bench.job(text, toy, to="docker", **{"image": IMAGE, "start_timeout_s": 60, **settings})
    deploy.build(job, Progress(), server=TOY_SERVER, mounts=MOUNTS)
    return job


def test_promotion_and_rollback_between_containers_lose_no_request(bench: Bench) -> None:
    run_promote(start(bench, "one"))
    with Load(bench.url) as load:
        load.wait_for("one")
        run_promote(start(bench, "two"))
        load.wait_for("two")
        deployment.rollback(bench.store, NAME)
        load.wait_for("one")
    assert load.failures == [] and load.refused == []
    slots = bench.status()["slots"].values()
    assert sum(slot["up"] for slot in slots) == 1


def test_container_that_dies_in_start_up_is_named_with_its_last_words(bench: Bench) -> None:
    run_promote(start(bench, "one"))
    with pytest.raises(StageFailed, match=r"ended while starting[\s\S]*Error"):
        start(bench, "two", toy={"start_s": "never"}, start_timeout_s=20)
    assert ask(bench.url) == "one"


def test_wrong_image_digest_is_refused_before_anything_starts(bench: Bench) -> None:
    for image in ("localhost/kilotok-test:none", "localhost:1/kilotok@sha256:" + "0" * 64):
        with pytest.raises(InputError, match="deploy.image"):
            start(bench, "one", image=image)


def test_options_hold_gpus_limits_and_mounts_as_data(tmp_path: Path) -> None:
    made = Bench(tmp_path)
    job = made.job("one", to="docker", image="registry/image@sha256:" + "0" * 64)
    plan = {**make_plan(job), "gpus": True}
    options = create_options(plan, "name", ["python"], "/run/dir")
    assert options["ipc_mode"] == options["network_mode"] == "host"
    assert options["device_requests"][0]["Count"] == -1 and options["ulimits"][0]["Name"] == "memlock"
    assert options["volumes"][plan["bundle"]]["mode"] == "ro"
    assert plan["argv"][:3] == ["python", "-m", "engine_plugins.native.server"]
