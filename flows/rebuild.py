"""The main path as a Prefect flow: from a spec to a promoted endpoint and a report.

Prefect orchestrates; the store is the truth, so every task looks its digest up before it builds and Prefect's
own caching is
off. Refuses to hold logic: a stage is in `tasks/`. Run it: `prefect deployment run 'rebuild/tiny-llama4-cpu'`
or `kilotok run`.
"""

from __future__ import annotations

from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.narrate import narrate, publish_record
from specs.errors import GateFailed, Transient
from specs.receipts import Receipt
from tasks.build import Build


def is_transient(_task: Any, _run: Any, state: Any) -> bool:
    """Retry what may pass next time; a wrong spec or a failed gate fails once."""
    return isinstance(state.result(raise_on_failure=False), Transient)


@task(
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[5, 60],
    retry_condition_fn=is_transient,
    task_run_name="{stage}",
)
def run(build: Build, stage: str, *_after: Receipt) -> Receipt:
    """Build or reuse one stage; `_after` draws the arrows in Prefect's graph."""
    return build.run(stage)


@flow(name="rebuild", validate_parameters=True)
def rebuild(spec: str, overrides: list[str] | None = None, store: str = "", build_id: str = "") -> dict[str, Any]:
    """Rebuild what changed, measure it, promote it if every gate passes; returns the build's record."""
    build = Build.open(spec, overrides or [], store, narrate(), build_id)
    source = run(build, "download")
    checkpoint = run(build, "quantize", source)
    answers = run(build, "synthesize", checkpoint)
    draft = run(build, "train_draft", source, answers)
    bundle = run(build, "build_engine", checkpoint, draft)
    candidate = run(build, "deploy", bundle)
    measured = run(build, "validate", candidate)
    verdict = build.outcome()["verdict"]
    if verdict == "PASS":
        measured = run(build, "promote", measured)
    else:
        build.discard_candidate()
    run(build, "report", measured)
    record = build.write_record(verdict)
    publish_record(build, record)
    if verdict != "PASS":
        raise GateFailed(f"verdict {verdict}: nothing was promoted", build.spec.name, f"read {record['report']}")
    return record
