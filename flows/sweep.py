"""A sweep as a Prefect flow: the points that the predictor found worth it, built and measured one after the other.

Every point is an artifact in the store, so a sweep that was stopped goes on where it was. Refuses to decide what is
best: that is `tasks/predict/sweep.py`. Run it: `kilotok sweep SPEC --over engine.draft_tokens=1..7`.
"""

from __future__ import annotations

from typing import Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from flows.narrate import narrate
from flows.rebuild import is_transient
from specs.load import load_spec
from specs.receipts import Receipt
from tasks.predict.point import STAGE, WITH_POINT
from tasks.runner import StageEvent, run_stage
from tasks.store import Store, open_store

BEFORE = ("download", "quantize", "synthesize", "train_draft", "build_engine")


@task(cache_policy=NO_CACHE, retries=1, retry_condition_fn=is_transient, task_run_name="{name}")
def measure(spec_path: str, overrides: list[str], store: Store, name: str) -> Receipt:
    """Build what the point shares with others once, then its bundle, then measure it."""
    spec, receipts, listen = load_spec(spec_path, overrides), {}, narrate()  # type: Any, dict[str, Receipt], Any
    listen(StageEvent(name, "heading"))
    for stage in (*BEFORE, STAGE.name):
        receipts[stage] = run_stage(stage, spec, receipts, store, listen, registry=WITH_POINT)
    return receipts[STAGE.name]


@flow(name="sweep", validate_parameters=True)
def sweep(spec: str, points: list[dict[str, Any]], store: str) -> list[dict[str, float]]:
    """`points` are {"name", "overrides"}; returns the metrics of each, in order."""
    opened, measured = open_store(store), []
    for point in points:
        receipt = measure(spec, point["overrides"], opened, point["name"])
        measured.append({name.removeprefix("point."): value for name, value in receipt.metrics.items()})
    rows = [{"point": point["name"], **found} for point, found in zip(points, measured, strict=True)]
    create_table_artifact(rows or [{"point": "none"}], key="sweep", description=f"{len(rows)} points of {spec}")
    return measured
