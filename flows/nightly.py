"""One night of one spec as a Prefect flow: look, rebuild what changed, measure what is live, conclude, tell.

What the night was is in the store (`nights/SPEC/NIGHT`); Prefect shows it and carries the notifications. A gate that
failed fails the run, since nothing new is live; a figure that got worse is an event that automations listen to.
Refuses to hold logic: a step is in `tasks/nightly/`. Run it: `prefect deployment run 'nightly/tiny-llama4-cpu'`.
"""

from __future__ import annotations

import re
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.states import Completed, Failed

from flows.rebuild import is_transient, rebuild
from specs.errors import GateFailed
from tasks.nightly import night as nights
from tasks.nightly import notify, page


@task(
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[5, 60],
    retry_condition_fn=is_transient,
    task_run_name="{name}",
)
def step(tonight: nights.Night, name: str) -> object:
    """One of the night's own steps, by name; its result is small and shown."""
    return getattr(tonight, name)()


@flow(name="nightly", validate_parameters=True)
def nightly(spec: str, store: str = "", night: str = "") -> Any:
    """One night; ends Completed as Unchanged or Promoted, or Failed, as Kept when only a gate failed."""
    with nights.opened(spec, store, night, get_run_logger().info, publish) as tonight:
        step(tonight, "look")
        try:
            # Its body, in this run: as a run of its own it would end a second later, when its heartbeat has stopped.
            tonight.built(rebuild.fn(spec, tonight.overrides, store, tonight.id))
        except GateFailed as error:
            tonight.refused(error)
        step(tonight, "measure")
        step(tonight, "conclude")
    name, summary = tonight.record["state"].capitalize(), tonight.record["summary"]
    if tonight.record["state"] == "kept":
        return Failed(name=name, message=summary)  # of a failed state Prefect wants no result but an error
    return Completed(name=name, message=summary, data=tonight.record)


def publish(tonight: nights.Night) -> None:
    """The page, the artifact, the event for automations, the commit status: also of a night that failed."""
    page.write(tonight.store, tonight.spec.name)
    key = re.sub(r"[^a-z0-9]+", "-", tonight.spec.name.lower())
    create_markdown_artifact(page.markdown(tonight.record), key=f"night-{key}", description=tonight.record["summary"])
    if tonight.alarms:
        emit_event(
            "kilotok.night.regressed",
            resource={"prefect.resource.id": f"kilotok.spec.{tonight.spec.name}", "kilotok.night": tonight.id},
            payload={"summary": tonight.record["summary"]},
        )
    notify.commit_status(tonight.spec, tonight.record)
