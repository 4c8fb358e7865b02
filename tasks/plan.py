"""What a run would do, before anything runs: per stage hit or miss and why, time, bytes to move, disk and money needed.

Refuses to read an artifact, or a data file it has seen before: manifests and stats are enough, so that an 800 GB store
plans in the time of a small one. Run it: `kilotok plan SPEC`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.errors import InputError
from tasks.predict.forecast import spending
from tasks.predict.shape import known_models, known_shape
from tasks.stages import REGISTRY, Stage, ask
from tasks.store import Found, Store
from tasks.store.keys import CODE_ROOT, Known, SpecView, changes, components, key_of, view_of, why_build
from tasks.store.memo import Memo
from tasks.store.start import start_of

if TYPE_CHECKING:
    from specs.schema import Spec

CACHED, BUILD, DEPENDS = "cached", "build", "depends"


@dataclass(frozen=True)
class Row:
    """One stage: `depends` means that an input is not built yet; if it comes out the same, so does this stage."""

    stage: str
    state: str
    reason: str
    key: str  # "" when an input is not known yet
    move_bytes: int  # to download or to bring to this machine before it can run
    disk_bytes: int  # that it will add to the store; a guess until a first build


@dataclass(frozen=True)
class Plan:
    """`forecast` is `tasks.predict.forecast.forecast`'s; {"unknown": why} where nothing can be predicted."""

    spec: str
    store: str
    rows: tuple[Row, ...]
    disk_free_bytes: int
    forecast: Mapping[str, Any] = field(default_factory=dict)

    @property
    def disk_bytes(self) -> int:
        return sum(row.disk_bytes for row in self.rows)

    @property
    def move_bytes(self) -> int:
        return sum(row.move_bytes for row in self.rows)

    @property
    def disk_is_short(self) -> bool:
        return self.disk_bytes > self.disk_free_bytes

    @property
    def all_cached(self) -> bool:
        return all(row.state == CACHED for row in self.rows)

    @property
    def spending(self) -> dict[str, Any] | None:
        """Seconds, device-hours and money of what is not cached; None without a forecast."""
        if "stages" not in self.forecast:
            return None
        return spending(self.forecast, [row.stage for row in self.rows if row.state != CACHED])

    def to_dict(self) -> dict[str, Any]:
        totals = {"disk_bytes": self.disk_bytes, "disk_is_short": self.disk_is_short, "move_bytes": self.move_bytes}
        rows = [{**asdict(row), "seconds": self._seconds(row)} for row in self.rows]
        return {**asdict(self), "rows": rows, **totals, "spending": self.spending}

    def to_text(self) -> str:
        """A table, one line that says whether the disk holds it, and what is predicted."""
        lines = [f"plan of {self.spec}, store {self.store}", ""]
        for row in self.rows:
            move = f"move {size_words(row.move_bytes)}" if row.move_bytes else ""
            disk = f"disk {size_words(row.disk_bytes)}" if row.disk_bytes else ""
            seconds = self._seconds(row)
            time = f"~{time_words(seconds['predicted'])}" if seconds else ""
            lines.append(f"  {row.stage:<13} {row.state:<8} {time:>8} {move:<14} {disk:<14} {row.reason}".rstrip())
        need, free = size_words(self.disk_bytes), size_words(self.disk_free_bytes)
        short = ": too little, free some (kilotok gc) or use another --store" if self.disk_is_short else ""
        return "\n".join([*lines, "", f"  disk needed {need}, free {free}{short}", *self._forecast_lines()])

    def _seconds(self, row: Row) -> dict[str, float] | None:
        """Predicted seconds of a stage that would run, as {"predicted", "low", "high"}."""
        return None if row.state == CACHED else (self.forecast.get("stages") or {}).get(row.stage)

    def _forecast_lines(self) -> list[str]:
        if not self.forecast:
            return []
        if "unknown" in self.forecast:
            return [f"  prediction  none: {self.forecast['unknown']}"]
        spent, metrics = self.spending or {}, self.forecast["metrics"]
        user, us = metrics["latency.tps_per_user.p50"], metrics["cycle.us"]
        cost = spent.get("cost")
        money = f", {cost['value']:,.2f} {cost['currency']}" if cost else ", no price in the hardware file"
        total = f"  in all      ~{time_words(spent['seconds'])}, {spent['device_hours']:.2f} device-hours{money}"
        return [
            *([] if self.all_cached else [total]),
            f"  one user    {user['predicted']:,.0f} tokens/s predicted ({user['low']:,.0f} to {user['high']:,.0f}), "
            f"cycle {us['predicted']:,.0f} us ({us['low']:,.0f} to {us['high']:,.0f})",
            *(f"  physics     {verdict}" for verdict in self.forecast["targets"]),
        ]


def plan(
    spec: Spec | SpecView,
    store: Store,
    registry: Mapping[str, Stage] = REGISTRY,
    code_root: Path = CODE_ROOT,
) -> Plan:
    """Walk the stages in order, carrying digests as far as they are known."""
    view, memo = view_of(spec), Memo(store.local)
    known = Known({}, {}, store.read_json(f"last_good/{view.name}"))
    sizes: dict[str, int] = {}
    elsewhere: dict[str, int] = {}  # bytes of what is built, but not yet on this machine
    rows: list[Row] = []
    for stage in registry.values():
        row, found = _row(stage, view, store, memo, known, sizes, code_root)
        if row.state == BUILD:
            fetched = sum(elsewhere.pop(other, 0) for other in (*stage.inputs, *stage.uses))
            row = replace(row, move_bytes=row.move_bytes + fetched)
        elif found.manifest:
            elsewhere[stage.name] = store.missing_bytes(found.manifest)
        rows.append(row)
        known.keys[stage.name] = row.key
        if found.manifest:
            known.digests[stage.name], sizes[stage.name] = found.manifest.digest, found.manifest.size_bytes
        else:
            sizes[stage.name] = row.disk_bytes
    memo.save()
    return Plan(view.name, store.uri, tuple(rows), _free_bytes(store.local.root))


