"""Accuracy through lm-eval: the same problems put to two endpoints, every raw answer kept, then the paired test.

lm-eval asks (its own API model class, many requests in flight, greedy), filters and scores; this module names the
tasks, keeps each reply's usage for the acceptance figures, and pairs the two sides by problem.

It refuses a problem that only one side answered, and an endpoint that cannot answer at all: neither is ever a wrong
answer.

Run: `python -m tasks.validate.accuracy PROBLEMS BASE_URL MODEL` prints the share of right answers by domain.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from specs.errors import InputError, NetworkError, StageFailed
from tasks.validate.problems import LM_EVAL_NAMES, Problem, by_task, read_problems
from tasks.validate.statistics import PairedResult, compare, score_interval
from tasks.validate.tables import Problems, check

SHARED_TASK = Path(__file__).parent / "lm_tasks" / "answer_line.yaml"
TRIES = 3  # lm-eval's own, with 1 to 10 s between them


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


@dataclass
class Answers:
    """What one side said: rows of problems.parquet, and (task, usage) of each reply in no particular order."""

    rows: list[dict[str, Any]]
    usages: list[tuple[str, Mapping[str, Any]]]


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
    side: Side, tasks: Sequence[str], local: Mapping[str, Sequence[Problem]], folder: Path, max_new_tokens: int,
    samples: int | None = None, on_answer: Callable[[int], None] | None = None,
) -> Answers:  # fmt: skip
    """Puts every task to one endpoint.

    Raises NetworkError when it does not answer within the limits, after lm-eval's retries.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    named = [task for task in tasks if task not in local]
    manager = TaskManager(include_path=str(write_tasks(local, folder)), include_defaults=bool(named))
    wanted = [task if task in local else LM_EVAL_NAMES[task] for task in tasks]
    try:
        loaded = manager.load(wanted)
    except Exception as error:  # lm-eval loads arbitrary task code and data sets: anything can come out of it
        raise InputError(
            f"lm-eval cannot load {', '.join(wanted)}: {error}",
            "validate.accuracy.tasks",
            "check its data is reachable",
        ) from error
    for task in loaded["tasks"].values():
        task.set_config(
            key="generation_kwargs",
            value={"max_gen_toks": max_new_tokens, "do_sample": False, "temperature": 0.0},
            update=True,
        )
    usages: list[tuple[str, Mapping[str, Any]]] = []
    model = _api_model(side, usages, on_answer)
    try:
        # `evaluate` and not `simple_evaluate`: the same work without seconds of collecting environment information.
        result = evaluate(
            model, loaded, limit=None if not named else samples, bootstrap_iters=0, apply_chat_template=True
        )
    except (
        Exception
    ) as error:  # aiohttp, asyncio and lm-eval each have their own; all mean that the endpoint did not answer
        raise NetworkError(
            f"{side.name} did not answer: {type(error).__name__} {error}", side.base_url, "look at the server's log"
        ) from error
    owner = {problem.prompt: task for task, problems in local.items() for problem in problems}
    counted = [(owner.get(prompt, ""), usage) for prompt, usage in usages]
    return Answers(
        _rows(result["samples"], side.name, {LM_EVAL_NAMES.get(task, task): task for task in tasks}), counted
    )


def _api_model(side: Side, usages: list[Any], on_answer: Callable[[int], None] | None) -> Any:
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
        max_retries=TRIES, timeout=int(side.timeout_s), tokenizer_backend=None, eos_string="",
    )  # fmt: skip


def _rows(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], side: str, names: Mapping[str, str]
) -> list[dict[str, Any]]:
    rows = []
    for lm_name, records in samples.items():
        task = names.get(lm_name) or next(
            (ours for theirs, ours in names.items() if lm_name.startswith(theirs)), lm_name
        )
        first_filter = records[0]["filter"] if records else ""
        for record in records:
            if record["filter"] != first_filter:
                continue
            identity = record["doc"].get("id") if isinstance(record["doc"], dict) else None
            rows.append({
                "task": task, "id": str(identity or f"{lm_name}/{record['doc_id']}"), "side": side, "sample": 0,
                "answer": str(record["resps"][0][0]), "target": str(record["target"]),
                "correct": float(record[record["metrics"][0]]),
            })  # fmt: skip
    return rows


def problems_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """problems.parquet, checked."""
    return check(pd.DataFrame(list(rows), columns=list(Problems.to_schema().columns)), Problems, "problems.parquet")


def paired_arrays(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """(source, served) as [problem, sample], in the order of the problems.

    Raises StageFailed when one side lacks a problem.
    """
    sides = []
    for name in ("source", "served"):
        wide = frame[frame["side"] == name].pivot(index=["task", "id"], columns="sample", values="correct")
        sides.append(wide.sort_index())
    source, served = sides
    if not source.index.equals(served.index) or source.isna().to_numpy().any() or served.isna().to_numpy().any():
        odd = source.index.symmetric_difference(served.index)
        named = f", first {odd[0]}" if len(odd) else ""
        raise StageFailed(
            f"source and served did not answer the same problems{named}", "problems.parquet", "run validate again"
        )
    return source.to_numpy(float), served.to_numpy(float)


ALL_TASKS = "all"


def verdicts(frame: pd.DataFrame, margin: float, alpha: float, power: float) -> dict[str, PairedResult]:
    """The paired test over all problems (`all`) and by task.

    `all` decides, with one exception: a task shown to be worse than the margin (alpha shared among the tasks) fails the
    whole, however good the others are. Short of that a task alone is UNDERPOWERED, not FAIL: four tasks tested at
    power 0.8 would fail every second good model.
    """
    tasks = sorted(frame["task"].unique())
    results = {ALL_TASKS: compare(*paired_arrays(frame), margin=margin, alpha=alpha, power=power)}
    for task in tasks:
        result = compare(*paired_arrays(frame[frame["task"] == task]), margin=margin, alpha=alpha, power=power)
        shown_worse = score_interval(result.gains, result.losses, result.problems, alpha / len(tasks))[1] < -margin
        if result.verdict != "PASS":
            result = replace(result, verdict="FAIL" if shown_worse else "UNDERPOWERED")
        if result.verdict == "FAIL":
            results[ALL_TASKS] = replace(results[ALL_TASKS], verdict="FAIL", samples_needed=0)
        results[task] = result
    return results


def accuracy_metrics(results: Mapping[str, PairedResult]) -> dict[str, float]:
    """`accuracy.<task>.{source,served,difference,low,high,problems}`; `accuracy.difference` and the like over all."""
    metrics: dict[str, float] = {}
    for task, result in results.items():
        prefix = "accuracy" if task == ALL_TASKS else f"accuracy.{task}"
        values = {
            "source": result.source,
            "served": result.served,
            "difference": result.difference,
            "low": result.lower,
            "high": result.upper,
            "problems": float(result.problems),
        }
        metrics.update({f"{prefix}.{name}": value for name, value in values.items()})
    return metrics


def main() -> None:
    path, url, model = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    problems = read_problems(path)
    tasks = sorted({problem.domain for problem in problems})
    local = by_task(problems, tasks, None, str(path))
    answers = ask(Side("served", url, model), tasks, local, Path(".kilotok") / "lm_tasks", max_new_tokens=256)
    print(pd.DataFrame(answers.rows).groupby("task")["correct"].agg(["mean", "count"]))


if __name__ == "__main__":
    main()
