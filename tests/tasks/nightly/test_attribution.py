"""What changed, in order of suspicion; what cannot be the cause is left out.

Run it: `python -m pytest tests/tasks/nightly/test_attribution.py`.
"""

from __future__ import annotations

from tasks.nightly.attribution import ENVIRONMENT, causes, words

GOOD = {
    "download": {"digest": "d", "lock.tokenizer.json": "1", "code.tasks/download.py": "1"},
    "quantize": {"digest": "q", "package.torch": "2.13.0"},
    "train_draft": {"digest": "t", "spec.draft.training.epochs": "4", "package.torch": "2.13.0"},
    "build_engine": {"digest": "b", "code.engine.cpp": "1", "machine.container": "sha256:1"},
    "validate": {"digest": "v", "spec.validate.latency.requests": "24"},
    "report": {"digest": "r", "code.tasks/report/page.py": "1"},
    ENVIRONMENT: {"machine.gpu_driver": "570.1", "package.numpy": "2.4.0"},
}


def changed(**stages: dict[str, str]) -> dict[str, dict[str, str]]:
    return {stage: {**found, **stages.get(stage, {})} for stage, found in GOOD.items()}


def named(bad: dict[str, dict[str, str]], metric: str) -> list[tuple[str, str]]:
    return [(cause.kind, cause.name) for cause in causes(GOOD, bad, metric)]


def test_acceptance_suspects_the_draft_before_the_engine() -> None:
    bad = changed(
        train_draft={"digest": "t2", "spec.draft.training.epochs": "1"},
        build_engine={"digest": "b2", "code.engine.cpp": "2"},
    )
    assert named(bad, "acceptance.length") == [("spec", "spec.draft.training.epochs"), ("code", "code.engine.cpp")]
    assert named(bad, "latency.tps_per_user.p50")[0] == ("code", "code.engine.cpp")


def test_an_input_whose_stage_made_the_same_bytes_is_no_cause() -> None:
    assert named(changed(download={"code.tasks/download.py": "2"}), "accuracy.difference") == []


def test_a_stage_behind_the_measurement_is_no_cause() -> None:
    assert named(changed(report={"digest": "r2", "code.tasks/report/page.py": "2"}), "latency.tps_per_user.p50") == []


def test_one_package_that_several_stages_read_is_named_once() -> None:
    bad = changed(
        quantize={"digest": "q2", "package.torch": "2.14.0"}, train_draft={"digest": "t2", "package.torch": "2.14.0"}
    )
    (cause,) = causes(GOOD, bad, "acceptance.length")
    assert (cause.kind, cause.what) == ("packages", "torch 2.13.0 -> 2.14.0")


def test_the_driver_and_the_container_have_their_own_names() -> None:
    bad = changed(
        build_engine={"digest": "b2", "machine.container": "sha256:2"}, environment={"machine.gpu_driver": "580"}
    )
    assert [kind for kind, _ in named(bad, "cycle.us")] == ["container", "driver"]


def test_how_it_is_measured_is_suspected_too() -> None:
    bad = changed(validate={"spec.validate.latency.requests": "6"})
    assert named(bad, "latency.tps_per_user.p50") == [("spec", "spec.validate.latency.requests")]


def test_nothing_changed_points_at_the_machine() -> None:
    assert "look at the machine" in words(causes(GOOD, GOOD, "cycle.us"))
