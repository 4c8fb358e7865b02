"""Servers in containers, through the Docker API of whatever engine DOCKER_HOST names (Docker, Podman).

The container shares the host's network and the deployment's socket folder, so it takes the public listening socket
just as a process does. Its name carries the slot's nonce: a container that was started but not yet written down is
found again.

It refuses to pull by tag: an image is named by digest or is already here, or nothing starts.

Run it: `python -m pytest tests/tasks/test_deploy_containers.py` (needs a container engine).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specs.errors import InputError, StageFailed

API_TIMEOUT_S = 60
LOG_LINES = 400


def _client() -> Any:
    try:
        import docker
    except ImportError:
        raise InputError("deploy.to: docker needs the Docker SDK", "deploy.to", "pip install docker") from None
    try:
        return docker.from_env(timeout=API_TIMEOUT_S)
    except docker.errors.DockerException as error:
        fix = "start the container engine, or set DOCKER_HOST to its socket"
        raise StageFailed(f"no container engine answers: {error}", "deploy.to", fix) from None


def _problems() -> tuple[type[Exception], ...]:
    import docker
    import requests

    return (docker.errors.DockerException, requests.RequestException)


def ensure_image(image: str) -> None:
    """Have the image here. Raises InputError for one that is neither here nor pullable by digest."""
    import docker

    client = _client()
    try:
        client.images.get(image)
        return
    except docker.errors.ImageNotFound:
        pass
    if "@sha256:" not in image:
        fix = "name it by digest (NAME@sha256:...), or build it on this machine"
        raise InputError(f"the image {image!r} is not on this machine and is not named by digest", "deploy.image", fix)
    try:
        client.images.pull(image)
    except docker.errors.APIError as error:
        message = f"the image {image!r} cannot be pulled: {error.explanation or error}"
        raise InputError(message, "deploy.image", "check the digest and the registry") from None


def create_options(plan: Mapping[str, Any], name: str, argv: list[str], run_dir: str) -> dict[str, Any]:
    """What is asked of the Docker API, as data: `containers.run(**options)`."""
    mounts = {plan["bundle"]: {"bind": plan["bundle"], "mode": "ro"}, run_dir: {"bind": run_dir, "mode": "rw"}}
    mounts.update({path: {"bind": path, "mode": "ro"} for path in plan.get("mounts", ())})
    options: dict[str, Any] = {
        "image": plan["image"],
        "command": argv,
        "name": name,
        "detach": True,
        "network_mode": "host",
        "ipc_mode": "host",
        "environment": dict(plan["env"]),
        "volumes": mounts,
        "working_dir": plan["cwd"],
        "labels": {"kilotok.deployment": plan["name"], "kilotok.plan": plan["digest"]},
        # Not restarted by the engine: a server that comes back alone would not hold the public socket.
        "restart_policy": {"Name": "no"},
    }
    if plan.get("gpus"):
        options["ulimits"] = [
            {"Name": "memlock", "Soft": -1, "Hard": -1},
            {"Name": "stack", "Soft": 1 << 26, "Hard": 1 << 26},
        ]
        options["device_requests"] = [{"Driver": "nvidia", "Count": -1, "Capabilities": [["gpu"]]}]
    return options


def start(plan: Mapping[str, Any], name: str, argv: list[str], run_dir: str) -> dict[str, Any]:
    """Start the container, or find the one of this name; returns what recognises it."""
    import docker

    client = _client()
    try:
        container = client.containers.get(name)
    except docker.errors.NotFound:
        try:
            container = client.containers.run(**create_options(plan, name, argv, run_dir))
        except _problems() as error:
            _remove(client, name)
            raise StageFailed(
                f"the container does not start: {error}", plan["name"], "see the engine's message"
            ) from None
    return known(container)


def find(name: str) -> dict[str, Any] | None:
    """The container of this name, running or not."""
    with contextlib.suppress(*_problems()):
        return known(_client().containers.get(name))
    return None


def known(container: Any) -> dict[str, Any]:
    container.reload()
    pid = int(container.attrs["State"].get("Pid") or 0)
    return {"container": container.id, "pid": pid, "image": container.attrs["Image"]}


def is_running(identity: Mapping[str, Any]) -> bool:
    with contextlib.suppress(StageFailed, *_problems()):  # an engine that is down runs nothing
        return bool(_client().containers.get(identity["container"]).status == "running")
    return False


def end(identity: Mapping[str, Any], log: Path, grace_s: float) -> bool:
    """Stop it after its running requests, keep its last words in `log`, remove it; True if it was running."""
    with contextlib.suppress(*_problems()):
        container = _client().containers.get(identity["container"])
        was_running = container.status == "running"
        if was_running:
            container.client.api.timeout = int(grace_s) + API_TIMEOUT_S
            container.stop(timeout=int(grace_s))
        save_log(identity, log)
        container.remove(force=True)
        return bool(was_running)
    return False


def save_log(identity: Mapping[str, Any], log: Path) -> None:
    """Copy the container's last lines to where a process would have written them."""
    with contextlib.suppress(*_problems()):
        log.write_bytes(_client().containers.get(identity["container"]).logs(tail=LOG_LINES))


def _remove(client: Any, name: str) -> None:
    with contextlib.suppress(*_problems()):
        client.containers.get(name).remove(force=True)
