"""How long a night without change takes, as the Prefect server that ran it says: its flow run and its task runs.

Refuses to run nights and to time anything itself: start some with `prefect deployment run nightly/SPEC --watch` first.
Run it, with PREFECT_API_URL set: `python infra/bench_reports/night_bench.py SPEC [HOW_MANY]`.
"""

from __future__ import annotations

import asyncio
import statistics
import sys

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateName,
)
from prefect.client.schemas.sorting import FlowRunSort

from tasks.stages import STAGES

OWN = ("look", "measure", "conclude")


async def nights(spec: str, count: int) -> list[dict[str, float]]:
    """Seconds of the newest unchanged nights, oldest first, by part; `rest` is pages, artifacts and Prefect itself."""
    unchanged = FlowRunFilter(state=FlowRunFilterState(name=FlowRunFilterStateName(any_=["Unchanged"])))
    of_spec = DeploymentFilter(name=DeploymentFilterName(any_=[spec]))
    found = []
    async with get_client() as client:
        runs = await client.read_flow_runs(
            flow_run_filter=unchanged, deployment_filter=of_spec, sort=FlowRunSort.START_TIME_DESC, limit=count
        )
        for run in reversed(runs):
            tasks = await client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [run.id]}))
            seconds = {task.name: task.total_run_time.total_seconds() for task in tasks}
            row = {"whole": run.total_run_time.total_seconds()}
            row["stages"] = sum(seconds[stage.name] for stage in STAGES)
            row |= {name: seconds[name] for name in OWN}
            row["rest"] = row["whole"] - sum(row[name] for name in ("stages", *OWN))
            found.append(row)
    return found


def main() -> int:
    spec, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 7
    rows = asyncio.run(nights(spec, count))
    if not rows:
        sys.exit(f"no unchanged night of {spec} on this server")
    print("| | " + " | ".join(rows[0]) + " |\n|" + " --- |" * (len(rows[0]) + 1))
    for at, row in enumerate(rows, 1):
        print(f"| night {at} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |")
    middle = [statistics.median(row[name] for row in rows) for name in rows[0]]
    print("| median | " + " | ".join(f"{value:.2f}" for value in middle) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
