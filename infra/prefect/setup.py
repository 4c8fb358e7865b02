"""Everything a Prefect server needs to run nights, in one idempotent command: pools, deployments, automations, pruning.

Prefect deploys but never prunes: deployments and schedules that left prefect.yaml are deleted here. Its runs outlive a
dead worker as Running: the zombie automation marks them Crashed. Who is to be told is named in the environment, once,
and becomes a Prefect block: KILOTOK_SLACK_WEBHOOK, KILOTOK_WEBHOOK (any that takes JSON), or KILOTOK_SENDGRID_KEY with
KILOTOK_EMAIL_FROM and KILOTOK_EMAIL_TO. Refuses to start servers or workers, and to put a secret into a parameter.
Run it: `python infra/prefect/setup.py` with PREFECT_API_URL set.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml
from prefect.automations import Automation
from prefect.blocks.notifications import CustomWebhookNotificationBlock, SendgridEmail, SlackWebhook
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.variables import Variable
from pydantic import SecretStr

ROOT = Path(__file__).resolve().parents[2]
# The default heartbeat is every 180 s: a shorter window would declare healthy runs dead.
WINDOW = timedelta(minutes=10)
START_TIMEOUT_S = 60
SLACK = re.compile(r"https://hooks\.slack(-gov)?\.com/services/\w+/\w+/\w+/?")
OURS = "kilotok: "  # how our automations are known again
ENDED_BADLY = ("Failed", "Kept", "Crashed", "TimedOut", "Late")


def main() -> int:
    """Prints one line for each thing it changed."""
    declared = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    if not PREFECT_API_URL.value():  # Prefect would start a server for us, and stop it again
        sys.exit("PREFECT_API_URL is not set: start a server (prefect server start) and name it")
    told = channels(os.environ)
    asyncio.run(server_up())
    asyncio.run(make_pools(declared))
    deploy(asyncio.run(set_variables()))
    asyncio.run(prune(declared))
    asyncio.run(make_automations(told))
    return 0


async def server_up() -> None:
    """Return when the server answers; one that was just started makes its database first."""
    deadline = time.monotonic() + START_TIMEOUT_S
    async with get_client() as client:
        while error := await client.api_healthcheck():
            if time.monotonic() > deadline:
                sys.exit(f"no Prefect server at {client.api_url}: start one, or set PREFECT_API_URL to yours ({error})")
            await asyncio.sleep(0.5)


async def make_pools(declared: list[dict[str, Any]]) -> None:
    """A process pool for each name in prefect.yaml, and one for what runs anywhere."""
    async with get_client() as client:
        for pool in sorted({"orchestrator", *(entry["work_pool"]["name"] for entry in declared)}):
            try:
                await client.read_work_pool(pool)
            except ObjectNotFound:
                await client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
                print(f"created work pool {pool}")


async def set_variables() -> dict[str, str]:
    """What a run pulls and where it works: the environment's word, else what the server has, else this checkout."""
    home = ROOT / ".kilotok"
    defaults = {
        "kilotok_repository": _git("remote", "get-url", "origin") or ROOT.as_uri(),
        "kilotok_branch": _git("branch", "--show-current") or "main",
        "kilotok_home": str(home / "nightly"),
        "kilotok_store": str(home / "store"),
    }
    found = {}
    for name, default in defaults.items():
        there = await Variable.aget(name)
        found[name] = os.environ.get(name.upper()) or there or default
        if found[name] != there:
            await Variable.aset(name, found[name], overwrite=True)
    if found["kilotok_home"] == defaults["kilotok_home"]:
        Path(found["kilotok_home"]).mkdir(parents=True, exist_ok=True)
    return found


