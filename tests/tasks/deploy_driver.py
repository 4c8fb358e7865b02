"""One deployer in its own process, which can be told at which step to die by kill -9.

Refuses nothing: it is the crash tests' victim.
Run it: `python -m tests.tasks.deploy_driver ACTION STORE BUNDLE PORT [--strategy S] [--die-at STEP]`
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specs.errors import KilotokError
from tasks import deploy, promote
from tasks.deployment.steps import opened
from tasks.job import Job, Progress

NAME = "toy"
TOY_SERVER = (sys.executable, "-m", "tests.engine_plugins.toy_engine")
STUB = f"{sys.executable} -m tests.engine_plugins.trtllm.stub_serve"
SERVERS = {
    "native": TOY_SERVER,
    "trtllm": (sys.executable, "-m", "engine_plugins.trtllm.front", "--engine", STUB),
}


def deploy_job(store: Path, bundle: Path, port: int, backend: str = "native", **settings: Any) -> Job:
    """The job that the runner would give to the deploy stage."""
    out = store / "work" / f"deploy-{bundle.name}"
    out.mkdir(parents=True, exist_ok=True)
    deploy_section = {"to": "process", "strategy": "blue_green", "port": port, "start_timeout_s": 30, **settings}
    spec = {"name": NAME, "deploy": deploy_section, "engine": {"backend": backend, "version": "1.2.1"}}
    return Job("deploy", spec, store, {"build_engine": bundle}, out)


def run_deploy(job: Job, on_step: Callable[[str], None] | None = None) -> Path:
    """Run the stage; returns its artifact directory."""
    deploy.build(job, Progress(), server=SERVERS[job.spec["engine"]["backend"]], on_step=on_step)
    return job.out


def run_promote(job: Job, on_step: Callable[[str], None] | None = None, verdict: str = "PASS") -> Path:
    """Promote what `job` deployed."""
    validated = job.root / "work" / "validate"
    out = job.out.parent / f"promote-{job.out.name}"
    validated.mkdir(parents=True, exist_ok=True)
    out.mkdir(exist_ok=True)
    (validated / "verdict.json").write_text(json.dumps({"verdict": verdict}))
    inputs = {"validate": validated, "deploy": job.out}
    promote.build(Job("promote", job.spec, job.root, inputs, out), Progress(), on_step=on_step)
    return out


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["deploy", "promote", "both", "rollback", "drain"])
    parser.add_argument("store", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--strategy", default="blue_green")
    parser.add_argument("--backend", default="native")
    parser.add_argument("--die-at", default="")
    args = parser.parse_args()

    def on_step(step: str) -> None:
        print(step, flush=True)
        if step == args.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    job = deploy_job(args.store, args.bundle, args.port, args.backend, strategy=args.strategy)
    try:
        if args.action in ("deploy", "both"):
            run_deploy(job, on_step)
        if args.action in ("promote", "both"):
            run_promote(job, on_step)
        if args.action in ("rollback", "drain"):
            with opened(args.store, NAME, on_step=on_step) as deployment:
                getattr(deployment, args.action)()
    except KilotokError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
