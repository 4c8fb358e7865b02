"""The quantized target answers the training prompts, through its chat template: what the draft head learns.

Answers go to shard files as they are finished, so a kill -9 costs one shard; token ids are recorded, so nothing is ever
tokenised twice. Refuses to write answers itself, and to hand on a set of which too much is empty or cut off.
Run it: `kilotok run SPEC` (stage synthesize), or `python -m tasks.child JOB.json` by hand.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specs.errors import IntegrityError, StageFailed
from tasks.deployment.plain import Starter, plain_server
from tasks.edges.service import post_json
from tasks.job import Job, Progress
from tasks.prompts import Prompt, balanced, read_prompts, resolve, template_sha256

SHARD = 128  # prompts: a few seconds of work on the slowest machine we have
BATCH = 16
ANSWER_TIMEOUT_S = 1800.0
BAD_SHARE = 0.05  # more empty or truncated answers than this and the head would learn to stop, or never to
RULES = {"empty": "answers are empty", "truncated": "answers are cut off at max_new_tokens"}


@dataclass(frozen=True)
class Answer:
    """What the target said to one prompt; the end-of-turn token is part of the ids, not of the text."""

    text: str
    prompt_token_ids: list[int]
    answer_token_ids: list[int]
    finish_reason: str


Answerer = Callable[[list[Prompt]], Iterable[tuple[int, Answer]]]  # (index, answer), in any order


@dataclass(frozen=True)
class Work:
    """What is to be answered: shards of prompts, those of them that are not done, and where answers go."""

    folder: Path
    shards: list[list[Prompt]]
    pending: list[int]
    max_new_tokens: int
    progress: Progress


def build(job: Job, progress: Progress, starter: Starter | None = None) -> dict[str, float]:
    """answers.jsonl and summary.json in `job.out`; returns `synthesize.*` metrics. `starter` is for tests."""
    spec, checkpoint = job.spec["draft"]["data"], job.inputs["quantize"]
    path = resolve(spec["prompts"], job)
    prompts = balanced(read_prompts(path), int(spec["samples"]), path)
    template = template_sha256(checkpoint)
    shards = [prompts[i : i + SHARD] for i in range(0, len(prompts), SHARD)]
    folder = job.scratch / "answers"
    folder.mkdir(exist_ok=True)
    pending = [i for i in range(len(shards)) if not shard_path(folder, i).exists()]
    if pending:
        work = Work(folder, shards, pending, int(spec["max_new_tokens"]), progress)
        if job.spec.get("engine", {}).get("backend", "native") == "trtllm":
            with_trtllm(job, checkpoint, work, starter)
        else:
            with_engine(checkpoint, job.scratch, work)
    rows = [row for i in range(len(shards)) for row in read_shard(shard_path(folder, i), shards[i])]
    summary = summarise(rows, template)
    check_answers(summary, str(path))
    write_atomic(job.out / "answers.jsonl", (json.dumps(row, ensure_ascii=False) for row in rows))
    write_atomic(job.out / "summary.json", [json.dumps(summary, indent=2, ensure_ascii=False)])
    metrics = {f"synthesize.mean_tokens.{d}": v["mean_answer_tokens"] for d, v in summary["domains"].items()}
    metrics["synthesize.answers"] = float(len(rows))
    metrics["synthesize.answer_tokens"] = float(sum(len(row["answer_token_ids"]) for row in rows))
    metrics["synthesize.bad_share"] = max(summary["share"].values())
    return metrics


def with_engine(checkpoint: Path, scratch: Path, work: Work) -> None:
    """Build a bundle without a draft, answer the pending shards with it, and close it."""
    from engine_plugins.native.bundle import build_bundle
    from engine_plugins.native.engine import Engine
    from engine_plugins.native.tokenizer import ChatTokenizer

    work.progress.note("build engine")
    tokenizer = ChatTokenizer(checkpoint)
    longest = max(len(encode(tokenizer, prompt)) for shard in work.shards for prompt in shard)
    bundle = scratch / "bundle"
    build_bundle(checkpoint, bundle, max_seq_len=longest + work.max_new_tokens + 1, max_batch_size=BATCH)
    if template_sha256(bundle) != template_sha256(checkpoint):
        raise IntegrityError("the bundle is served with another chat template", "chat_template.jinja", "rebuild it")
    engine = Engine(bundle, speculate=False)
    try:
        answer_shards(engine_answerer(engine, work.max_new_tokens), work)
    finally:
        engine.close()


def with_trtllm(job: Job, checkpoint: Path, work: Work, starter: Starter | None) -> None:
    """Start trtllm-serve on the checkpoint, without a draft and with many requests in flight; answer, end it."""
    from engine_plugins.native.tokenizer import ChatTokenizer
    from engine_plugins.trtllm.bundle import PLAIN_BATCH

    tokenizer, end = ChatTokenizer(checkpoint), end_of_turn_id(checkpoint)
    with plain_server(job.spec, checkpoint, job.scratch, work.progress.note, starter) as url:
        name = str(job.spec["name"])
        answer_shards(http_answerer(url, name, tokenizer, end, work.max_new_tokens, PLAIN_BATCH), work)


def end_of_turn_id(checkpoint: Path) -> int | None:
    """The token that ends an answer, by the tokenizer's own account."""
    from tokenizers import Tokenizer

    config = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    token = config.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    found: int | None = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).token_to_id(token) if token else None
    return found


