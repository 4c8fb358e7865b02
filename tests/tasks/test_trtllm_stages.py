"""Stages that drive trtllm-serve: answers for the draft, and a validation in which candidate and source take turns.

trtllm-serve is the stub with the native engine behind it, on the repository's tiny model.
Run it: `python -m pytest tests/tasks/test_trtllm_stages.py`
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from specs.errors import IntegrityError, StageFailed
from tasks import deploy, deployment, synthesize
from tasks.deployment.plain import Starter, plain_server
from tasks.deployment.record import Record
from tasks.edges import service
from tasks.job import Job, Progress
from tasks.store import open_store
from tasks.validate import build as validate
from tasks.validate.client import Parsed, speculation_of_steps
from tests.engine_plugins.models import save_draft
from tests.tasks.deploy_driver import SERVERS
from tests.tasks.test_deploy_trtllm import ENGINE
from tests.tasks.test_validate import TINY, make_job

ROOT = Path(__file__).resolve().parents[2]
STARTER = Starter(SERVERS["trtllm"])
PLAIN = {**ENGINE, "draft_tokens": 0, "max_batch_size": 8, "max_seq_len": 1024, "options": {}}
DEPLOY = {"to": "process", "strategy": "drain_swap", "port": 0, "start_timeout_s": 60}


def spec(**sections: Any) -> dict[str, Any]:
    return {"name": "tiny", "engine": PLAIN, "deploy": DEPLOY, **sections}


def synthesize_with(folder: Path, backend: str) -> list[dict[str, Any]]:
    data = {"prompts": f"file:{TINY / 'prompts.jsonl'}", "samples": 12, "answers": "target", "max_new_tokens": 96}
    engine = PLAIN if backend == "trtllm" else {"backend": "native"}
    out = folder / backend
    out.mkdir()
    job = Job("synthesize", spec(draft={"data": data}, engine=engine), ROOT, {"quantize": TINY}, out)
    with contextlib.suppress(IntegrityError):  # too many long answers: how good the model is is not the matter here
        synthesize.build(job, Progress(), STARTER)
    (shard,) = (job.scratch / "answers").glob("*.jsonl")
    return [json.loads(line) for line in shard.read_text().splitlines()]


def test_answers_come_from_trtllm_serve_as_the_token_ids_that_were_generated(tmp_path: Path) -> None:
    ours, theirs = (synthesize_with(tmp_path, backend) for backend in ("native", "trtllm"))
    assert [row["id"] for row in ours] == [row["id"] for row in theirs]
    for mine, their in zip(ours, theirs, strict=True):
        assert mine["prompt_token_ids"] == their["prompt_token_ids"]
        assert mine["answer_token_ids"] == their["answer_token_ids"], mine["id"]
        assert (mine["answer"], mine["finish_reason"]) == (their["answer"], their["finish_reason"])


def test_server_of_a_stage_ends_with_it_and_says_why_it_did_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with plain_server(spec(), TINY, tmp_path, print, STARTER) as url:
        assert service.http_status(f"{url}/health") == 200
    assert service.http_status(f"{url}/health") == 0
    monkeypatch.setenv("KILOTOK_STUB_VERSION", "9.9.9")
    unknown = r"ended while starting[\s\S]*no contract for TensorRT-LLM 9.9.9"
    with pytest.raises(StageFailed, match=unknown), plain_server(spec(), TINY, tmp_path, print, STARTER):
        pass


def one_word_head(folder: Path) -> Path:
    """A head that drafts a space whatever it sees, which is right now and then: enough to be seen at work."""
    head = save_draft(folder, target=json.loads((TINY / "config.json").read_text()))
    tensors = load_file(head / "model.safetensors")
    space = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(" ", add_special_tokens=False).ids[0]
    tensors["lm_head.weight"].zero_()  # all logits are equal: the first entry of the draft's vocabulary wins
    size = len(tensors["d2t"])
    ids = [space, *(token for token in range(size) if token != space)][:size]
    tensors["d2t"] = torch.tensor(ids) - torch.arange(size)
    save_file(tensors, head / "model.safetensors")
    return head


class Swap:
    """A trtllm candidate of the tiny model in a drain_swap deployment."""

    def __init__(self, folder: Path) -> None:
        from engine_plugins.trtllm.bundle import write_bundle

        self.root, self.port = folder / "store", service.free_port("127.0.0.1")
        self.bundle, out = folder / "candidate", self.root / "work" / "deploy-1"
        for made in (self.bundle, out):
            made.mkdir(parents=True)
        self.store = open_store(self.root)
        self.spec = spec(engine={**PLAIN, "draft_tokens": 3}, deploy={**DEPLOY, "port": self.port})
        write_bundle(self.bundle, self.spec, TINY, one_word_head(folder / "head"), prove=False)
        self.job = Job("deploy", self.spec, self.root, {"build_engine": self.bundle}, out)
        deploy.build(self.job, Progress(), server=SERVERS["trtllm"])


@pytest.fixture
def swap(tmp_path: Path) -> Iterator[Swap]:
    made = Swap(tmp_path)
    yield made
    deployment.drain(made.store, "tiny")


@pytest.mark.e2e
def test_validation_measures_candidate_and_source_where_only_one_of_them_fits(swap: Swap, tmp_path: Path) -> None:
    job = make_job(tmp_path, gates=[], samples=3)
    job.spec.update(swap.spec)
    job.spec["validate"]["latency"] |= {"requests": 16, "users": [], "forced_acceptance": 3.0}
    job.inputs.update(build_engine=swap.bundle, deploy=swap.job.out)
    metrics = validate(job, Progress(), starter=STARTER)
    assert metrics["latency.tps_per_user.p50"] > 0 and metrics["baseline.tps_per_user.p50"] > 0
    assert metrics["forced.acceptance_length"] == pytest.approx(3, abs=0.2) != metrics["acceptance.length"]
    assert metrics["forced.tps_per_user.p50"] > 0
    cycle = json.loads((job.out / "waterfall.json").read_text())
    assert (cycle["source"], cycle["cycle_us"]) == ("profiler", 100)
    assert sum(part["us"] for part in cycle["parts"]) == pytest.approx(100) and metrics["cycle.attention_us"] > 0
    verdict = json.loads((job.out / "verdict.json").read_text())
    assert verdict["overall"]["difference"] == 0, "the same weights on both sides"
    slot = Record(swap.root, "tiny").load().slots["a"]
    assert slot["state"] == "candidate" and service.is_same(slot["process"]), "it came back"


def test_candidate_set_aside_frees_its_memory_and_comes_back_live(swap: Swap) -> None:
    plan = deployment.load_plan(swap.job.out / "deployment.json")
    with deployment.opened(swap.root, "tiny") as opened:
        opened.promote(plan)
    url = f"http://127.0.0.1:{swap.port}/health"
    with deployment.set_aside(swap.job.out / "deployment.json"):
        assert service.http_status(url) == 503
        assert not service.is_same(Record(swap.root, "tiny").load().slots["a"]["process"])
    assert service.http_status(url) == 200
    assert deployment.status(swap.store, "tiny")["state"] == "live"  # type: ignore[index]


def parsed(tokens: int, per_step: float) -> Parsed:
    return Parsed(usage={"completion_tokens": tokens}, per_step=per_step)


def test_chunks_of_trtllm_are_steps_and_tell_the_positions() -> None:
    chunks = np.array([1, 3, 4, 2, 3])
    assert speculation_of_steps(parsed(13, 13 / 5), chunks) == {
        "accepted": 8, "rejected": 0, "cycles": 4, "accepted_by_position": [4, 3, 1],
    }  # fmt: skip


def test_merged_chunks_keep_the_total() -> None:
    for chunks in ([60, 60], [3] * 36 + [6] * 2, [3] * 38 + [6]):
        found = speculation_of_steps(parsed(120, 3.0), np.array(chunks))
        assert (found["cycles"], sum(found["accepted_by_position"])) == (39, 80)


def test_server_that_tells_no_steps_gives_nothing() -> None:
    assert speculation_of_steps(parsed(13, 0.0), np.array([1, 12])) == {}
