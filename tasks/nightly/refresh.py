"""When the draft is trained anew though nothing that shapes it changed: `nightly.refresh_draft` of the spec.

A new seed is the one input that may change on its own: it gives another head from the same answers, and the gates
decide which of the two stays. Refuses to try twice for one drop of acceptance, and to keep a seed that failed a gate.
Run it: `python -m pytest tests/tasks/nightly/test_night.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specs.schema import Spec
    from tasks.store import Store


def tonight(spec: Spec, store: Store, night: str) -> dict[str, Any]:
    """{"policy", "seed" or None, "why", "answers": the drop it answers or None}."""
    policy = spec.nightly.refresh_draft if spec.nightly else "never"
    kept = store.read_json(f"refresh/{spec.name}") or {"seed": None, "answered": []}
    if policy == "never":
        return {"policy": policy, "seed": None, "why": "", "answers": None}
    fresh = int("".join(character for character in night if character.isdigit())[:8] or 0)
    if policy == "always":
        return {"policy": policy, "seed": fresh, "why": "every night", "answers": None}
    drop = _drop(spec, store)
    if drop is None or drop in kept["answered"]:
        return {"policy": policy, "seed": kept["seed"], "why": "", "answers": None}
    return {"policy": policy, "seed": fresh, "why": f"acceptance dropped on {drop}", "answers": drop}


def settle(spec: Spec, store: Store, asked: dict[str, Any], passed: bool) -> None:
    """Keep the seed that passed; note the drop that was answered, so that it is not answered every night."""
    if not asked.get("why"):
        return
    kept = store.read_json(f"refresh/{spec.name}") or {"seed": None, "answered": []}
    answered = [*kept["answered"], asked["answers"]] if asked["answers"] else kept["answered"]
    store.write_json(
        f"refresh/{spec.name}", {"seed": asked["seed"] if passed else kept["seed"], "answered": answered[-50:]}
    )


def _drop(spec: Spec, store: Store) -> str | None:
    """The night since which acceptance is worse, as the night before this one found it."""
    nights = [store.read_json(entry) or {} for entry in store.list_json(f"nights/{spec.name}")[-5:]]
    ended = [record for record in nights if record.get("findings") is not None and record.get("state") != "running"]
    findings = ended[-1]["findings"] if ended else []
    drops = [f for f in findings if f["kind"] == "step" and f["metric"].startswith("acceptance") and f["worse"]]
    return str(drops[0]["since"]) if drops else None
