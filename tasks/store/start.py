"""The artifact a stage starts from, where its spec asks for one: a draft head that is trained on from an earlier one.

`last_good` is the one of the last good build, with one rule that keeps an unchanged spec a hit: a build that differs
from the last good one in nothing but its start shares that start. Refuses to start from another stage's artifact.
Run it: `python -m pytest tests/tasks/test_start.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specs.errors import InputError, StoreError
from tasks.stages import Stage
from tasks.store import Store
from tasks.store.keys import START, SpecView

LAST_GOOD = "last_good"


def start_of(
    stage: Stage, view: SpecView, parts: Mapping[str, str], last_good: Mapping[str, Any] | None, store: Store
) -> tuple[dict[str, str], str]:
    """(what it adds to the key's components, URI to start from); ({}, "") for a build from nothing."""
    wanted: Any = view.tree
    for name in stage.starts_from.split("."):
        wanted = wanted.get(name) if isinstance(wanted, Mapping) else None
    if not wanted:
        return {}, ""
    if wanted == LAST_GOOD:
        return _of_last_good(stage, parts, last_good, store)
    manifest = store.load(str(wanted))
    if manifest.stage != stage.name:
        raise InputError(
            f"{wanted} is an artifact of {manifest.stage}", stage.starts_from, f"name one of {stage.name}, or last_good"
        )
    return {START: manifest.digest}, store.artifact_uri(manifest)


def _of_last_good(
    stage: Stage, parts: Mapping[str, str], last_good: Mapping[str, Any] | None, store: Store
) -> tuple[dict[str, str], str]:
    rows = [row for row in (last_good or {}).get("stages", ()) if row["stage"] == stage.name and row.get("uri")]
    if not rows:
        return {}, ""  # the first build has nothing to start from
    try:
        good = store.load(rows[0]["uri"])
    except StoreError:
        return {}, ""  # the store promises to keep it; one that was emptied by hand begins again
    own = {name: value for name, value in good.components.items() if name != START}
    if own != dict(parts):
        return {START: good.digest}, store.artifact_uri(good)
    return {name: value for name, value in good.components.items() if name == START}, good.inputs.get(START, "")
