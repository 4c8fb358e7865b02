"""What a prediction and a sweep look like: their parts of a page, and the one drawing that no report has.

Refuses to compute: every figure comes from `levers.explain` or `sweeping.Found`.
Run it: `kilotok explain SPEC --plot FILE.html`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.predict.levers import waterfall
from tasks.predict.sweep import reasons
from tasks.report import plots
from tasks.report.sheet import Part, write
from tasks.report.svg import Canvas, linear, ticks
from tasks.report.words import count, micros, signed, three

if TYPE_CHECKING:
    from tasks.predict.sweep import Point
    from tasks.predict.sweeping import Found

SHOWN = 24  # rows of a table of points


def explanation(path: Path, found: Mapping[str, Any]) -> Path:
    """The page of `levers.explain`."""
    said, rows = found["prediction"], found["levers"]
    us, user, as_it_is = said["cycle_us"], said["tps_per_user"], rows[0]
    cycle = waterfall(found)
    top = max(cycle["parts"], key=lambda part: part["us"])
    lines = (
        f"{three(user['expected'])} tokens/s for one user, {three(user['low'])} to {three(user['high'])}: "
        f"{said['acceptance']['length']:.2f} tokens from every cycle of {micros(us['expected'])}.",
        f"Predicted, not run: {said['hardware']['gpus']} x {said['hardware']['name']}. Bytes alone take "
        f"{micros(us['hbm'])}, with the wire {micros(us['hbm_ar'])}.",
        f"Acceptance: {said['acceptance']['source']}.",
    )
    levers = [
        (one["name"], micros(one["cycle_us"]), three(one["tps_per_user"]), f"{signed(100 * one['gain'], 1)} %")
        for one in rows
    ]
    lengths = [
        (f"{row['draft_tokens']}", f"{row['acceptance']:.2f}", micros(row["chain_us"]), three(row["chain_tps"]),
         micros(row["parallel_us"]), three(row["parallel_tps"]))
        for row in found["draft_lengths"]
    ]  # fmt: skip
    fastest = max(found["draft_lengths"], key=lambda row: row["chain_tps"])
    parts = (
        Part(
            "One cycle", f"The longest part is {top['name']}, {micros(top['us'])}. The stack's overhead is left out.",
            lambda width: plots.waterfall(cycle, width),
        ),
        Part(
            "Levers", f"One thing changed at a time, from a cycle of {micros(as_it_is['cycle_us'])}.",
            lambda width: gains(rows[1:], width), "What the arithmetic gains, the stack's overhead kept as it is.",
            ("Lever", "Cycle", "Tokens/s", "Gain"), levers,
        ),
        Part(
            "Draft length", f"A chain is fastest with {count(int(fastest['draft_tokens']), 'draft token')}.",
            header=("Draft tokens", "Acceptance", "Cycle", "Tokens/s", "Cycle in one pass", "Tokens/s in one pass"),
            rows=lengths,
        ),
    )  # fmt: skip
    return write(path, "Where the microseconds go", lines, parts, said["spec"])


def gains(levers: Sequence[Mapping[str, Any]], width: float) -> str:
    """A bar per lever, losses to the left of zero."""
    wide = width > 500
    left, right, row, top = (330.0, 62.0, 23.0, 24.0) if wide else (0.0, 62.0, 37.0, 24.0)
    low, high = min(0.0, *(one["gain"] for one in levers)), max(0.0, *(one["gain"] for one in levers))
    art = Canvas(width, top + row * len(levers) + 6, "What each lever is worth, in percent of tokens per second")
    x = linear(low, high or 1.0, left + 6, width - right)
    for tick in ticks(low, high, 5):
        art.line(x(tick), 18, x(tick), art.height if wide else 22, "zero" if tick == 0 else "grid")
        art.text(x(tick), 12, "0" if abs(tick) < 1e-9 else f"{signed(100 * tick, 0)} %", "tick", "middle")
    for at, one in enumerate(levers):
        y, words = top + at * row, f"{signed(100 * one['gain'], 1)} %"
        art.text(left - 8 if wide else 0, y + 14, one["name"], "", "end" if wide else "start")
        start, end = sorted((x(0.0), x(one["gain"])))
        tip = f"{one['name']}: {words}, a cycle of {micros(one['cycle_us'])}"
        art.rect(start, y + (4 if wide else 20), end - start, 13, "f-verify" if one["gain"] >= 0 else "f-bad", tip)
        art.text(width, y + 14, words, "strong", "end")
    return art.svg()


def sweep_page(path: Path, name: str, found: Found) -> Path:
    """The page of a sweep: the front among all other points, what was measured, what cannot run."""
    deciding = found.measured or found.predicted
    able = [point for point in deciding if not point.refused]
    rest = sorted((p for p in able if p not in found.front), key=lambda p: -p.tps_user)
    numbered = [*found.front, *rest]
    refused = reasons(found.predicted)
    kind = "measured" if found.measured else "predicted, not yet run"
    shown = [_plotted(number, point) for number, point in enumerate(numbered, 1)]
    lines = (
        f"Best: {found.best.name}, {three(found.best.tps_user)} tokens/s for one user and "
        f"{three(found.best.tps_server)} for the server, {kind}.",
        f"{count(len(found.predicted), 'point')} predicted, {len(found.measured)} measured, "
        f"{sum(number for _, number, _ in refused)} cannot run.",
    )
    edge = len(found.front)
    parts = [
        Part(
            "Front", "Points that no other beats in both speeds; their numbers are those of the table.",
            lambda width: plots.pareto(
                {"points": shown[:edge], "others": shown[edge:], "user_lines": False}, width
            ),
            "One request at a time for the one axis, all slots taken for the other. The dashed marks are the records "
            "of one DGX B200 with Llama 4 Maverick.",
        ),
        Part(
            "Points", _left_out(len(numbered)),
            header=("Point", "One user", "Server", "Users", *(("Predicted",) if found.measured else ()), "Front"),
            rows=[_row(number, point, found) for number, point in enumerate(numbered[:SHOWN], 1)],
        ),
    ]  # fmt: skip
    if refused:
        rows = [(reason, f"{number}", example) for reason, number, example in refused]
        parts.append(Part("Cannot run", header=("Reason", "Points", "Such as"), rows=rows))
    return write(path, "Sweep", lines, parts, name)


def _left_out(total: int) -> str:
    return f"The first {SHOWN} of {total}; all are in points.json." if total > SHOWN else ""


def _plotted(number: int, point: Point) -> dict[str, Any]:
    return {
        "profile": point.name, "users": point.users, "label": f"{number}:",
        "tps_user": point.tps_user, "tps_server": point.tps_server,
    }  # fmt: skip


def _row(number: int, point: Point, found: Found) -> tuple[str, ...]:
    before = next((said for said in found.predicted if said.values == point.values), None)
    hint = f"{three(before.tps_user)} and {three(before.tps_server)}" if before else ""
    mark = "best" if point.values == found.best.values else "yes" if point in found.front else ""
    return (
        f"{number}. {point.name}", three(point.tps_user), three(point.tps_server), f"{point.users}",
        *((hint,) if found.measured else ()), mark,
    )  # fmt: skip