def why(
    spec: Spec | SpecView,
    store: Store,
    name: str,
    registry: Mapping[str, Stage] = REGISTRY,
    code_root: Path = CODE_ROOT,
) -> list[str]:
    """Every component of a stage's key that differs from the spec's last build of it; what an unbuilt input adds."""
    view, memo = view_of(spec), Memo(store.local)
    if name not in registry:
        raise InputError(f"no stage {name!r}", "", f"the stages are {', '.join(registry)}")
    rows = plan(view, store, registry, code_root).rows
    found = {row.stage: row for row in rows}
    before = rows[: list(found).index(name)]
    digests = {row.stage: _digest(store, row) for row in before if row.state == CACHED}
    last_good = store.read_json(f"last_good/{view.name}")
    parts = components(
        registry[name], view, Known(digests, {row.stage: row.key for row in before}, last_good), memo, code_root
    )
    parts |= start_of(registry[name], view, parts, last_good, store)[0]
    unknown = [other for other in registry[name].inputs if other not in digests]
    return [found[name].reason, *_own_changes(store.history(name, view.name), parts, unknown)]


def _digest(store: Store, row: Row) -> str:
    manifest = store.inspect(row.stage, row.key).manifest
    return manifest.digest if manifest else ""


def _row(
    stage: Stage,
    view: SpecView,
    store: Store,
    memo: Memo,
    known: Known,
    sizes: Mapping[str, int],
    code_root: Path,
) -> tuple[Row, Found]:
    parts = components(stage, view, known, memo, code_root)
    parts |= start_of(stage, view, parts, known.last_good, store)[0]
    record = store.history(stage.name, view.name)
    unknown = [name for name in stage.inputs if name not in known.digests]
    if unknown:
        reason = _depends(unknown, parts, record)
        size = _expected_bytes(stage, view, record, sizes)
        return Row(stage.name, DEPENDS, reason, "", 0, size), Found()
    key = key_of(parts)
    found = store.inspect(stage.name, key)
    gone = _gone(stage, found, store)
    if found.manifest and not gone:
        reread = f", {len(found.touched)} touched files will be read again" if found.touched else ""
        return Row(stage.name, CACHED, f"unchanged{reread}", key, 0, 0), found
    reason = f"rebuild, {gone}" if gone else why_build(stage, parts, store, view.name)
    size = _expected_bytes(stage, view, record, sizes)
    return Row(stage.name, BUILD, reason, key, _move_bytes(stage, view), size), found


def _gone(stage: Stage, found: Found, store: Store) -> str:
    """Why a cached artifact is no longer true of this machine, where the machine has it; planning fetches nothing."""
    folder = store.local.folder(found.manifest) if found.manifest and stage.alive else None
    return ask(stage.alive, folder) if folder and folder.exists() else ""


def _depends(unknown: list[str], parts: Mapping[str, str], record: Mapping[str, Any] | None) -> str:
    """Which inputs it waits for; its own changes too, for they make a rebuild certain."""
    *first, last = unknown
    words = f"depends on {', '.join(first)} and {last}" if first else f"depends on {last}"
    own = _own_changes(record, parts, unknown)
    return f"{words}; {own[0]}" if own else words


def _own_changes(record: Mapping[str, Any] | None, parts: Mapping[str, str], unknown: list[str]) -> list[str]:
    """What changed of the stage itself, while some of its inputs are not known yet."""
    if not record:
        return []
    waiting = {f"input.{name}" for name in unknown}

    def settled(components: Mapping[str, str]) -> dict[str, str]:
        return {n: v for n, v in components.items() if n not in waiting and not (unknown and n.startswith("key."))}

    return changes(settled(record["components"]), settled(parts))


def _move_bytes(stage: Stage, view: SpecView) -> int:
    """Only a stage that reads the model moves bytes into the store; what it moves is in the lock."""
    return _locked_bytes(view) if "model" in stage.reads else 0


def _expected_bytes(stage: Stage, view: SpecView, record: Mapping[str, Any] | None, sizes: Mapping[str, int]) -> int:
    """The last artifact's size, else the lock's, else a share of another stage's."""
    if record:
        return int(record["size_bytes"])
    if "model" in stage.reads:
        return _locked_bytes(view)
    source, share = stage.size_of
    return int(sizes.get(source, 0) * share)


def _locked_bytes(view: SpecView) -> int:
    """Of the source; without a lock two bytes for each parameter of a model we know, else 0."""
    if view.lock:
        return sum(int(entry["size"]) for entry in view.lock["files"].values())
    repository = str((view.tree.get("model") or {}).get("source", "")).partition("://")[2]
    return 2 * known_shape(repository).total_params if repository in known_models() else 0


def _free_bytes(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free if os.access(existing, os.R_OK) else 0


def size_words(count: float) -> str:
    """12.3 MB, in powers of ten as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def time_words(seconds: float) -> str:
    """8 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
