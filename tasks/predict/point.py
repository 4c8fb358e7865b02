"""One point of a sweep, measured: a bundle of the native engine, one user and then as many as its slots.

An artifact like any other, so a sweep that was cut short goes on where it stopped, and a point that two sweeps share is
measured once. Prompts are the spec's own held-out problems, so acceptance is real. Refuses to be a validation: no
HTTP, no accuracy, no gates. Run it: `kilotok sweep SPEC --over engine.draft_tokens=1..7`.
"""

from __future__ import annotations

import json
import statistics
import time
from itertools import chain, zip_longest
from typing import Any

from specs.errors import InputError
from tasks.job import Job, Progress
from tasks.prompts import Prompt, read_prompts, resolve
from tasks.stages import REGISTRY, Stage

PROMPTS = 16  # of one pass, the domains in turn
ROUNDS, MEASURE_S = (
    3,
    5.0,
)  # passes at least, and for at least so long; the best counts, as in every bench of the engine
STAGE = Stage(
    "sweep_point",
    inputs=("build_engine",),
    reads=("engine", "validate.accuracy.problems", "validate.latency.max_new_tokens"),
    packages=("numpy",),
    machine=("cpu", "gpu"),
    entry="tasks.predict.point:build",
    isolated=True,
    accelerator=True,
)
WITH_POINT = {**REGISTRY, STAGE.name: STAGE}


def build(job: Job, progress: Progress) -> dict[str, float]:
    """point.json: `tps_user`, `tps_server` at `users` requests in flight, `acceptance`, `cycle_us`."""
    from engine_plugins.native.engine import Engine

    if job.spec["engine"]["backend"] != "native":
        raise InputError(
            "only the native engine is measured here", "engine.backend", "run the rendered points on a DGX"
        )
    users, limit = job.spec["engine"]["max_batch_size"], job.spec["validate"]["latency"]["max_new_tokens"]
    engine = Engine(job.inputs["build_engine"])
    try:
        problems = _in_turn(read_prompts(resolve(job.spec["validate"]["accuracy"]["problems"], job)))
        chats = [[{"role": "user", "content": problem.prompt}] for problem in problems[: max(PROMPTS, 2 * users)]]
        prompts = [engine.encode_chat(chat) for chat in chats]
        alone: list[dict[str, float]] = []
        crowd: list[float] = []
        started = time.monotonic()
        while len(alone) < ROUNDS or time.monotonic() - started < MEASURE_S:
            alone.append(_one_user(engine, prompts[:PROMPTS], limit))
            crowd.append(_all_users(engine, prompts, users, limit))
            progress(min((time.monotonic() - started) / MEASURE_S, 1.0), 1.0, f"{len(alone)} passes")
    finally:
        engine.close()
    found = max(alone, key=lambda result: result["tps_user"]) | {"tps_server": max(crowd), "users": float(users)}
    (job.out / "point.json").write_text(json.dumps(found, indent=1))
    return {f"point.{name}": float(value) for name, value in found.items()}


def _in_turn(problems: list[Prompt]) -> list[Prompt]:
    """One of each domain, then the next of each: the first sixteen must not all be code."""
    domains: dict[str, list[Prompt]] = {}
    for problem in problems:
        domains.setdefault(problem.domain, []).append(problem)
    return [problem for problem in chain.from_iterable(zip_longest(*domains.values())) if problem is not None]


def _one_user(engine: Any, prompts: list[list[int]], limit: int) -> dict[str, float]:
    """Median over prompts of tokens after the first per second; acceptance and cycle of the same requests."""
    from engine_plugins.native.engine import SamplingParams

    speeds, tokens, cycles, spent = [], 0, 0, 0.0
    for prompt in prompts:
        request = engine.submit(prompt, SamplingParams(max_tokens=limit))
        while not request.output_ids and engine.has_work:
            engine.step()
        first, begin, steps = len(request.output_ids), time.perf_counter(), 0
        while engine.has_work:
            engine.step()
            steps += 1
        seconds, later = time.perf_counter() - begin, len(request.output_ids) - first
        if later > 0:
            speeds.append(later / seconds)
            tokens, cycles, spent = tokens + later, cycles + steps, spent + seconds
    if not speeds:
        raise InputError(
            "no answer has a second token", "validate.accuracy.problems", "give problems with longer answers"
        )
    return {
        "tps_user": statistics.median(speeds), "acceptance": tokens / cycles, "cycle_us": 1e6 * spent / cycles
    }  # fmt: skip


def _all_users(engine: Any, prompts: list[list[int]], users: int, limit: int) -> float:
    """Tokens per second of the server with `users` requests in flight, prefill included."""
    from engine_plugins.native.engine import SamplingParams

    waiting = (prompts * (1 + 2 * users // len(prompts)))[: max(2 * users, PROMPTS)]
    begin = time.perf_counter()
    done = engine.generate(waiting, SamplingParams(max_tokens=limit))
    return sum(len(one.token_ids) for one in done) / (time.perf_counter() - begin)
