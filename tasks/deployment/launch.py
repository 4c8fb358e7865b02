"""How a bundle's server is started: argv, folder, image and what it needs of the machine, as plain data.

Refuses to decide when: deploy and the stages that need a server of their own do.
Run it: `kilotok run SPEC`; the plan is in the deploy artifact's deployment.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specs.errors import InputError
from tasks.deployment.slots import PROJECT
from tasks.edges import machine

SERVERS = {"native": "engine_plugins.native.server", "trtllm": "engine_plugins.trtllm.front"}
RELEASE_IMAGE = "nvcr.io/nvidia/tensorrt-llm/release"


def launch_plan(
    spec: Mapping[str, Any], bundle: Path, server: Sequence[str] = (), mounts: Sequence[str] = ()
) -> dict[str, Any]:
    """`{port}` and `{control}` in argv are filled in at each start; `server` and `mounts` are for tests."""
    deploy, engine = spec["deploy"], spec.get("engine") or {}
    name, backend = str(spec["name"]), str(engine.get("backend", "native"))
    plan = {
        "name": name,
        "model": name,
        "to": deploy.get("to", "process"),
        "backend": backend,
        "host": deploy.get("host", "127.0.0.1"),
        "start_timeout_s": float(deploy.get("start_timeout_s", 120)),
        "health_path": "/health",
        "bundle": str(bundle),
        "argv": _argv(name, bundle, backend, deploy, server),
        "env": {},
        "cwd": str(PROJECT),
    }
    if backend == "trtllm":
        # What was built is what runs: the front comes out of the bundle, in a container and outside of one.
        plan["cwd"] = str(PROJECT if server else bundle / "site")
        plan |= {"gpus": machine.gpu() != "none"}
        plan |= {"expected": json.loads((bundle / "bundle.json").read_text()).get("expected")}
    if plan["to"] == "docker":
        image = deploy.get("image") or (f"{RELEASE_IMAGE}:{engine['version']}" if backend == "trtllm" else None)
        if not image:
            raise InputError("deploy.to: docker needs an image", "deploy.image", "name one by digest")
        cwd = plan["cwd"] if mounts or backend == "trtllm" else "/"
        plan |= {"image": image, "mounts": list(mounts), "cwd": cwd}
    return plan


def _argv(name: str, bundle: Path, backend: str, deploy: Mapping[str, Any], server: Sequence[str]) -> list[str]:
    """In a container `python` is the image's, here it is ours."""
    python = "python" if deploy.get("to") == "docker" else sys.executable
    argv = [*(server or (python, "-m", SERVERS[backend])), "--bundle", str(bundle), "--served-model-name", name]
    return [*argv, "--host", str(deploy.get("host", "127.0.0.1")), "--port", "{port}", "--control", "{control}"]
