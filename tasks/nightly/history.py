"""Every build's figures in one SQLite file beside the store, made from the store's records and never the truth.

Tables: `nights` (one row per build or night), `figures` (night, source, run, metric, value; source is `build` for what
validate measured of a candidate, `live` for a run of the probe), `alarms` (what was told, and when) and `inputs` (what
went into a night, by stage).
Refuses to be kept: delete the file and the next question writes it again. Ask it with any SQLite client, or
`kilotok history SPEC --metric latency.tps_per_user.p50`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.nightly.attribution import inputs_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tasks.store import Store

FILE = "history.sqlite"
FORMAT = 1  # of the tables; another number in the file means that it is written again
RUNNING = "running"
_TABLES = """
CREATE TABLE nights (night TEXT, spec TEXT, started TEXT, seconds REAL, state TEXT, verdict TEXT, commit_id TEXT,
                     measured INTEGER, summary TEXT, PRIMARY KEY (spec, night));
CREATE TABLE figures (spec TEXT, night TEXT, source TEXT, run INTEGER, metric TEXT, value REAL);
CREATE TABLE alarms (spec TEXT, night TEXT, metric TEXT, source TEXT, since TEXT, text TEXT);
CREATE TABLE inputs (spec TEXT, night TEXT, stage TEXT, name TEXT, value TEXT);
CREATE INDEX figures_by_metric ON figures (spec, metric, source, night);
"""


@dataclass(frozen=True)
class Point:
    """One night of one figure: the runs of the probe, or validate's single value of a fresh measurement."""

    night: str
    values: tuple[float, ...]

    @property
    def value(self) -> float:
        return sum(self.values) / len(self.values)


@contextmanager
def history(store: Store) -> Iterator[sqlite3.Connection]:
    """The table, brought up to date with the store's records: only what is new is read."""
    path = store.local.root / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=60)) as table:
        if table.execute("PRAGMA user_version").fetchone()[0] != FORMAT:
            _begin_again(table)
        with table:  # one transaction: a reader sees all of an update or nothing
            table.execute("BEGIN IMMEDIATE")
            _update(table, store)
        yield table


def _begin_again(table: sqlite3.Connection) -> None:
    for (name,) in table.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        table.execute(f"DROP TABLE {name}")
    table.executescript(_TABLES)
    table.execute(f"PRAGMA user_version = {FORMAT}")


def _update(table: sqlite3.Connection, store: Store) -> None:
    known = {
        (spec, night): state for spec, night, state in table.execute("SELECT spec, night, state FROM nights").fetchall()
    }
    nights, builds = set(store.list_json("nights")), set(store.list_json("builds"))
    for name in sorted({entry.partition("/")[2] for entry in nights | builds}):
        spec, _, night = name.rpartition("/")
        state = known.get((spec, night))
        # A build of a night is first seen without it; a night that still runs has more to tell.
        if state not in (None, RUNNING, "") and not (state == "build" and f"nights/{name}" in nights):
            continue
        record = store.read_json(f"nights/{name}") if f"nights/{name}" in nights else None
        build = store.read_json(f"builds/{name}") if f"builds/{name}" in builds else None
        _put(table, store, spec, night, record or {}, build or {})


def _put(
    table: sqlite3.Connection, store: Store, spec: str, night: str, record: Mapping[str, Any], build: Mapping[str, Any]
) -> None:
    for name in ("nights", "figures", "alarms", "inputs"):
        table.execute(f"DELETE FROM {name} WHERE spec = ? AND night = ?", (spec, night))
    measured = any(row["stage"] == "validate" and row["state"] == "built" for row in build.get("stages") or ())
    seconds = record.get("seconds", build.get("seconds"))
    summary = record.get("summary") or (build.get("error") or {}).get("what") or ""
    table.execute(
        "INSERT INTO nights VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (night, spec, record.get("started") or build.get("started"), seconds, record.get("state") or "build",
         build.get("verdict"), (record.get("git") or {}).get("commit"), int(measured), summary),
    )  # fmt: skip
    runs = [("build", 0, build.get("metrics") or {})] if measured else []
    runs += [("live", at, metrics) for at, metrics in enumerate(record.get("probes") or ())]
    table.executemany(
        "INSERT INTO figures VALUES (?, ?, ?, ?, ?, ?)",
        [(spec, night, source, run, metric, value) for source, run, found in runs for metric, value in found.items()],
    )
    alarms = [finding for finding in record.get("findings") or () if finding["alarm"]]
    table.executemany(
        "INSERT INTO alarms VALUES (?, ?, ?, ?, ?, ?)",
        [(spec, night, found["metric"], found["source"], found["since"], found["text"]) for found in alarms],
    )
    inputs = record.get("inputs") or inputs_of(store, build)
    table.executemany(
        "INSERT INTO inputs VALUES (?, ?, ?, ?, ?)",
        [(spec, night, stage, name, value) for stage, found in inputs.items() for name, value in found.items()],
    )