def answer_shards(answer: Answerer, work: Work) -> None:
    """Write each pending shard in one rename, so that a shard file that exists is whole."""
    total = sum(map(len, work.shards))
    done = total - sum(len(work.shards[i]) for i in work.pending)
    for i in work.pending:
        rows: dict[int, dict[str, Any]] = {}
        for index, said in answer(work.shards[i]):
            rows[index] = record(work.shards[i][index], said)
            done += 1
            work.progress(done, total, f"{len(said.answer_token_ids)} tokens")
        write_atomic(shard_path(work.folder, i), (json.dumps(rows[k], ensure_ascii=False) for k in sorted(rows)))


def engine_answerer(engine: Any, max_new_tokens: int) -> Answerer:
    """Greedy answers by the native engine, as a continuous batch."""
    from engine_plugins.native.engine import SamplingParams

    params = SamplingParams(max_tokens=max_new_tokens)

    def answer(prompts: list[Prompt]) -> Iterator[tuple[int, Answer]]:
        ids = [encode(engine, prompt) for prompt in prompts]
        requests = {request.id: (i, request) for i, request in enumerate(engine.submit(p, params) for p in ids)}
        while requests:
            for event in engine.step():
                if event.finish_reason is not None:
                    i, request = requests.pop(event.request_id)
                    yield i, Answer(request.text, ids[i], list(request.output_ids), event.finish_reason)

    return answer


def http_answerer(
    url: str, model: str, tokenizer: Any, end_of_turn: int | None, max_new_tokens: int, in_flight: int
) -> Answerer:
    """Greedy answers by trtllm-serve, as token ids both ways: `detokenize: false` gives back what was generated."""

    def ask(prompt: Prompt) -> Answer:
        ids = encode(tokenizer, prompt)
        body = {"model": model, "prompt": ids, "max_tokens": max_new_tokens, "temperature": 0, "detokenize": False}
        try:
            choice = post_json(f"{url}/v1/completions", body, {}, ANSWER_TIMEOUT_S)["choices"][0]
            said = [int(token) for token in choice["token_ids"]]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise StageFailed(f"trtllm-serve did not answer {prompt.id}: {error}", url, "read its log") from None
        reason = str(choice["finish_reason"])
        if reason == "stop" and end_of_turn is not None and said[-1:] != [end_of_turn]:
            said.append(end_of_turn)  # a version may keep the token that ended it to itself
        return Answer(tokenizer.decode(said), ids, said, reason)

    def answer(prompts: list[Prompt]) -> Iterator[tuple[int, Answer]]:
        with ThreadPoolExecutor(in_flight) as pool:
            yield from enumerate(pool.map(ask, prompts))

    return answer


def encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    """One user turn through the served chat template."""
    return [int(t) for t in tokenizer.encode_chat([{"role": "user", "content": prompt.prompt}])]


def record(prompt: Prompt, said: Answer) -> dict[str, Any]:
    """One line of answers.jsonl."""
    return {
        "id": prompt.id,
        "domain": prompt.domain,
        "prompt": prompt.prompt,
        "answer": said.text,
        "prompt_token_ids": said.prompt_token_ids,
        "answer_token_ids": said.answer_token_ids,
        "finish_reason": said.finish_reason,
    }


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.jsonl"


def read_shard(path: Path, prompts: list[Prompt]) -> list[dict[str, Any]]:
    """A finished shard; one that answers other prompts than asked is refused."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if [row["id"] for row in rows] != [prompt.id for prompt in prompts]:
        raise IntegrityError("the shard answers other prompts than the spec asks for", str(path), "delete the shard")
    return rows


def summarise(rows: list[dict[str, Any]], template: str) -> dict[str, Any]:
    """summary.json: counts and lengths per domain, shares of bad answers, the template's digest."""
    lengths: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        lengths[row["domain"]].append(len(row["answer_token_ids"]))
    empty = sum(not row["answer"].strip() for row in rows)
    truncated = sum(row["finish_reason"] == "length" for row in rows)
    return {
        "chat_template_sha256": template,
        "answers": len(rows),
        "share": {"empty": empty / len(rows), "truncated": truncated / len(rows)},
        "domains": {
            domain: {"answers": len(n), "mean_answer_tokens": sum(n) / len(n)} for domain, n in sorted(lengths.items())
        },
    }


def check_answers(summary: dict[str, Any], where: str, limit: float = BAD_SHARE) -> None:
    """Too many empty or truncated answers spoil a head without lowering its loss."""
    for kind, share in summary["share"].items():
        if share > limit:
            raise IntegrityError(
                f"{share:.1%} of the {RULES[kind]}, the limit is {limit:.0%}",
                where,
                "raise draft.data.max_new_tokens"
                if kind == "truncated"
                else "look at the prompts and the chat template",
            )


def write_atomic(path: Path, lines: Iterable[str]) -> None:
    """All lines or no file."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(temporary, path)
