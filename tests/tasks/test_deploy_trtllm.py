"""The same deployment with trtllm-serve's stub in the slots: the front hands over, drains and dies like our own server.

Run it: `python -m pytest tests/tasks/test_deploy_trtllm.py`
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from specs.errors import InputError, StageFailed
from tasks import build_engine, deployment
from tasks.deployment.record import Record
from tasks.edges import service
from tasks.job import Job, Progress
from tests.tasks.deploy_driver import NAME, run_deploy, run_promote
from tests.tasks.test_deploy import STEPS, SWAP_STEPS, Bench, Load, ask, drive, kill_at_each

MAVERICK = {
    "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8, "intermediate_size": 8192,
    "intermediate_size_mlp": 16384, "num_local_experts": 128, "num_experts_per_tok": 1,
}  # fmt: skip
ENGINE: dict[str, Any] = {
    "backend": "trtllm",
    "version": "1.2.1",
    "tensor_parallel": 1,
    "expert_parallel": 1,
    "draft_tokens": 3,
    "max_batch_size": 8,
    "max_seq_len": 4096,
    "plugins": [],
    "options": {"enable_min_latency": True, "cuda_graph_config": {"max_batch_size": 8}},
    "env": {"TRTLLM_ENABLE_PDL": "1"},
}


class TrtllmBench(Bench):
    """Bundles that the build_engine stage makes of a toy checkpoint."""

    backend = "trtllm"
    num_processes = 3  # keeper, front and engine

    def bundle(self, name: str, engine: dict[str, Any] | None = None, **toy: Any) -> Path:
        folder = self.root.parent / f"bundle-{name}"
        checkpoint, draft = self.root.parent / f"checkpoint-{name}", self.root.parent / f"draft-{name}"
        for made in (folder, checkpoint, draft):
            made.mkdir(exist_ok=True)
        words = {"text": f"I am {name}, at your service.", "step_s": 0.002, "ranks": engine is not None, **toy}
        (checkpoint / "toy.json").write_text(json.dumps(words))
        (checkpoint / "config.json").write_text(json.dumps(MAVERICK))
        (draft / "config.json").write_text("{}")
        spec = {"name": NAME, "engine": {**ENGINE, **(engine or {})}, "draft": {"capture_layers": [1, 23, 44]}}
        job = Job("build_engine", spec, self.root, {"quantize": checkpoint, "train_draft": draft}, folder)
        build_engine.build(job, Progress())
        if engine is None:  # nothing to prove: the tests of hand-over start many servers
            record = json.loads((folder / "bundle.json").read_text())
            (folder / "bundle.json").write_text(json.dumps({**record, "expected": None}))
        return folder


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[TrtllmBench]:
    made = TrtllmBench(tmp_path)
    yield made
    if Record(made.root, NAME).exists:
        deployment.drain(made.store, NAME)
    assert not made.pids(), "processes were left behind"


def test_no_request_is_lost_in_promotions_and_a_rollback(bench: TrtllmBench) -> None:
    bench.up("one")
    with Load(bench.url) as load:
        load.wait_for("one")
        bench.up("two")
        load.wait_for("two")
        assert deployment.rollback(bench.store, NAME) == bench.url
        load.wait_for("one", 20)
    assert load.failures == [] and load.refused == []


def test_drain_swap_refuses_politely_and_its_downtime_is_the_start(bench: TrtllmBench) -> None:
    bench.up("one", strategy="drain_swap")
    with Load(bench.url) as load:
        load.wait_for("one")
        bench.up("two", strategy="drain_swap")
        load.wait_for("two")
    assert load.failures == [] and load.refused
    at = {event["what"]: event["at"] for event in bench.record().data["events"]}
    assert load.refused[-1] - load.refused[0] < at["start: smoke"] - at["start: spawn"] + 2.0


def test_long_stream_survives_the_promotion(bench: TrtllmBench) -> None:
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


def test_model_is_served_under_the_name_of_the_spec(bench: TrtllmBench) -> None:
    bench.up("one")
    assert httpx.get(f"{bench.url}/v1/models").json()["data"][0]["id"] == NAME


def test_front_ends_with_its_engine_and_the_keeper_answers(bench: TrtllmBench) -> None:
    bench.up("one")
    front = bench.record().slots["a"]["process"]
    engine = engine_of(bench)
    os.kill(engine, signal.SIGKILL)
    assert service.wait_gone(front, 10)
    assert bench.status()["state"] == "down"
    assert httpx.get(f"{bench.url}/health").status_code == 503


def test_engine_ends_with_its_front(bench: TrtllmBench) -> None:
    bench.up("one")
    front = bench.record().slots["a"]["process"]
    engine = service.identity(engine_of(bench))
    assert engine
    os.kill(front["pid"], signal.SIGKILL)
    assert service.wait_gone(engine.to_dict(), 5)


def engine_of(bench: TrtllmBench) -> int:
    """trtllm-serve's process, the front's child."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in bench.pids()}
    (engine,) = [pid for pid, line in commands.items() if b"stub_serve" in line and b"trtllm.front" not in line]
    return engine


