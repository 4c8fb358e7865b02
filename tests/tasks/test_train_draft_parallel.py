"""Several processes train the head that one would; where tensors are; what a lost process leaves."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser
from transformers import AutoModelForCausalLM

from flows.cli import main
from specs.errors import InputError, StageFailed
from tasks.edges.service import free_port
from tasks.job import Progress
from tasks.train_draft import build, data, features, launch, place, trainer
from tasks.train_draft.unroll import Unroller
from tests.tasks.draft_jobs import ALONE, TRAINING, make_job, make_model, make_trainer, write_answers
from tests.tasks.random_checkpoints import write_checkpoint

FORK = multiprocessing.get_context("forkserver")  # this process has torch's threads, which a fork would lose
FORK.set_forkserver_preload(["torch", "transformers", "modelopt.torch.quantization", "pandas", "tasks.runner"])
TINY = Path(__file__).resolve().parents[2] / "specs" / "tiny-llama4-cpu.yaml"
PAIR = {"nodes": 1, "processes_per_node": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("target") / "source")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    return write_answers(tmp_path_factory.mktemp("answered") / "answers", source)


# ---- several processes


def numbered(rank: int, world: int, port: int) -> None:
    """What torchrun tells a process."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()})


def share(rank: int, port: int, source: Path, answers: Path, scratch: Path, last: int) -> None:
    """One process of two, to a step or to the end."""

    def stop(state: trainer.State) -> None:
        if state.step == last:
            os._exit(9)

    numbered(rank, 2, port)
    make_trainer(source, answers, scratch, place.join(2), epochs=2, batch_size=23).run(Progress(), stop)


def forked(target: Callable[..., Any], *arguments: Any, count: int = 1) -> list[int | None]:
    """Exit statuses of so many processes, forked from a server that has torch imported already."""
    port = free_port("127.0.0.1")
    processes = [FORK.Process(target=target, args=(rank, port, *arguments)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_two_processes_train_the_head_that_one_does(source: Path, answers: Path, tmp_path: Path) -> None:
    """24 sequences in batches of 23: the second process has no part of the last one. Both end at step 2 and resume."""
    one = make_trainer(source, answers, tmp_path / "one", epochs=2, batch_size=23)
    one.run(Progress())
    pair = tmp_path / "pair"
    pair.mkdir()
    assert forked(share, source, answers, pair, 2, count=2) == [9, 9]
    assert forked(share, source, answers, pair, 99, count=2) == [0, 0]
    both = make_trainer(source, answers, pair, epochs=2, batch_size=23)
    state = both.run(Progress())  # finds nothing left to do
    assert both.store.computed == 0 and state.step == one.state.step == 4
    assert [row["loss"] for row in state.curve] == pytest.approx([row["loss"] for row in one.state.curve], rel=1e-5)
    assert [row["acc_1"] for row in state.curve] == [row["acc_1"] for row in one.state.curve]
    for name, parameter in one.parameters.items():
        torch.testing.assert_close(both.parameters[name], parameter, rtol=1e-4, atol=1e-5, msg=name)


def test_a_killed_process_is_named_and_the_next_run_resumes(source: Path, answers: Path, tmp_path: Path) -> None:
    """Two processes through torchrun, one killed; one process goes on where they were, to the head of one alone."""
    training = {**TRAINING, "epochs": 60}
    out, steps = tmp_path / "pair", []

    def watch(done: float, total: float, note: str) -> None:
        if note.startswith("step"):
            steps.append(int(note.split()[1].partition("/")[0]))

    def kill(done: float, total: float, note: str) -> None:
        watch(done, total, note)
        if steps and (pid := pid_of_rank(1)):
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(StageFailed, match=r"process 1 of 2 ended first: killed by SIGKILL"):
        build(make_job(source, answers, out, training=training, launch=PAIR), Progress(kill))
    assert not list(out.glob("*.safetensors")) and pid_of_rank(0) == pid_of_rank(1) == 0
    steps.clear()
    build(make_job(source, answers, out, training=training), Progress(watch))
    assert steps[0] > 1
    build(make_job(source, answers, tmp_path / "one", training=training), Progress())
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "pair"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name].float(), tensor.float(), rtol=0.02, atol=0.004, msg=name)