def series(table: sqlite3.Connection, spec: str, metric: str, source: str) -> list[Point]:
    """All nights in which the figure was measured afresh, oldest first."""
    rows = table.execute(
        "SELECT night, value FROM figures WHERE spec = ? AND metric = ? AND source = ? ORDER BY night, run",
        (spec, metric, source),
    )
    nights: dict[str, list[float]] = {}
    for night, value in rows:
        nights.setdefault(night, []).append(value)
    return [Point(night, tuple(values)) for night, values in nights.items()]


def inputs_at(table: sqlite3.Connection, spec: str, night: str) -> dict[str, dict[str, str]]:
    """What went into a night, by stage; empty when nothing is known of it."""
    found: dict[str, dict[str, str]] = {}
    for stage, name, value in table.execute(
        "SELECT stage, name, value FROM inputs WHERE spec = ? AND night = ?", (spec, night)
    ):
        found.setdefault(stage, {})[name] = value
    return found


def rows(table: sqlite3.Connection, spec: str, last: int) -> list[dict[str, Any]]:
    """The newest nights, oldest first, as dicts."""
    names = ("night", "started", "seconds", "state", "verdict", "commit_id", "measured", "summary")
    found = table.execute(
        f"SELECT {', '.join(names)} FROM nights WHERE spec = ? ORDER BY night DESC LIMIT ?", (spec, last)
    ).fetchall()
    return [dict(zip(names, row, strict=True)) for row in reversed(found)]


def metrics_of(table: sqlite3.Connection, spec: str) -> list[str]:
    """Every figure that was ever measured for a spec."""
    return [name for (name,) in table.execute("SELECT DISTINCT metric FROM figures WHERE spec = ? ORDER BY 1", (spec,))]


def specs_of(table: sqlite3.Connection) -> list[str]:
    return [name for (name,) in table.execute("SELECT DISTINCT spec FROM nights ORDER BY 1")]


_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Iterable[float | None]) -> str:
    """One character per night between the smallest and the largest; a gap where nothing was measured."""
    shown = list(values)
    known = [value for value in shown if value is not None]
    if not known:
        return ""
    low, span = min(known), (max(known) - min(known)) or 1.0
    return "".join(" " if value is None else _BARS[round(7 * (value - low) / span)] for value in shown)


def to_text(nights: Sequence[Mapping[str, Any]], points: Mapping[str, Sequence[Point]], metric: str, unit: str) -> str:
    """A line per source, then a table of nights; `points` by source."""
    by_source = {source: {point.night: point for point in found} for source, found in points.items()}
    lines = [f"{metric}{f' ({unit})' if unit else ''}"]
    for source, found in by_source.items():
        if found:
            values = [point.value for point in found.values()]
            line = sparkline(found[row["night"]].value if row["night"] in found else None for row in nights)
            lines.append(f"  {source:<6} {line}  {min(values):.6g} to {max(values):.6g}")
    lines.append(f"  {'night':<24} {'state':<12} {'verdict':<13} {'build':>10} {'live':>10} {'spread':>8}  summary")
    for row in nights:
        cells = {source: found.get(row["night"]) for source, found in by_source.items()}
        build, live = cells.get("build"), cells.get("live")
        spread = f"{100 * (max(live.values) / min(live.values) - 1):.2f} %" if live and min(live.values) > 0 else ""
        figures = [f"{point.value:.6g}" if point else "" for point in (build, live)]
        lines.append(
            f"  {row['night']:<24} {row['state']:<12} {row['verdict'] or '':<13} {figures[0]:>10} {figures[1]:>10} "
            f"{spread:>8}  {row['summary']}".rstrip()
        )
    return "\n".join(lines)


def overview(nights: Sequence[Mapping[str, Any]], points: Mapping[str, Mapping[str, Sequence[Point]]]) -> str:
    """The headline figures as one line each, then the nights."""
    lines = []
    for metric, by_source in points.items():
        for source, found in by_source.items():
            by_night = {point.night: point.value for point in found}
            if by_night:
                line = sparkline(by_night.get(row["night"]) for row in nights)
                lines.append(f"  {metric:<26} {source:<6} {line}  now {found[-1].value:.6g}")
    for row in nights:
        lines.append(f"  {row['night']:<24} {row['state']:<12} {row['summary'] or row['verdict'] or ''}".rstrip())
    return "\n".join(lines)


def last_line(table: sqlite3.Connection, spec: str) -> str:
    """The newest night of a spec in one line."""
    (row,) = rows(table, spec, 1)
    return f"{spec:<32} {row['night']:<24} {row['state']:<12} {row['summary'] or row['verdict'] or ''}".rstrip()


def table_path(store: Store) -> Path:
    return store.local.root / FILE
