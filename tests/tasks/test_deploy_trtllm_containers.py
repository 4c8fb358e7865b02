"""trtllm-serve's stub in real containers: promote, roll back, swap, a container that dies. Skipped without an engine.

Run it: `DOCKER_HOST=unix://... python -m pytest tests/tasks/test_deploy_trtllm_containers.py`
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specs.errors import StageFailed
from tasks import deploy, deployment
from tasks.job import Progress
from tests.tasks.deploy_driver import NAME, SERVERS, run_promote
from tests.tasks.test_deploy import Load, ask
from tests.tasks.test_deploy_containers import IMAGE, MOUNTS, engine  # noqa: F401  a fixture
from tests.tasks.test_deploy_trtllm import TrtllmBench


@pytest.fixture
def bench(engine: Any, tmp_path: Path) -> Iterator[TrtllmBench]:  # noqa: F811
    made = TrtllmBench(tmp_path)
    yield made
    if deployment.status(made.store, NAME):
        deployment.drain(made.store, NAME)
    left = engine.containers.list(all=True, filters={"label": f"kilotok.deployment={NAME}"})
    assert not made.pids() and not left, "something was left behind"


def start(bench: TrtllmBench, text: str, toy: dict[str, Any] | None = None, **settings: Any) -> Any:
    job = bench.job(text, toy, to="docker", **{"image": IMAGE, "start_timeout_s": 60, **settings})
    deploy.build(job, Progress(), server=SERVERS["trtllm"], mounts=MOUNTS)
    return job


@pytest.mark.parametrize("strategy", ["blue_green", "drain_swap"])
def test_promotion_and_rollback_between_containers_lose_no_request(bench: TrtllmBench, strategy: str) -> None:
    run_promote(start(bench, "one", strategy=strategy))
    with Load(bench.url) as load:
        load.wait_for("one")
        run_promote(start(bench, "two", strategy=strategy))
        load.wait_for("two")
        deployment.rollback(bench.store, NAME)
        load.wait_for("one")
    assert load.failures == []
    assert bool(load.refused) == (strategy == "drain_swap")


def test_start_in_a_container_is_proven_too(bench: TrtllmBench) -> None:
    job = start(bench, "one", toy={"engine": {"plugins": ["router"]}})
    proof = bench.record().slots["a"]["proof"]
    assert proof["ranks"] == 1 and proof["version"] == "1.2.1"
    run_promote(job)
    assert ask(bench.url) == "one"


def test_container_whose_engine_dies_is_named_with_its_last_words(bench: TrtllmBench) -> None:
    run_promote(start(bench, "one"))
    with pytest.raises(StageFailed, match=r"ended while starting[\s\S]*engine ended by itself"):
        start(bench, "two", toy={"start_s": "never"}, start_timeout_s=40)
    assert ask(bench.url) == "one"
