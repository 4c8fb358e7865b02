"""kill -9 at a random moment inside every real stage: the store stays whole, the next run ends the same.

Refuses toy stages (those are in `test_runner_crash.py`) and a build that only looks finished: files are compared by
hash. Deployment's own steps are killed one by one in `test_deploy.py`. Run: `pytest tests/tasks/test_stage_crash.py`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tasks import deployment
from tasks.edges.service import free_port
from tasks.stages import REGISTRY
from tests.tasks.stage_driver import Chain

pytestmark = pytest.mark.e2e
# What a stage measures or is told differs from one run to the next; every other file must not.
MEASURED = {
    "train_draft": {"summary.json"},
    "deploy": {"deployment.json"},
    "promote": {"promotion.json"},
    "report": {"index.html", "report.md", "report.json", "README.md"},
    "validate": None,
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    made = Chain(tmp_path_factory.mktemp("crash"), free_port("127.0.0.1"))
    yield made
    if "deploy" in made.receipts:
        deployment.drain(made.store, "tiny-llama4-cpu")


def hashes(chain: Chain, stage: str) -> dict[str, str]:
    measured = MEASURED.get(stage, set())
    if measured is None:
        return {}
    return {file.path: file.sha256 for file in chain.manifest(stage).files if file.path not in measured}


@pytest.mark.parametrize("stage", list(REGISTRY))
def test_killed_anywhere_in_a_stage_the_next_run_ends_the_same(chain: Chain, stage: str) -> None:
    chain.up_to(stage)
    seconds, _ = chain.run(stage)
    whole = hashes(chain, stage)
    chain.store.delete(chain.manifest(stage))

    after_s = random.Random(os.getpid()).uniform(0, 0.9 * seconds)
    chain.kill(stage, after_s)
    assert [problem for manifest in chain.store.entries() for problem in chain.store.verify(manifest)] == []
    assert chain.store.leases() == []
    left = finished_parts(chain, stage)

    _, events = chain.run(stage)
    assert hashes(chain, stage) == whole, f"killed after {after_s:.2f} of {seconds:.2f} s"
    assert redone(stage, chain, events, left) == [], f"killed after {after_s:.2f} of {seconds:.2f} s"


def finished_parts(chain: Chain, stage: str) -> float:
    """What the killed build left, in the unit that the stage resumes by."""
    scratch = chain.work(stage) / ".scratch"
    if stage == "download":
        return sum(p.stat().st_size for p in chain.work(stage).rglob("*.safetensors*"))
    if stage == "synthesize":
        return 128 * len(list((scratch / "answers").glob("shard-*.jsonl")))
    if stage == "validate":
        return sum((scratch / f"answers-{side}.json").exists() for side in ("served", "source"))
    return 0


def redone(stage: str, chain: Chain, events: list[tuple[float, str]], left: float) -> list[object]:
    """Evidence that a finished part was made again."""
    if stage == "download":
        moved = chain.receipts[stage].metrics["download.bytes_moved"]
        total = chain.receipts[stage].metrics["download.bytes"]
        return [] if moved <= total - left else [moved, total, left]
    if stage == "synthesize":
        return [event for event in events if 0 < event[0] <= left and "tokens" in event[1]]
    if stage == "validate":  # asking moves the bar between two whole steps
        asked = {2: left < 1, 4: left < 2}
        return [event for event in events if event[0] % 1 and int(event[0]) in asked and not asked[int(event[0])]]
    return []


def test_the_endpoint_answers_after_all_that(chain: Chain) -> None:
    chain.up_to("report")
    url = deployment.live_url(chain.store, "tiny-llama4-cpu")
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "tiny-llama4-cpu"


def test_a_killed_stage_left_no_process_behind(chain: Chain) -> None:
    marker = os.fsencode(chain.folder)
    lines = [(entry / "cmdline").read_bytes() for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    servers = [line for line in lines if marker in line and b"native.server" in line]
    assert len(servers) <= 1  # the live one
