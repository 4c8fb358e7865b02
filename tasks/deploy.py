"""The deploy stage: from a bundle to a running candidate that has answered sensibly, and a frozen plan of how it was
started.

The plan is what later calls start again (`tasks.deployment.ensure_running`), so it holds no port of the moment, no
secret and nothing that another run would decide differently.

It refuses a port that is taken, a bundle that is missing or unsigned where signatures are asked for, too little
memory for the strategy, a server that does not become healthy, gibberish, a draft that is never right, and an option
of trtllm-serve that did nothing. The live version serves on.

Run it: `kilotok run SPEC`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specs.errors import InputError, IntegrityError
from tasks.deployment.launch import launch_plan
from tasks.deployment.slots import base_url
from tasks.deployment.steps import OnStep, opened
from tasks.job import Job, Progress


def build(
    job: Job,
    progress: Progress,
    server: Sequence[str] = (),
    mounts: Sequence[str] = (),
    on_step: OnStep | None = None,
) -> dict[str, float]:
    """Start the candidate; write deployment.json. `server`, `mounts` and `on_step` are for tests."""
    plan = make_plan(job, server, mounts)
    if plan["to"] == "kubernetes":
        fix = "apply what `python -m tasks.deployment.kubernetes SPEC` prints"
        raise InputError("deploy.to: kubernetes renders manifests only", "deploy.to", fix)
    progress.note("starting the candidate")
    with opened(Path(plan["store"]), plan["name"], plan, on_step or progress.note) as deployment:
        name = deployment.start(plan)
        slot = deployment.record.slots[name]
    started = {"slot": name, "base_url": base_url(slot), **{key: slot.get(key) for key in ("log", "smoke", "proof")}}
    if slot["process"] and "image" in slot["process"]:
        started["image"] = slot["process"]["image"]
    (job.out / "deployment.json").write_text(json.dumps({"plan": plan, "started": started}, indent=1) + "\n")
    return {"deploy.smoke_acceptance": float(slot["smoke"]["acceptance_length"])}


def make_plan(job: Job, server: Sequence[str] = (), mounts: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that a start needs, as JSON; `{port}` and `{control}` in argv are filled in at each start."""
    deploy = job.spec["deploy"]
    bundle = job.inputs["build_engine"]
    record = bundle / "bundle.json"
    if not record.is_file():
        raise InputError("there is no bundle here", str(bundle), "run `kilotok run` again: it rebuilds what is missing")
    if deploy.get("require_signature"):
        check_signature(bundle, job.root)
    launch = launch_plan(job.spec, bundle, server, mounts)
    plan = {
        "kilotok_deployment": 1,
        **launch,
        "store": str(store_root(job.out)),
        "strategy": deploy.get("strategy", "blue_green"),
        "port": int(deploy.get("port", 8000)),
        "bundle_digest": hashlib.sha256(record.read_bytes()).hexdigest(),
        "memory_bytes": sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file()),
    }
    return {**plan, "digest": hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()}


def store_root(out: Path) -> Path:
    """The local store that a stage's work directory (STORE/work/STAGE-KEY) belongs to."""
    return out.parent.parent if out.parent.name == "work" else out.parent


def check_signature(bundle: Path, root: Path) -> None:
    """Refuse a bundle whose statement no trusted key of `specs/keys/` signed."""
    from tasks.attest import check_signature as problem_of
    from tasks.attest import trusted_keys

    if problem := problem_of(bundle / ".provenance", trusted_keys(root)):
        fix = "set KILOTOK_SIGNING_KEY and rebuild, or set deploy.require_signature: false"
        raise IntegrityError(f"the bundle is {problem} and deploy.require_signature is set", str(bundle), fix)
