"""Deployments of this machine: start again, promote, go back, drain, ask. The stages and the command line come in here.

It refuses to import a stage, and to trust a pid or a pointer without looking at the process.

Run it: `kilotok deployments`, `kilotok promote SPEC`, `kilotok rollback SPEC`, `kilotok drain SPEC`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specs.errors import GateFailed, InputError, StageFailed
from tasks.deployment import slots
from tasks.deployment.record import Record, is_locked, locked
from tasks.deployment.steps import Deployment, OnStep, opened, silent


def load_plan(deployment_json: Path) -> dict[str, Any]:
    """The frozen plan in a deploy artifact."""
    try:
        return dict(json.loads(deployment_json.read_text())["plan"])
    except (OSError, ValueError, KeyError) as error:
        raise StageFailed(f"no deployment plan: {error}", str(deployment_json), "run `kilotok run` again") from None


def ensure_running(deployment_json: Path, on_step: OnStep = silent) -> str:
    """Start the artifact's server unless it runs; returns its own base URL (not the public one)."""
    plan = load_plan(deployment_json)
    with opened(Path(plan["store"]), plan["name"], plan, on_step) as deployment:
        return slots.base_url(deployment.record.slots[deployment.start(plan)])


def traces(deployment_json: Path) -> list[Path]:
    """What the profiler left of the candidate's start; [] for an engine that leaves none."""
    plan = load_plan(deployment_json)
    found = Record(Path(plan["store"]), plan["name"]).load().slots.values()
    own = [slot for slot in found if slot.get("plan", {}).get("digest") == plan["digest"]]
    return sorted(path for slot in own for path in (slots.folder(slot) / "evidence").glob("trace*"))


@contextmanager
def set_aside(deployment_json: Path, on_step: OnStep = silent) -> Iterator[None]:
    """drain_swap: the candidate lends its memory for the time of a block, and comes back. blue_green: nothing to do."""
    plan = load_plan(deployment_json)
    if plan["strategy"] != "drain_swap":
        yield
        return
    with opened(Path(plan["store"]), plan["name"], plan, on_step) as deployment:
        deployment.set_aside(plan)
    try:
        yield
    finally:
        with opened(Path(plan["store"]), plan["name"], plan, on_step) as deployment:
            deployment.bring_back(plan)


# For the command line: `store` is tasks.store's; deployments live in this machine's part of it.


def promote_build(store: Any, name: str, build: str | None = None) -> str:
    """Make a build's server the live one, starting it if it does not run; returns the public URL.

    Raises GateFailed for a build that did not pass, InputError for one that there is not.
    """
    from tasks.status import build_record

    record = build_record(store, build or name)
    if record["spec"] != name:
        raise InputError(f"build {record['build']} is of {record['spec']}", name, "name a build of this spec")
    if record["verdict"] != "PASS":
        what = f"the verdict of build {record['build']} is {record['verdict']}: nothing is promoted"
        raise GateFailed(what, name, "read its report, or name a build that passed with --build")
    uri = next(stage["uri"] for stage in record["stages"] if stage["stage"] == "deploy")
    plan = load_plan(store.checkout(store.load(uri)) / "deployment.json")
    with opened(Path(plan["store"]), name, plan) as deployment:
        return deployment.promote(plan)


def rollback(store: Any, name: str) -> str:
    """One call back to the version before; returns the public URL."""
    _must_exist(store, name)
    with opened(store.local.root, name) as deployment:
        return deployment.rollback()


def discard(store: Any, name: str) -> int:
    """Stop a candidate that failed its gates; returns how many processes were stopped."""
    with opened(store.local.root, name) as deployment:
        return deployment.discard()


def drain(store: Any, name: str) -> int:
    """Stop admitting, finish what runs, stop; returns how many processes were stopped."""
    _must_exist(store, name)
    with locked(store.local.root, name) as record:  # no recovery: what it would start, this would stop
        return Deployment(record).drain()


def live_url(store: Any, name: str) -> str | None:
    """The public URL, if the live server runs."""
    found = status(store, name)
    return found["url"] if found and found["state"] == "live" else None


def status(store: Any, name: str) -> dict[str, Any] | None:
    """What is recorded and what is true; None for a deployment that never was."""
    record = Record(store.local.root, name)
    if not record.exists:
        return None
    data = record.load().data
    serving = data["trial"] or data["live"]
    up = serving is not None and slots.is_up(record.slots[serving])
    served = up and (data["trial"] is not None or record.slots[serving]["state"] == "live")
    state = ("trial" if data["trial"] else "live") if served else "down" if data["desired"] == "running" else "stopped"
    operation = data["operation"]
    if operation and not is_locked(record.root, name):
        state = (
            f"interrupted: {operation['kind']} at {operation['step']}; the next deploy, promote or rollback recovers it"
        )
    public = data["public"]
    return {
        "name": name,
        "state": state,
        "url": slots.http_url(public["host"], public["port"]) if public and served else None,
        "live": data["live"],
        "slots": {
            slot: {
                "state": entry["state"],
                "up": slots.is_up(entry),
                "url": slots.base_url(entry) if slots.is_up(entry) else None,
                "bundle": entry.get("plan", {}).get("bundle_digest"),
                "log": entry.get("log"),
            }
            for slot, entry in record.slots.items()
        },
        "previous": (data["previous"] or {}).get("bundle_digest"),
        "operation": operation,
        "events": data["events"][-5:],
    }


def statuses(store: Any, name: str | None = None) -> list[dict[str, Any]]:
    """`status` of one deployment or of all; empty when there is none."""
    names = [entry.split("/")[-1] for entry in store.local.list_json("deployments")] if name is None else [name]
    return [found for each in sorted(names) if (found := status(store, each))]


def to_text(found: list[dict[str, Any]]) -> str:
    """One line per deployment, one per slot that holds something."""
    lines = []
    for each in found:
        lines.append(f"{each['name']:<34} {each['state']:<12} {each['url'] or '-'}")
        for name, slot in each["slots"].items():
            if slot["bundle"]:
                mark = "live" if name == each["live"] else slot["state"]
                up = slot["url"] if slot["up"] else "not running"
                lines.append(f"  slot {name}  {mark:<10} bundle {slot['bundle'][:12]}  {up}  log {slot['log']}")
        if each["previous"]:
            lines.append(f"  rollback goes to bundle {each['previous'][:12]}")
    return "\n".join(lines) or "no deployments"


def _must_exist(store: Any, name: str) -> None:
    if not Record(store.local.root, name).exists:
        known = ", ".join(entry.split("/")[-1] for entry in store.local.list_json("deployments")) or "none yet"
        raise InputError(f"no deployment {name!r}", store.uri, f"known: {known}")