def pid_of_rank(rank: int) -> int:
    """The worker of torchrun that has this rank; 0 for none."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = ((process / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        if b"tasks.train_draft.launch" in command and f"RANK={rank}".encode() in environment:
            return int(process.name)
    return 0


def refusing(rank: int, port: int, job: Path) -> None:
    numbered(rank, 1, port)
    os._exit(launch.main([str(job)]))


def test_what_a_process_refuses_is_kept_for_the_stage(source: Path, answers: Path, tmp_path: Path) -> None:
    """Another checkpoint's answers, found before a step."""
    job = make_job(write_checkpoint(tmp_path / "other", seed=1), answers, tmp_path / "out", launch=PAIR)
    folder = job.scratch / "launch"
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(job.to_dict()))
    assert forked(refusing, folder / "job.json") == [1]
    assert json.loads((folder / "error.json").read_text())["class"] == "IntegrityError"
    assert not (job.scratch / "trainer.safetensors").exists()


# ---- the command


@pytest.mark.parametrize("nodes", [1, 4])
def test_torchrun_understands_the_command(nodes: int) -> None:
    command = launch.argv({"launch": {"nodes": nodes, "processes_per_node": 8}}, "job.json")
    start = command.index("torch.distributed.run") + 1
    parsed = get_args_parser().parse_args(command[start:])
    assert (parsed.nnodes, parsed.nproc_per_node) == (str(nodes), "8")
    assert (parsed.training_script, parsed.training_script_args) == ("tasks.train_draft.launch", ["job.json"])
    assert parsed.standalone == (nodes == 1) and (command[0] == "srun") == (nodes > 1)
    assert parsed.rdzv_endpoint == ("" if nodes == 1 else "{host}")


def test_one_process_needs_no_command() -> None:
    assert launch.argv({"launch": {"nodes": 1, "processes_per_node": 1}}, "job.json") == []


def test_the_plan_shows_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ["--store", str(tmp_path), "--json"]
    assert main(["plan", str(TINY), *store, "--set", "draft.launch.processes_per_node=2"]) == 0
    assert json.loads(capsys.readouterr().out)["train_draft"]["argv"] == launch.argv({"launch": PAIR}, "JOB.json")


def test_several_nodes_without_slurm_are_refused(
    source: Path, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    job = make_job(source, answers, tmp_path / "out", launch={"nodes": 2, "processes_per_node": 1})
    with pytest.raises(InputError, match="srun is not on this machine"):
        build(job, Progress())


# ---- where things are


def test_hidden_states_of_a_target_that_does_not_fit(source: Path, tmp_path: Path) -> None:
    """Some layers in memory, the others on disk: the same states, also after modelopt has converted the model."""
    target = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    size = sum(tensor.numel() * 4 for tensor in target.state_dict().values())
    place.settle(target, ALONE, tmp_path, {"cpu": size // 2})
    assert set(target.hf_device_map.values()) == {"cpu", "disk"}
    model, plain = make_model(source)
    ids = torch.randint(6, 90, (2, 20))
    spread = features.Capture(target, [0, 1, 2]).run(ids)
    for ours, theirs in zip(spread, plain.run(ids), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_every_tensor_of_a_step_is_on_the_heads_device(source: Path, answers: Path) -> None:
    """On the meta device, which like a GPU refuses to mix with the CPU: no GPU is needed to find what is left there."""
    model = make_model(source)[0].to("meta")  # type: ignore[attr-defined]
    eagle, width = model.eagle_module, model.lm_head.in_features
    pair = data.read_answers(answers / "answers.jsonl", 64)[:2]
    with torch.device("meta"):
        rows, chains = max(len(s.token_ids) for s in pair) - 2, max(s.chains for s in pair)
        states = {"features": torch.empty(2, rows, 3 * width), "teacher": torch.empty(2, chains, width)}
    batch = trainer.assemble(pair, states, model.model.embed_tokens.weight)
    taught = trainer.teach(model, model.lm_head.weight, batch)
    loss, hits = Unroller(eagle, 3).loss(batch, *taught, 0.9, [9, 7, 5])
    loss.backward()
    assert loss.device.type == hits.device.type == eagle.fc.weight.grad.device.type == "meta"