def test_option_the_version_does_not_know_is_in_the_error(bench: TrtllmBench) -> None:
    bench.up("one")
    job = bench.job("two")
    record = job.inputs["build_engine"] / "bundle.json"
    changed = json.loads(record.read_text())
    record.write_text(json.dumps({**changed, "args": {**changed["args"], "enable_everything": True}}))
    with pytest.raises(StageFailed, match=r"ended while starting[\s\S]*does not know enable_everything"):
        run_deploy(job)
    assert bench.says() == "one"


@pytest.mark.parametrize(
    ("toy", "match"), [({"accepted": [0]}, "acceptance is exactly 1.0"), ({"text": "ab" * 40}, "gibberish")]
)
def test_bad_candidate_is_refused_and_the_old_one_serves(bench: TrtllmBench, toy: dict[str, Any], match: str) -> None:
    bench.up("one")
    with pytest.raises(StageFailed, match=match):
        run_deploy(bench.job("two", toy=toy))
    assert bench.says() == "one"


def fake_smi(folder: Path, free_mib: int) -> str:
    """An nvidia-smi that knows one figure, in front of PATH."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho {free_mib}\n")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_too_little_gpu_memory_is_refused_before_anything_starts(
    bench: TrtllmBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", fake_smi(tmp_path, 0))
    with pytest.raises(InputError, match="0.0 GiB of GPU memory are available.*drain_swap"):
        run_deploy(bench.job("one"))
    assert not bench.pids()


# Proof of liveness


PROVEN = {"tensor_parallel": 2, "plugins": ["router", "fc13_swiglu"]}


def test_start_is_proven_by_version_ranks_kernels_and_acceptance(bench: TrtllmBench) -> None:
    artifact = run_deploy(bench.job("one", toy={"engine": PROVEN}))
    record = bench.record().slots["a"]
    assert record["proof"]["version"] == "1.2.1" and record["proof"]["ranks"] == 2
    assert json.loads((artifact / "deployment.json").read_text())["started"]["proof"] == record["proof"]


@pytest.mark.parametrize(
    ("variable", "value", "engine", "says"),
    [
        ("KILOTOK_STUB_VERSION", "1.3.0rc22", {}, "the server is TensorRT-LLM 1.3.0rc22, the spec says 1.2.1"),
        ("KILOTOK_STUB_IGNORES", "cuda_graph_config", {}, "no CUDA graph was launched"),
        ("KILOTOK_STUB_IGNORES", "TRTLLM_ENABLE_PDL", {}, "rank 0: TRTLLM_ENABLE_PDL did not reach it"),
        ("KILOTOK_STUB_DEAF_RANK", "1", PROVEN, "registered itself in 1 of 2 ranks"),
        ("KILOTOK_STUB_IGNORES", "enable_min_latency", {}, "router GEMV"),
    ],
)
def test_flag_that_did_nothing_fails_the_deploy(
    bench: TrtllmBench,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    engine: dict[str, Any],
    says: str,
) -> None:
    bench.up("one")
    monkeypatch.setenv(variable, value)
    with pytest.raises(StageFailed, match="what was asked for does not run") as caught:
        run_deploy(bench.job("two", toy={"engine": engine}))
    assert says in caught.value.what
    assert ask(bench.url) == "one"


# kill -9 of the deployer. test_deploy.py kills it at every step; here at those that touch the front, and with
# KILOTOK_EVERY_STEP=1 at all of them (12 minutes on two cores).

EVERY = os.environ.get("KILOTOK_EVERY_STEP") == "1"
FRONT = ("start:close", "start:spawned", "start:open", "promote:accept", "promote:release", "promote:drain")


@pytest.mark.e2e
def test_deployer_killed_at_any_step_of_blue_green_never_costs_a_request(bench: TrtllmBench) -> None:
    bench.up("first")
    with Load(bench.url) as load:
        load.wait_for("first", 2)
        kill_at_each(bench, load, "blue_green", [step for step in STEPS if EVERY or step in FRONT])
    assert load.failures == [] and load.refused == []


@pytest.mark.e2e
def test_deployer_killed_at_any_step_of_drain_swap_loses_no_request(bench: TrtllmBench) -> None:
    bench.up("first", strategy="drain_swap")
    with Load(bench.url) as load:
        load.wait_for("first", 2)
        kill_at_each(bench, load, "drain_swap", [step for step in SWAP_STEPS if EVERY or step in FRONT])
    assert load.failures == []


def test_deployer_killed_while_it_proves_is_recovered(bench: TrtllmBench) -> None:
    bench.up("one")
    job = bench.job("two", toy={"engine": {}})
    assert drive(bench, "deploy", "two", "blue_green", "start:prove").returncode in (-signal.SIGKILL, 0)
    run_deploy(job)
    run_promote(job)
    assert bench.says() == "two" and bench.status()["operation"] is None
