"""Problems files that lie, lm-eval against a server that knows the answers, and the verdict over tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from specs.errors import InputError, NetworkError, StageFailed
from specs.validation import NAMED_TASKS
from tasks.validate.accuracy import Questions, Side, ask, load_tasks
from tasks.validate.mock import MockPlan, mock_server
from tasks.validate.paired import accuracy_metrics, paired_arrays, problems_frame, verdicts
from tasks.validate.problems import Problem, by_task, read_problems

GOOD = [
    {
        "id": f"{domain}-{n}",
        "domain": domain,
        "prompt": f"{domain} {n}?",
        "answer": f"so\nAnswer: [{n}, 1]",
        "target": f"[{n}, 1]",
    }
    for domain in ("code", "math")
    for n in range(20)
]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8"
    )
    return path


@pytest.mark.parametrize(
    "line, what",
    [
        ({**GOOD[0]}, "already on line 1"),
        ("{broken", "not JSON"),
        ("[1]", "not an object"),
        ({**GOOD[0], "id": "x", "target": None}, "target is missing"),
        ({**GOOD[0], "id": "x", "domain": " "}, "domain is ' '"),
        ({**GOOD[0], "id": 7}, "id is 7"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path: Path, line: Any, what: str) -> None:
    path = write(tmp_path / "held.jsonl", [*GOOD[:2], line])
    with pytest.raises(InputError) as caught:
        read_problems(path)
    assert what in caught.value.what
    assert caught.value.where == f"{path}:3"


def test_an_empty_file_and_an_empty_domain_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="empty"):
        read_problems(write(tmp_path / "none.jsonl", []))
    problems = read_problems(write(tmp_path / "held.jsonl", GOOD))
    with pytest.raises(InputError, match="'facts' has no problems.*domains there: code, math"):
        by_task(problems, ["code", "facts"], None, "held.jsonl")
    assert list(by_task(problems, ["math", "gsm8k"], 5, "")) == ["math"]


def run_side(tmp_path: Path, name: str, plan: MockPlan, only: Any = None, **how: Any) -> Any:
    path = write(tmp_path / "held.jsonl", GOOD)
    local = by_task(read_problems(path), ["code", "math"], None, str(path))
    with mock_server(replace(plan, answers=str(path), ttft_ms=1, tokens_per_s=50000)) as url:
        questions = Questions(["code", "math"], local, 64, **how)
        return ask(Side(name, url, "mock", timeout_s=5), questions, tmp_path / "tasks", only=only)


def test_lm_eval_asks_scores_and_keeps_the_answers(tmp_path: Path) -> None:
    """A list as a target is one answer, not a choice of several; every fifth problem is answered wrongly."""
    source = run_side(tmp_path, "source", MockPlan())
    served = run_side(tmp_path, "served", MockPlan(wrong_every=5))
    frame = problems_frame(source.rows + served.rows)
    assert frame[frame["side"] == "source"]["correct"].mean() == 1.0
    assert frame[frame["side"] == "served"]["correct"].mean() == 0.8
    assert frame["target"].iloc[0] == "[0, 1]"
    assert "Answer: wrong" in set(frame["answer"])
    assert sorted({task for task, _ in served.usages}) == ["code", "math"]
    assert all(usage["speculation"]["cycles"] >= 0 for _, usage in served.usages)
    metrics = accuracy_metrics(verdicts(frame, 0.05, 0.05, 0.8))
    assert metrics["accuracy.code.difference"] == pytest.approx(-0.2)


def test_an_endpoint_that_does_not_answer_is_not_a_wrong_answer(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="served did not answer"):
        run_side(tmp_path, "served", MockPlan(fault="503"))


def rows(task: str, source: list[int], served: list[int]) -> list[dict[str, Any]]:
    sides = (("source", source), ("served", served))
    return [
        {
            "task": task,
            "id": f"{task}{n}",
            "side": side,
            "sample": 0,
            "answer": "",
            "target": "",
            "correct": float(right),
        }
        for side, values in sides
        for n, right in enumerate(values)
    ]


def test_one_broken_task_fails_the_whole(tmp_path: Path) -> None:
    good = [row for task in ("a", "b", "c", "d", "e", "f", "g") for row in rows(task, [1] * 64, [1] * 64)]
    broken = rows("h", [1] * 64, [1] * 48 + [0] * 16)
    results = verdicts(problems_frame(good + broken), 0.05, 0.05, 0.8)
    assert (results["h"].verdict, results["all"].verdict) == ("FAIL", "FAIL")
    assert results["a"].verdict == "PASS"
    assert verdicts(problems_frame(good), 0.05, 0.05, 0.8)["all"].verdict == "PASS"


def test_sides_with_different_problems_are_not_compared() -> None:
    frame = problems_frame(rows("a", [1, 1, 1], [1, 1]))
    with pytest.raises(StageFailed, match="same problems"):
        paired_arrays(frame)


def test_problems_are_paired_by_id_not_by_order() -> None:
    frame = problems_frame(rows("a", [1, 0, 1], [1, 0, 1]))
    source, served = paired_arrays(pd.concat([frame.iloc[:3], frame.iloc[3:].iloc[::-1]]))
    assert (source == served).all()
    assert Problem("i", "d", "p", "t").id == "i"


# -- lm-eval's own tasks
def test_every_named_task_is_in_the_installed_lm_eval_with_the_filter_that_counts() -> None:
    """Their data are out of reach here; that the names and filters exist is not."""
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    assert set(NAMED_TASKS) >= {"gpqa_diamond", "aime24", "aime25", "math500", "livecodebench", "gsm8k", "mmlu_pro"}
    for ours, (theirs, wanted) in NAMED_TASKS.items():
        assert theirs in index, ours
        filters = {entry["name"] for entry in index[theirs].cfg.get("filter_list", ())}
        assert not wanted or wanted in filters, ours


def test_a_task_whose_data_are_out_of_reach_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import huggingface_hub.constants

    for module in (datasets.config, huggingface_hub.constants):  # both read the environment when they are imported
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="lm-eval cannot load aime24"):
        load_tasks(Questions(["aime24"], {}, 64), tmp_path)


def test_repeats_are_samples_of_the_same_problems(tmp_path: Path) -> None:
    answers = run_side(tmp_path, "served", MockPlan(), repeats=3, temperature=0.7)
    frame = pd.DataFrame(answers.rows)
    assert sorted(frame.groupby("sample")["id"].nunique().tolist()) == [40, 40, 40]
    source = frame.assign(side="source")
    left, right = paired_arrays(problems_frame([*source.to_dict("records"), *answers.rows]))
    assert left.shape == right.shape == (40, 3)
    result = verdicts(problems_frame([*source.to_dict("records"), *answers.rows]), 0.05, 0.05, 0.8)["all"]
    assert (result.problems, result.verdict) == (40, "UNDERPOWERED")  # 40 clusters, not 120 problems


def test_some_problems_alone_can_be_asked(tmp_path: Path) -> None:
    answers = run_side(tmp_path, "source", MockPlan(), only={"math": [3, 5]})
    assert [row["id"] for row in answers.rows] == ["math-3", "math-5"]
    assert answers.places["math", "math-5"] == ("math", 5)
