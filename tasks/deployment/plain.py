"""A stage's own trtllm-serve, for as long as a block runs, on a port of its own.

`plain_server` serves a checkpoint without a draft: `synthesize` gets the training answers from it, `validate` the
source's side of the comparison. `bundle_server` serves a bundle as it is, for the engine at a forced acceptance. Both
are started as a deployment's server is (process or container, the front around it), and end with the block; what a
killed stage left is ended by the next one, which finds it by its marker.

It refuses to be promoted, and to share a machine's memory silently: where old and new do not fit together, the caller
sets the candidate aside first (`tasks.deployment.set_aside`).

Run it: part of those stages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.deployment import slots
from tasks.deployment.launch import launch_plan
from tasks.edges import containers, service


@dataclass(frozen=True)
class Starter:
    """How trtllm-serve is started here; `server` and `mounts` are for tests."""

    server: Sequence[str] = ()
    mounts: Sequence[str] = ()


@contextmanager
def plain_server(
    spec: dict[str, Any], checkpoint: Path, scratch: Path, note: Callable[[str], None], how: Starter | None = None
) -> Iterator[str]:
    """Base URL. `spec` has name, engine and deploy. Raises StageFailed with the server's last words."""
    from engine_plugins.trtllm.bundle import plain, write_bundle

    bundle = scratch / "plain-bundle"
    bundle.mkdir(parents=True, exist_ok=True)
    write_bundle(bundle, plain(spec), checkpoint, None, prove=False)
    note(f"starting trtllm-serve {spec['engine']['version']} on {checkpoint.name}")
    with bundle_server(spec, bundle, scratch, how) as url:
        yield url


@contextmanager
def bundle_server(
    spec: dict[str, Any],
    bundle: Path,
    scratch: Path,
    how: Starter | None = None,
    env: dict[str, str] | None = None,
) -> Iterator[str]:
    """Base URL of a bundle's own server, with more environment. Raises as `plain_server`."""
    how = how or Starter()
    plan = launch_plan({**spec, "deploy": {**spec["deploy"], "host": "127.0.0.1"}}, bundle, how.server, how.mounts)
    plan["env"] = {**plan["env"], **(env or {})}
    run = scratch / "run"
    run.mkdir(parents=True, exist_ok=True)
    marker = hashlib.sha256(str(scratch).encode()).hexdigest()[:8]
    slot: dict[str, Any] = {
        "plan": {**plan, "digest": marker},
        "port": service.free_port("127.0.0.1"),
        "control": str(run / f"plain-{marker}.sock"),
        "log": str(scratch / "plain-server.log"),
        "process": None,
    }
    slots.end(slot, 10)  # of a stage that was killed here
    if plan["to"] == "docker":
        containers.ensure_image(plan["image"])
    try:
        slot["process"] = slots.spawn(slot, dies_with_us=True)
        slots.wait_healthy(slot, plan["start_timeout_s"])
        yield slots.base_url(slot)
    finally:
        slots.end(slot, 30)
