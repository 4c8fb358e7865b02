"""Accuracy through lm-eval: the same problems put to two endpoints, every raw answer kept.

lm-eval asks (its own API model class, many requests in flight), filters and scores; this module names the tasks,
repeats them with other seeds, and keeps each reply's usage for the acceptance figures. `paired.py` judges.

It refuses an endpoint that cannot answer: that is never a wrong answer.

Run: `python -m tasks.validate.accuracy PROBLEMS BASE_URL MODEL` prints the share of right answers by domain.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from specs.errors import InputError, NetworkError
from specs.validation import NAMED_TASKS
from tasks.validate.problems import Problem, by_task, read_problems

SHARED_TASK = Path(__file__).parent / "lm_tasks" / "answer_line.yaml"
TRIES = 3  # lm-eval's own, with 1 to 10 s between them
SEED = 1234


@dataclass(frozen=True)
class Side:
    """One endpoint under test: `name` is `source` or `served`.

    `in_flight` only saves time; it must fit the server's queue.
    """

    name: str
    base_url: str
    model: str
    api_key: str = field(default="", repr=False)
    in_flight: int = 16
    timeout_s: float = 120.0


@dataclass(frozen=True)
class Questions:
    """What both sides are asked, and how: `local` problems by task, the others by lm-eval's own name."""

    tasks: Sequence[str]
    local: Mapping[str, Sequence[Problem]]
    max_new_tokens: int
    samples: int | None = None  # per named task; local ones are cut before
    repeats: int = 1
    temperature: float = 0.0
    run_generated_code: bool = False

    @property
    def named(self) -> list[str]:
        return [task for task in self.tasks if task not in self.local]

    @property
    def names(self) -> dict[str, str]:
        """lm-eval's name -> ours."""
        return {task if task in self.local else NAMED_TASKS[task][0]: task for task in self.tasks}


@dataclass
class Answers:
    """What one side said: rows of problems.parquet, and (task, usage) of each reply in no particular order.

    `places` is where lm-eval has each problem: (task, id) -> (lm-eval's task, number).
    """

    rows: list[dict[str, Any]]
    usages: list[tuple[str, Mapping[str, Any]]]
    places: dict[tuple[str, str], tuple[str, int]] = field(default_factory=dict)


def write_tasks(local: Mapping[str, Sequence[Problem]], folder: Path) -> Path:
    """One lm-eval task per domain: its problems as JSON lines and a YAML that includes the shared part."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, problems in local.items():
        lines = folder / f"{task}.jsonl"
        lines.write_text("".join(json.dumps(asdict(problem)) + "\n" for problem in problems), encoding="utf-8")
        config = {"include": str(SHARED_TASK), "task": task, "dataset_kwargs": {"path": str(lines)}}
        (folder / f"{task}.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return folder


def ask(
    side: Side, how: Questions, folder: Path, on_answer: Callable[[int], None] | None = None,
    only: Mapping[str, Sequence[int]] | None = None,
) -> Answers:  # fmt: skip
    """Puts the questions to one endpoint, `how.repeats` times each; `only` picks some by lm-eval task and number.

    Raises NetworkError when it does not answer within the limits, after lm-eval's retries.
    """
    answers = Answers([], [])
    for sample in range(how.repeats):
        _ask_once(side, how, folder, answers, sample, on_answer, only)
    return answers


def _ask_once(
    side: Side, how: Questions, folder: Path, answers: Answers, sample: int,
    on_answer: Callable[[int], None] | None, only: Mapping[str, Sequence[int]] | None,
) -> None:  # fmt: skip
    from lm_eval.evaluator import evaluate

    loaded = load_tasks(how, folder)
    if only is not None:
        loaded = {"tasks": {name: task for name, task in loaded["tasks"].items() if only.get(name)}}
    for task in loaded["tasks"].values():
        sampling = {"do_sample": how.temperature > 0, "temperature": how.temperature}
        task.set_config(key="generation_kwargs", value={"max_gen_toks": how.max_new_tokens, **sampling}, update=True)
    usages: list[tuple[str, Mapping[str, Any]]] = []
    done = len(answers.usages)
    model = _api_model(side, usages, on_answer and (lambda n: on_answer(done + n)), SEED + sample)
    try:
        # `evaluate` and not `simple_evaluate`: the same work without seconds of collecting environment information.
        result = evaluate(
            model, loaded, limit=how.samples if how.named and only is None else None, samples=only, bootstrap_iters=0,
            apply_chat_template=True, fewshot_as_multiturn=True, confirm_run_unsafe_code=how.run_generated_code,
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - aiohttp, asyncio and lm-eval each have their own; all mean: no answer
        raise NetworkError(
            f"{side.name} did not answer: {type(error).__name__} {error}", side.base_url, "look at the server's log"
        ) from error
    owner = {problem.prompt: task for task, problems in how.local.items() for problem in problems}
    answers.usages += [(owner.get(prompt, ""), usage) for prompt, usage in usages]
    for row, place in _rows(result["samples"], side.name, how.names, sample):
        answers.rows.append(row)
        answers.places[row["task"], row["id"]] = place


def load_tasks(how: Questions, folder: Path) -> dict[str, Any]:
    """lm-eval's tasks. Raises InputError when one is unknown to the installed lm-eval or its data is out of reach."""
    from lm_eval.tasks import TaskManager

    if how.run_generated_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric's own second key, beside lm-eval's
    random.seed(SEED)  # GPQA shuffles its choices as it loads: both sides must see the same order
    manager = TaskManager(include_path=str(write_tasks(how.local, folder)), include_defaults=bool(how.named))
    missing = sorted(set(how.names) - set(manager.all_tasks))
    if missing:
        raise InputError(
            f"the installed lm-eval has no task {', '.join(missing)}",
            "validate.accuracy.tasks",
            "install lm-eval 0.4.13",
        )
    try:
        loaded: dict[str, Any] = manager.load(list(how.names))
        return loaded
    except Exception as error:  # noqa: BLE001 - lm-eval runs task code and fetches data: anything can come out of it
        raise InputError(
            f"lm-eval cannot load {', '.join(how.names)}: {error}",
            "validate.accuracy.tasks",
            "check its data is reachable",
        ) from error


