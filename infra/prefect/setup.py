"""What a Prefect server needs once before `prefect deploy --all`: work pools and the zombie automation. Idempotent.

The zombie automation marks a run Crashed when its heartbeats stop, because a worker that is killed leaves its
run Running for
ever. Also prunes deployments whose spec has left Git: Prefect never does. Refuses to start servers or workers.
Run it: `python infra/prefect/setup.py` with PREFECT_API_URL set.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import yaml
from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

ROOT = Path(__file__).resolve().parents[2]
ZOMBIES = "kilotok: crash runs without heartbeat"
# The default heartbeat is every 180 s: a shorter window would declare healthy runs dead.
WINDOW = timedelta(minutes=10)


async def main() -> None:
    """Pools, automation, pruning; prints one line for each thing it changed."""
    declared = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    async with get_client() as client:
        for pool in sorted({entry["work_pool"]["name"] for entry in declared}):
            try:
                await client.read_work_pool(pool)
            except ObjectNotFound:
                await client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
                print(f"created work pool {pool}")
        wanted = {entry["name"] for entry in declared}
        for found in await client.read_deployments():
            if "kilotok" in found.tags and found.name not in wanted:
                await client.delete_deployment(found.id)
                print(f"pruned deployment {found.name}: no such spec")
        if not await client.read_automations_by_name(ZOMBIES):
            await zombie_automation().acreate()
            print(f"created automation {ZOMBIES!r}")


def zombie_automation() -> Automation:
    """Heartbeat seen, then neither heartbeat nor end for WINDOW: Crashed."""
    return Automation(
        name=ZOMBIES,
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={
                "prefect.flow-run.heartbeat",
                "prefect.flow-run.Completed",
                "prefect.flow-run.Failed",
                "prefect.flow-run.Cancelled",
                "prefect.flow-run.Crashed",
            },
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=WINDOW,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, message="no heartbeat for 10 minutes: the worker or its machine died"
            )
        ],
    )


if __name__ == "__main__":
    asyncio.run(main())