def deploy(variables: dict[str, str]) -> None:
    """`prefect deploy --all`."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"prefect deploy failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    print("deployed with " + ", ".join(f"{name}={value}" for name, value in variables.items()))


async def prune(declared: list[dict[str, Any]]) -> None:
    """Delete deployments and schedules of ours that prefect.yaml no longer has."""
    wanted = {(entry["entrypoint"].rpartition(":")[2], entry["name"]): entry for entry in declared}
    async with get_client() as client:
        for found in await client.read_deployments():
            if "kilotok" not in found.tags:
                continue
            flow = (await client.read_flow(found.flow_id)).name
            entry = wanted.get((flow, found.name))
            if entry is None:
                await client.delete_deployment(found.id)
                print(f"pruned deployment {flow}/{found.name}: no such spec")
                continue
            slugs = {schedule["slug"] for schedule in entry.get("schedules") or ()}
            for schedule in found.schedules:
                if schedule.slug not in slugs:
                    await client.delete_deployment_schedule(found.id, schedule.id)
                    print(f"pruned a schedule of {flow}/{found.name}: not in prefect.yaml")


async def make_automations(told: dict[str, Any]) -> None:
    """Zombies, and for each block two: a run that ended badly or is late, and a figure that got worse."""
    wanted = [zombies()]
    for kind, block in told.items():
        wanted += list(telling(kind, UUID(str(await block.save(f"kilotok-{kind}", overwrite=True)))))
    async with get_client() as client:
        for automation in wanted:
            await replace(client, automation)


async def replace(client: PrefectClient, automation: Automation) -> None:
    """Create it, or create it anew when what is there says something else."""
    for there in await client.read_automations_by_name(automation.name):
        if (there.trigger, there.actions) == (automation.trigger, automation.actions):
            return
        await client.delete_automation(there.id)
    await automation.acreate()
    print(f"created automation {automation.name!r}")


def channels(env: Mapping[str, str]) -> dict[str, Any]:
    """Who is told: a block for each channel that the environment names; one that could carry no message is refused."""
    made: dict[str, Any] = {}
    if url := env.get("KILOTOK_SLACK_WEBHOOK"):
        if not SLACK.fullmatch(url):  # Prefect would take it and send nothing
            sys.exit(
                "KILOTOK_SLACK_WEBHOOK: not https://hooks.slack.com/services/T.../B.../...; others: KILOTOK_WEBHOOK"
            )
        made["slack"] = SlackWebhook(url=SecretStr(url))
    if url := env.get("KILOTOK_WEBHOOK"):
        text, secret = {"text": "{{subject}}\n{{body}}"}, {"url": url}  # a webhook's address is its password
        made["webhook"] = CustomWebhookNotificationBlock(name="kilotok", url="{{url}}", json_data=text, secrets=secret)
    if key := env.get("KILOTOK_SENDGRID_KEY"):
        sender, people = env.get("KILOTOK_EMAIL_FROM", ""), env.get("KILOTOK_EMAIL_TO", "")
        if "@" not in sender or "@" not in people:
            sys.exit(
                "KILOTOK_SENDGRID_KEY: e-mail needs KILOTOK_EMAIL_FROM and KILOTOK_EMAIL_TO (addresses with commas)"
            )
        made["email"] = SendgridEmail(api_key=SecretStr(key), sender_email=sender, to_emails=people.split(","))
    return made


def telling(kind: str, block: UUID) -> Iterator[Automation]:
    """State and message only: a run's parameters are for the server's own page."""
    ours = {"prefect.resource.id": "prefect.tag.kilotok", "prefect.resource.role": "tag"}
    bad = EventTrigger(
        expect={f"prefect.flow-run.{state}" for state in ENDED_BADLY},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related=ours,
        posture=Posture.Reactive,
        threshold=1,
    )
    subject = "{{ flow.name }}/{{ deployment.name }}: {{ flow_run.state.name }}"
    body = "{{ flow_run.state.message }}\n{{ flow_run|ui_url }}"
    yield Automation(
        name=f"{OURS}tell {kind} of failed, crashed and late runs",
        trigger=bad,
        actions=[SendNotification(block_document_id=block, subject=subject, body=body)],
    )
    worse = EventTrigger(
        expect={"kilotok.night.regressed"},
        match={"prefect.resource.id": "kilotok.spec.*"},
        posture=Posture.Reactive,
        threshold=1,
    )
    yield Automation(
        name=f"{OURS}tell {kind} of regressions",
        trigger=worse,
        actions=[
            SendNotification(
                block_document_id=block,
                subject="{{ event.resource.id }}: regressed",
                body="{{ event.payload.summary }}",
            )
        ],
    )


def zombies(window: timedelta = WINDOW) -> Automation:
    """Heartbeat seen, then neither heartbeat nor end for as long as the window: Crashed."""
    ends = ("heartbeat", "Completed", "Failed", "Cancelled", "Crashed", "Unchanged", "Promoted", "Kept")
    return Automation(
        name=f"{OURS}crash runs without heartbeat",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={f"prefect.flow-run.{name}" for name in ends},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=window,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, message=f"no heartbeat for {window}: the worker or its machine died"
            )
        ],
    )


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())
