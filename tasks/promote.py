"""The promote stage: a candidate whose verdict is PASS becomes the live version, without losing a request.

It refuses anything but a PASS from validate. If the promoted server fails its first requests, the version before is
live again before the error is raised.

Run it: `kilotok run SPEC`; back with `kilotok rollback SPEC`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from specs.errors import GateFailed, StageFailed
from tasks.deployment import load_plan
from tasks.deployment.record import Record
from tasks.deployment.slots import is_up
from tasks.deployment.steps import OnStep, opened
from tasks.job import Job, Progress


def build(job: Job, progress: Progress, on_step: OnStep | None = None) -> dict[str, float]:
    """Flip the live pointer to the deploy artifact's plan; write promotion.json."""
    verdict = read_verdict(job.inputs["validate"])
    if verdict != "PASS":
        raise GateFailed(
            f"the verdict is {verdict}: nothing is promoted", str(job.spec["name"]), "read the report's gates"
        )
    plan = load_plan(job.inputs["deploy"] / "deployment.json")
    began = time.monotonic()
    with opened(Path(plan["store"]), plan["name"], plan, on_step or progress.note) as deployment:
        url = deployment.promote(plan)
        data = deployment.record.data
        promotion: dict[str, Any] = {
            "name": plan["name"],
            "url": url,
            "slot": data["live"],
            "plan_digest": plan["digest"],
            "bundle_digest": plan["bundle_digest"],
            "previous_bundle_digest": (data["previous"] or {}).get("bundle_digest"),
            "store": plan["store"],
        }
    (job.out / "promotion.json").write_text(json.dumps(promotion, indent=1) + "\n")
    return {"promote.seconds": round(time.monotonic() - began, 3)}


def read_verdict(folder: Path) -> str:
    """What validate decided."""
    try:
        return str(json.loads((folder / "verdict.json").read_text())["verdict"])
    except (OSError, ValueError, KeyError) as error:
        raise StageFailed(f"no verdict: {error}", str(folder), "run `kilotok run` again") from None


def alive(folder: Path) -> str:
    """Why a cached promotion is no longer true; "" while its version is the live one, running or not."""
    _, live = _live(folder)
    return "" if live else "another version is live"


def revive(folder: Path) -> str:
    """A run ends with its endpoint up: start the promoted version again if it was drained or has died."""
    promotion, live = _live(folder)
    if not live or (is_up(live) and live["state"] == "live"):
        return ""
    with opened(Path(promotion["store"]), promotion["name"], live["plan"]) as deployment:
        deployment.promote(live["plan"])
    return "its server was started again"


def _live(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The promotion, and the live slot if it runs the promoted plan."""
    promotion = json.loads((folder / "promotion.json").read_text())
    record = Record(Path(promotion["store"]), promotion["name"]).load()
    live = record.slots[record.data["live"]] if record.data["live"] else {}
    return promotion, live if live.get("plan", {}).get("digest") == promotion["plan_digest"] else {}
