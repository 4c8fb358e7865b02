"""Where a build came from and what changed: receipts, manifests, and the record of the last good build.

Refuses to guess a cause: it lists the key components that differ, in the words that the store uses for a miss.
Run it: `python -m pytest tests/tasks/test_report_lineage.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.report.words import as_number, meaning

NOISE = 0.02  # relative; below it a difference between two nights is listed last and called small


def manifests(inputs: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """manifest.json of each input artifact, where there is one."""
    found = {}
    for stage, folder in inputs.items():
        manifest = _read(folder / "manifest.json")
        if manifest:
            found[stage] = {**manifest, "folder": str(folder)}
    return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def stages(receipts: Sequence[Mapping[str, Any]], forecast: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per stage: how long, how big, why, and what the devices it held cost at the price of the hardware file,
    as `kilotok plan` counts it; None without a price."""
    price = forecast.get("price") or {}
    per_second = (as_number(price.get("per_device_hour")) or 0.0) * (forecast.get("devices") or 1) / 3600
    holds = forecast.get("holds_devices") or ()
    return [
        {
            "stage": str(row.get("stage")),
            "state": str(row.get("state")),
            "seconds": as_number(row.get("seconds")),
            "size_bytes": as_number(row.get("size_bytes")),
            "reason": str(row.get("reason") or ""),
            "key": str(row.get("key") or ""),
            "digest": str(row.get("digest") or ""),
            "uri": str(row.get("uri") or ""),
            "cost": per_second * (as_number(row.get("seconds")) or 0.0) * (row.get("stage") in holds)
            if per_second
            else None,
            "currency": str(price.get("currency") or "") if per_second else "",
        }
        for row in receipts
    ]


def changed(
    last_good: Mapping[str, Any] | None,
    receipts: Sequence[Mapping[str, Any]],
    now: Mapping[str, Mapping[str, Any]],
    metrics: Mapping[str, float],
) -> dict[str, Any] | None:
    """Key components that differ from the last good build, and the figures that moved; None without one."""
    if not last_good:
        return None
    before = {str(row.get("stage")): row for row in last_good.get("stages") or []}
    inputs, unexplained = [], []
    for receipt in receipts:
        stage, old = str(receipt.get("stage")), before.get(str(receipt.get("stage")))
        if old is None or not old.get("key") or old["key"] == receipt.get("key"):
            continue
        phrases = _phrases(stage, str(old["key"]), now.get(stage))
        inputs += [{"stage": stage, "what": phrase} for phrase in phrases]
        if not phrases:
            unexplained.append(stage)
    return {
        "since": str(last_good.get("build") or ""),
        "when": str(last_good.get("started") or ""),
        "inputs": inputs,
        "unexplained": unexplained,
        "metrics": deltas(last_good.get("metrics") or {}, metrics),
        "split": speed_split(last_good.get("metrics") or {}, metrics),
    }


def _phrases(stage: str, old_key: str, manifest: Mapping[str, Any] | None) -> list[str]:
    """What differs from the old artifact, without what merely follows from an earlier stage."""
    from tasks.store.keys import changes  # the store's own words

    if manifest is None:
        return []
    folder = Path(str(manifest["folder"])).parent
    old = next((found for path in sorted(folder.glob(f"{old_key}*")) if (found := _read(path / "manifest.json"))), None)
    if old is None:
        return []
    before, after = dict(old.get("components") or {}), dict(manifest.get("components") or {})
    return changes(
        {name: value for name, value in before.items() if not name.startswith("input.")},
        {name: value for name, value in after.items() if not name.startswith("input.")},
    )


def deltas(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every figure that both builds have and that moved; the largest relative movement first."""
    rows = []
    for name in sorted(set(before) & set(after)):
        old, new = as_number(before[name]), as_number(after[name])
        if old is None or new is None or old == new:
            continue
        words = meaning(name)
        share = (new - old) / abs(old) if old else None
        # Shares are compared in points: from 1 % to 2 % is one point, not "100 % worse".
        weight = abs(new - old) if words.unit in ("%", "points") else abs(share) if share is not None else 1.0
        better = None if not words.better or weight < NOISE else (new > old) == (words.better > 0)
        rows.append(
            {
                "metric": name,
                "label": words.label,
                "unit": words.unit,
                "before": old,
                "after": new,
                "share": share,
                "weight": weight,
                "better": better,
            }
        )
    return sorted(rows, key=lambda row: (row["better"] is None, -row["weight"]))


def speed_split(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float] | None:
    """The ratio of two speeds as a product: tokens per cycle x 1 / cycle time x what passes outside the engine."""
    names = ("latency.tps_per_user.p50", "acceptance.length", "cycle.us")
    old, new = [as_number(before.get(name)) for name in names], [as_number(after.get(name)) for name in names]
    if not all(old) or not all(new):
        return None
    speed, accepted, cycle = (float(b) / float(a) for a, b in zip(old, new, strict=True))  # type: ignore[arg-type]
    return {"speed": speed, "acceptance": accepted, "cycle": 1 / cycle, "outside": speed * cycle / accepted}


def provenance(found: Mapping[str, Mapping[str, Any]], receipts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Commit, command, packages and machine from the newest manifest; artifacts and their lineage from all."""
    if not found and not receipts:
        return None
    newest: Mapping[str, Any] = max(found.values(), key=lambda manifest: str(manifest.get("created") or ""), default={})
    source = newest.get("provenance") or {}
    git = source.get("git") or {}
    return {
        "commit": str(git.get("commit") or source.get("commit") or ""),
        "dirty": git.get("dirty", source.get("dirty")),
        "argv": [str(part) for part in source.get("argv") or []],
        "python": str(source.get("python") or ""),
        "packages": dict(source.get("packages") or {}),
        "machine": dict(source.get("machine") or source.get("hardware") or {}),
        "spec": dict(source.get("spec") or {}),
        "lineage": [
            {"stage": stage, "inputs": sorted(manifest.get("inputs") or {})} for stage, manifest in found.items()
        ],
    }
