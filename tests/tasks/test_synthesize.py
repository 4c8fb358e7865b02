"""Synthesize without a model: the answers come from a function, so every fault can be injected."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from specs.errors import InputError, IntegrityError
from tasks import synthesize
from tasks.job import Progress
from tasks.prompts import Prompt, balanced, read_prompts
from tasks.synthesize import Answer

PROMPTS = [Prompt(f"p{i}", ("code", "math")[i % 2], f"question {i}") for i in range(10)]
SHARDS = [PROMPTS[:4], PROMPTS[4:8], PROMPTS[8:]]


def said(prompt: Prompt, text: str = "yes", reason: str = "stop") -> Answer:
    return Answer(text, [1, 2], [5, 6, 3], reason)


def answerer(prompts: list[Prompt]) -> Iterator[tuple[int, Answer]]:
    for i in reversed(range(len(prompts))):  # a continuous batch finishes in any order
        yield i, said(prompts[i])


def test_answers_keep_the_prompts_order(tmp_path: Path) -> None:
    synthesize.answer_shards(answerer, synthesize.Work(tmp_path, SHARDS, [0, 1, 2], 0, Progress()))
    rows = [r for i in range(3) for r in synthesize.read_shard(synthesize.shard_path(tmp_path, i), SHARDS[i])]
    assert [row["id"] for row in rows] == [prompt.id for prompt in PROMPTS]


def test_a_kill_in_the_middle_costs_one_shard(tmp_path: Path) -> None:
    asked: list[str] = []

    def killed(prompts: list[Prompt]) -> Iterator[tuple[int, Answer]]:
        for i, prompt in enumerate(prompts):
            if prompt.id == "p5":
                raise KeyboardInterrupt
            asked.append(prompt.id)
            yield i, said(prompt)

    with pytest.raises(KeyboardInterrupt):
        synthesize.answer_shards(killed, synthesize.Work(tmp_path, SHARDS, [0, 1, 2], 0, Progress()))
    assert [p.name for p in sorted(tmp_path.glob("*.jsonl"))] == ["shard-00000.jsonl"]
    pending = [i for i in range(3) if not synthesize.shard_path(tmp_path, i).exists()]
    synthesize.answer_shards(answerer, synthesize.Work(tmp_path, SHARDS, pending, 0, Progress()))
    assert pending == [1, 2]
    assert len(list(tmp_path.glob("*.jsonl"))) == 3


def test_a_shard_of_other_prompts_is_refused(tmp_path: Path) -> None:
    synthesize.answer_shards(answerer, synthesize.Work(tmp_path, SHARDS, [0], 0, Progress()))
    with pytest.raises(IntegrityError, match="other prompts"):
        synthesize.read_shard(synthesize.shard_path(tmp_path, 0), SHARDS[1])


@pytest.mark.parametrize(("text", "reason", "message"), [("  ", "stop", "empty"), ("yes", "length", "cut off")])
def test_too_many_bad_answers(text: str, reason: str, message: str) -> None:
    rows = [synthesize.record(p, said(p)) for p in PROMPTS]
    rows[0] = synthesize.record(PROMPTS[0], said(PROMPTS[0], text, reason))
    with pytest.raises(IntegrityError, match=message):
        synthesize.check_answers(synthesize.summarise(rows, "hash"), "prompts.jsonl")


def test_summary_counts_by_domain_and_records_the_template() -> None:
    summary = synthesize.summarise([synthesize.record(p, said(p)) for p in PROMPTS], "hash")
    assert summary["chat_template_sha256"] == "hash"
    assert summary["domains"]["math"] == {"answers": 5, "mean_answer_tokens": 3.0}


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines))
    return path


GOOD = json.dumps({"id": "a", "domain": "code", "prompt": "x"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b", ', "broken JSON"),
        ("[1]", "not a JSON object"),
        ('{"id": "b", "prompt": "x"}', "'domain' is missing"),
        ('{"id": "b", "domain": "code", "prompt": " "}', "'prompt' is missing"),
        (GOOD, "used twice"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_prompts(write(tmp_path / "prompts.jsonl", [GOOD, "", line]))
    assert error.value.where.endswith("prompts.jsonl:3")


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="empty"):
        read_prompts(write(tmp_path / "prompts.jsonl", [""]))


def test_domains_get_equal_shares_in_file_order(tmp_path: Path) -> None:
    assert [p.id for p in balanced(PROMPTS, 6, tmp_path)] == ["p0", "p1", "p2", "p3", "p4", "p5"]


def test_a_domain_without_enough_prompts_is_refused(tmp_path: Path) -> None:
    lonely = [p for p in PROMPTS if p.domain == "code" or p.id == "p1"]
    with pytest.raises(InputError, match="'math' has 1 prompts, 3 are asked"):
        balanced(lonely, 6, tmp_path)
