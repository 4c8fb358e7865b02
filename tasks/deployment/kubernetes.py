"""`deploy.to: kubernetes`: the same server as manifests, for a cluster that has its own idea of slots and promotion.

Deployment, Service, claim for the bundles and disruption budget, as plain data from the spec. `blue_green` becomes a
rolling update that never has less than one server, `drain_swap` a Recreate: the cluster then does what slots do here,
except that it knows no gates. So apply a bundle that has passed them.

It refuses to talk to a cluster, and an image that is not named by digest.

Run it: `python -m tasks.deployment.kubernetes specs/llama4-maverick-b200.yaml --bundle KEY | kubectl apply -f -`
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from specs.errors import InputError, KilotokError
from tasks.deployment.launch import SERVERS

BUNDLES, RUN = "/bundles", "/run/kilotok"
DRAIN_S = 600  # a running answer may take this long
PROBE_S = 10
GIB_PER_BUNDLE = 600  # Maverick in FP8 with its draft; the claim holds two, the old one and the new


def manifests(spec: dict[str, Any], bundle: str = "current") -> list[dict[str, Any]]:
    """The four objects of a spec (its `to_dict`); `bundle` is the bundle's folder on the claimed volume."""
    deploy, name = spec["deploy"], re.sub(r"[^a-z0-9-]", "-", spec["name"])
    if "@sha256:" not in (deploy.get("image") or ""):
        found = deploy.get("image") or "nothing"
        raise InputError(f"the image is {found}, not one named by digest", "deploy.image", "write NAME@sha256:...")
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/managed-by": "kilotok"}
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": f"{name}-bundles", "labels": labels},
            "spec": {
                "accessModes": ["ReadWriteMany"],  # the old pod and the new one may be on two nodes
                "resources": {"requests": {"storage": f"{2 * GIB_PER_BUNDLE}Gi"}},
            },
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "replicas": 1,
                "revisionHistoryLimit": 2,
                "progressDeadlineSeconds": int(deploy["start_timeout_s"]) + DRAIN_S,
                "selector": {"matchLabels": labels},
                "strategy": _strategy(deploy["strategy"]),
                "template": {"metadata": {"labels": labels}, "spec": _pod(spec, name, bundle)},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "labels": labels},
            "spec": {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        },
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": name, "labels": labels},
            "spec": {"minAvailable": 1, "selector": {"matchLabels": labels}},
        },
    ]


def _strategy(strategy: str) -> dict[str, Any]:
    if strategy == "drain_swap":
        return {"type": "Recreate"}
    return {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}


def _pod(spec: dict[str, Any], name: str, bundle: str) -> dict[str, Any]:
    deploy, engine = spec["deploy"], spec["engine"]
    volumes: dict[str, dict[str, Any]] = {
        BUNDLES: {"persistentVolumeClaim": {"claimName": f"{name}-bundles"}},
        RUN: {"emptyDir": {}},
    }
    volumes["/dev/shm"] = {"emptyDir": {"medium": "Memory"}}  # NCCL and the ranks' queues
    server: dict[str, Any] = {
        "name": "server",
        "image": deploy["image"],
        "workingDir": f"{BUNDLES}/{bundle}/site" if engine["backend"] == "trtllm" else "/",
        "command": ["python", "-m", SERVERS[engine["backend"]]],
        "args": [
            *("--bundle", f"{BUNDLES}/{bundle}", "--served-model-name", spec["name"], "--host", "0.0.0.0"),
            *("--port", str(deploy["port"]), "--control", f"{RUN}/server.sock"),
        ],
        "ports": [{"name": "http", "containerPort": deploy["port"]}],
        "startupProbe": {**_probe(), "failureThreshold": -(-int(deploy["start_timeout_s"]) // PROBE_S)},
        "readinessProbe": {**_probe(), "failureThreshold": 1},
        "livenessProbe": {**_probe(), "failureThreshold": 6},
        # The endpoint is taken out of the service first; then SIGTERM, on which the server drains.
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", "5"]}}},
        "volumeMounts": [
            {"name": f"v{at}", "mountPath": path, "readOnly": path == BUNDLES} for at, path in enumerate(volumes)
        ],
    }
    if engine["backend"] == "trtllm":
        server["resources"] = {"limits": {"nvidia.com/gpu": str(engine["tensor_parallel"])}}
        server["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}  # memory that the GPUs read must stay put
    return {
        "terminationGracePeriodSeconds": DRAIN_S,
        "containers": [server],
        "volumes": [{"name": f"v{at}", **source} for at, source in enumerate(volumes.values())],
    }


def _probe() -> dict[str, Any]:
    return {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": PROBE_S, "timeoutSeconds": 5}


def main() -> int:
    """Print the manifests of a spec."""
    from specs.load import load_spec

    parser = argparse.ArgumentParser(description="Kubernetes manifests of a spec.")
    parser.add_argument("spec", type=Path)
    parser.add_argument("--bundle", default="current", help="folder of the bundle on the volume")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="K=V")
    args = parser.parse_args()
    try:
        spec = load_spec(args.spec, args.overrides).to_dict()
        sys.stdout.write(yaml.safe_dump_all(manifests(spec, args.bundle), sort_keys=False))
    except KilotokError as error:
        print(f"kilotok: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
