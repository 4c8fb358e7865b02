"""What is live, what was built last, and who holds what: read from the store's records, never from Prefect.

Refuses to change anything. Run it: `kilotok status`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specs.errors import InputError

if TYPE_CHECKING:
    from tasks.store import Store


def build_record(store: Store, build_or_spec: str | None) -> dict[str, Any]:
    """A build by its id, else the newest of a spec, else the newest of all."""
    builds = store.list_json("builds")
    wanted = [name for name in builds if build_or_spec in (None, name.split("/")[-1], name.split("/")[1])]
    if not wanted:
        known = sorted({name.split("/")[1] for name in builds}) or ["none yet"]
        raise InputError(
            f"no build of {build_or_spec!r}", store.uri, f"known: {', '.join(known)}; make one with `kilotok run SPEC`"
        )
    return dict(store.read_json(max(wanted, key=lambda name: name.split("/")[-1])) or {})


def collect(store: Store, name: str | None = None) -> dict[str, Any]:
    """{"deployments": [...], "builds": newest per spec, "leases": [...]}."""
    from tasks.deployment import status as deployment_status

    specs = sorted({entry.split("/")[1] for entry in store.list_json("builds")} if name is None else {name})
    builds = [build_record(store, spec) for spec in specs] if name is None or store.list_json(f"builds/{name}") else []
    deployments = [found for spec in specs if (found := deployment_status(store, spec))]
    return {"deployments": deployments, "builds": builds, "leases": store.leases()}


def to_text(found: dict[str, Any]) -> str:
    """Three short tables."""
    lines = ["builds"]
    for build in found["builds"]:
        tps = build["metrics"].get("latency.tps_per_user.p50")
        speed = f"{tps:,.0f} tokens/s" if tps else "not measured"
        lines.append(f"  {build['spec']:<32} {build['build']}  {build['verdict']:<12} {speed}")
    lines.append("deployments")
    for deployment in found["deployments"]:
        lines.append(f"  {deployment['name']:<32} {deployment['state']:<12} {deployment.get('url') or '-'}")
    lines.append("leases")
    lines += [f"  {lease['name']:<32} held by {lease['owner']}" for lease in found["leases"]]
    return "\n".join(line if line.startswith("  ") else f"{line}" for line in lines)