def _api_model(side: Side, usages: list[Any], on_answer: Callable[[int], None] | None, seed: int) -> Any:
    """lm-eval's chat-completions model, which also keeps each reply's usage beside the prompt it answers."""
    from lm_eval.models.openai_completions import LocalChatCompletion

    prompt: ContextVar[str] = ContextVar("prompt", default="")

    class Endpoint(LocalChatCompletion):
        @property
        def api_key(self) -> str:
            return side.api_key

        async def amodel_call(self, session: Any, sem: Any, messages: Any, **kwargs: Any) -> Any:
            prompt.set(json.loads(messages[0].prompt)[-1]["content"])
            return await super().amodel_call(session, sem, messages, **kwargs)

        def parse_generations(self, outputs: Any, **kwargs: Any) -> list[str]:
            for reply in outputs if isinstance(outputs, list) else [outputs]:
                if not isinstance(reply, dict) or not reply.get("choices"):
                    # lm-eval would take it for an empty answer, and the model for a fool
                    raise ValueError(f"a reply without choices: {str(reply)[:200]}")
                usages.append((prompt.get(), reply.get("usage") or {}))
            if on_answer:
                on_answer(len(usages))
            return super().parse_generations(outputs, **kwargs)

    return Endpoint(
        base_url=f"{side.base_url.rstrip('/').removesuffix('/v1')}/v1/chat/completions", model=side.model,
        num_concurrent=max(side.in_flight, 2),  # at 1 lm-eval takes a path of its own, without the hooks above
        max_retries=TRIES, timeout=int(side.timeout_s), tokenizer_backend=None, eos_string="", seed=seed,
    )  # fmt: skip


def _rows(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], side: str, names: Mapping[str, str], sample: int
) -> Iterator[tuple[dict[str, Any], tuple[str, int]]]:
    for lm_name, records in samples.items():
        # A group's members are named after it: mmlu_pro_law is mmlu_pro's.
        task = names.get(lm_name) or next(ours for theirs, ours in names.items() if lm_name.startswith(theirs))
        wanted = NAMED_TASKS[task][1] if task in NAMED_TASKS else ""
        for record in records:
            if record["filter"] != (wanted or records[0]["filter"]):
                continue
            identity = record["doc"].get("id") if isinstance(record["doc"], dict) else None
            yield {
                "task": task, "id": str(identity or f"{lm_name}/{record['doc_id']}"), "side": side, "sample": sample,
                "answer": str(record["resps"][0][0]), "target": str(record["target"]),
                "correct": float(record[record["metrics"][0]]),
            }, (lm_name, int(record["doc_id"]))  # fmt: skip


def main() -> None:
    path, url, model = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    problems = read_problems(path)
    tasks = sorted({problem.domain for problem in problems})
    local = by_task(problems, tasks, None, str(path))
    how = Questions(tasks, local, max_new_tokens=256)
    answers = ask(Side("served", url, model), how, Path(".kilotok") / "lm_tasks")
    print(pd.DataFrame(answers.rows).groupby("task")["correct"].agg(["mean", "count"]))


if __name__ == "__main__":
    main()
