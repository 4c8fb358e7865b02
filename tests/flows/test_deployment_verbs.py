"""`kilotok deployments|promote|rollback|drain` as a person types them, on real deployments of the toy engine.

Run it: `python -m pytest tests/flows/test_deployment_verbs.py`
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.cli import main
from tasks import deployment
from tasks.deployment.record import Record
from tasks.store import Meta
from tests.tasks.deploy_driver import NAME, run_deploy
from tests.tasks.test_deploy import Bench


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    if Record(made.root, NAME).exists:
        deployment.drain(made.store, NAME)
    assert not made.pids()


def built(bench: Bench, text: str, verdict: str = "PASS") -> str:
    """Deploy a candidate and record its build, as a run leaves both; returns the build's id."""
    artifact = run_deploy(bench.job(text))
    key = hashlib.sha256(text.encode()).hexdigest()
    manifest = bench.store.publish("deploy", key, artifact, Meta({"stage": "deploy"}, {}, {}, {}, True))
    stages = [{"stage": "deploy", "uri": bench.store.artifact_uri(manifest)}]
    build = f"20261125-00000{len(bench.store.list_json('builds'))}-1"
    bench.store.write_json(
        f"builds/{NAME}/{build}", {"build": build, "spec": NAME, "verdict": verdict, "stages": stages}
    )
    return build


def run(bench: Bench, *argv: str) -> int:
    return main([*argv, "--store", str(bench.root)])


def test_promote_list_roll_back_promote_again_drain(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    first = built(bench, "one")
    assert run(bench, "promote", NAME) == 0
    assert capsys.readouterr().out.strip() == bench.url and bench.says() == "one"
    built(bench, "two")
    assert run(bench, "promote", NAME) == 0 and bench.says() == "two"
    assert run(bench, "rollback", NAME) == 0 and bench.says() == "one"
    assert run(bench, "promote", NAME) == 0 and bench.says() == "two"
    assert run(bench, "promote", NAME, "--build", first) == 0 and bench.says() == "one"
    capsys.readouterr()
    assert run(bench, "deployments", NAME, "--json") == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["name"], listed["state"], listed["url"]) == (NAME, "live", bench.url)
    assert run(bench, "deployments") == 0
    text = capsys.readouterr().out
    assert "live" in text and "rollback goes to bundle" in text and bench.url in text
    assert run(bench, "drain", NAME) == 0 and not bench.pids()


def test_build_that_failed_is_not_promoted(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    built(bench, "one")
    assert run(bench, "promote", NAME) == 0
    built(bench, "two", verdict="FAIL")
    assert run(bench, "promote", NAME) == 1
    assert "is FAIL: nothing is promoted" in capsys.readouterr().err and bench.says() == "one"


def test_what_is_not_there_exits_2(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (("promote", "nothing"), ("rollback", "nothing"), ("drain", "nothing")):
        assert run(bench, *argv) == 2
    assert run(bench, "deployments") == 0
    assert "no deployments" in capsys.readouterr().out
