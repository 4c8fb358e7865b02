"""The large drawings: Pareto, waterfall, accuracy differences, signal to noise by layer. Inline SVG, two widths each.

Refuses scripts, fonts and colours of its own: shapes carry classes of style.css, marks a <title> as their tooltip.
Run it: `python -m tasks.report REPORT_JSON OUT` draws a page again from its record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tasks.report.svg import Canvas, decades, linear, logarithmic, spread, ticks, width_of
from tasks.report.words import micros, signed, three

WIDE, NARROW = 720, 340
RECORD_TPS_USER, RECORD_TPS_SERVER = 1038.0, 72000.0  # one DGX B200, two configurations of it (May 2025)


def responsive(draw: Callable[[float], str], wide: float = WIDE, narrow: float = NARROW) -> str:
    """The drawing at both widths; CSS shows the one that fits, so letters keep their size on a phone."""
    return f'<div class="wide">{draw(wide)}</div><div class="narrow">{draw(narrow)}</div>'


# -- Pareto ------------------------------------------------------------------------------------------------------------
def pareto(data: Mapping[str, Any], width: float) -> str:
    """TPS/user against TPS/server on log axes with both record marks and, unless `user_lines` is false, lines of equal
    users. `others` are points beside the line; a point's `label` stands in place of its users."""
    points: Sequence[Mapping[str, Any]] = data["points"]
    others: Sequence[Mapping[str, Any]] = data.get("others") or ()
    height, left, right, top, bottom = (400.0 if width > 500 else 340.0), 60.0, 14.0, 22.0, 44.0
    base = data.get("baseline")
    xs = [point["tps_user"] for point in (*points, *others)] + ([base] if base else [])
    ys = [point["tps_server"] for point in (*points, *others)] + ([base] if base else [])
    x_low, x_high = _floor125(min([*xs, RECORD_TPS_USER]) / 1.6), max([*xs, RECORD_TPS_USER]) * 2.4
    y_low, y_high = _floor125(min([*ys, RECORD_TPS_SERVER]) / 2), max([*ys, RECORD_TPS_SERVER]) * 2.6
    x, y = logarithmic(x_low, x_high, left, width - right), logarithmic(y_low, y_high, height - bottom, top)
    art = Canvas(
        width,
        height,
        "Tokens per second for one user against tokens per second of the server, log axes, with both record marks",
    )
    for tick in decades(y_low, y_high):
        art.line(left, y(tick), width - right, y(tick), "grid")
        art.text(left - 8, y(tick) + 4, f"{tick:,.0f}", "tick", "end")
    for tick in decades(x_low, x_high):
        art.line(x(tick), top, x(tick), height - bottom, "grid")
        art.text(x(tick), height - bottom + 16, f"{tick:,.0f}", "tick", "middle")
    art.text((left + width - right) / 2, height - 8, "tokens/s for one user", "axis", "middle")
    art.text(left, 12, "tokens/s of the whole server", "axis")
    if data.get("user_lines", True):
        _user_lines(art, x, y, (x_low, x_high, y_low, y_high))
    art.line(
        x(RECORD_TPS_USER),
        top,
        x(RECORD_TPS_USER),
        height - bottom,
        "record",
        "Record for one user: 1,038 tokens/s on one DGX B200",
    )
    art.text(x(RECORD_TPS_USER) - 5, height - bottom - 8, "record 1,038", "recordlabel", "end")
    art.line(
        left,
        y(RECORD_TPS_SERVER),
        width - right,
        y(RECORD_TPS_SERVER),
        "record",
        "Record for one server: 72,000 tokens/s on one DGX B200",
    )
    art.text(left + 6, y(RECORD_TPS_SERVER) - 6, "record 72,000", "recordlabel")
    for point in others:
        tip = f"{point['profile']}: {three(point['tps_user'])} and {three(point['tps_server'])} tokens/s"
        art.dot(x(point["tps_user"]), y(point["tps_server"]), 3.5, "dot f-host", tip)
    _points(art, points, base, x, y, width)
    return art.svg()


def _user_lines(
    art: Canvas, x: Callable[[float], float], y: Callable[[float], float], box: tuple[float, float, float, float]
) -> None:
    """server = users x user is a diagonal on log axes."""
    x_low, x_high, y_low, y_high = box
    slope = math.degrees(math.atan2(y(10) - y(1), x(10) - x(1)))
    for users in (1, 10, 100):
        start, end = max(x_low, y_low / users), min(x_high, y_high / users)
        if start >= end:
            continue
        art.line(x(start), y(users * start), x(end), y(users * end), "users")
        at = end / 1.12
        art.text(x(at), y(users * at) - 5, "1 user" if users == 1 else f"{users} users", "faint", "end", slope)


def _points(
    art: Canvas,
    points: Sequence[Mapping[str, Any]],
    base: float | None,
    x: Callable[[float], float],
    y: Callable[[float], float],
    width: float,
) -> None:
    if base:
        art.dot(x(base), y(base), 5, "hollow", f"The source model on this machine: {three(base)} tokens/s for one user")
        art.text(x(base) - 9, y(base) + 4, f"source {three(base)}", "faint halo", "end")
    places = [(x(point["tps_user"]), y(point["tps_server"])) for point in points]
    if len(places) > 1:
        art.path(places, "series s-verify")
    for at, (point, (px, py)) in enumerate(zip(points, places, strict=True)):
        users = point.get("label") or ("1 user" if point["users"] == 1 else f"{point['users']} users")
        each, whole = three(point["tps_user"]), three(point["tps_server"])
        tip = f"{point['profile']}: {users}, {each} tokens/s each, {whole} tokens/s in all"
        art.dot(px, py, 5.5, "dot f-verify", tip)
        if at == 0:  # the two ends carry figures, the points between only their users: the line explains them
            right = px + 10 + width_of(f"{users} {three(point['tps_user'])}", 13) < width
            art.text(
                px + 10 if right else px - 10,
                py + 5,
                f"{users} {three(point['tps_user'])}",
                "value halo",
                "start" if right else "end",
            )
        elif at == len(points) - 1:
            art.text(
                px,
                py - 12,
                f"{users} {three(point['tps_server'])}",
                "value halo",
                "start" if px < width / 3 else "middle",
            )
        elif math.hypot(px - places[-1][0], py - places[-1][1]) > 64:
            art.text(px, py - 11, str(point.get("label", point["users"])).rstrip(":"), "faint halo", "middle")


def _floor125(value: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not above."""
    power = 10 ** math.floor(math.log10(value))
    return power * max(factor for factor in (1, 2, 5) if factor * power <= value * (1 + 1e-9))


# -- waterfall ---------------------------------------------------------------------------------------------------------
def waterfall(cycle: Mapping[str, Any], width: float) -> str:
    """Each part starts where the one before ended; the ruler above is the whole cycle."""
    parts, total = _merged(cycle["parts"]), cycle["total_us"]
    wide = width > 500
    left, right, row = (124.0, 122.0, 23.0) if wide else (0.0, 0.0, 37.0)
    top = 30.0
    art = Canvas(width, top + row * len(parts) + 6, "One decode cycle: where its time goes, part after part")
    x = linear(0, total, left, width - right)
    for tick in ticks(0, total, 5):
        art.line(
            x(tick), 18, x(tick), art.height if wide else 24, "grid"
        )  # a phone's rows carry text across the whole width
        place = "start" if x(tick) < left + 4 else "end" if x(tick) > width - right - 12 else "middle"
        art.text(x(tick), 12, _ruler(tick), "tick", place)
    passed = 0.0
    for at, part in enumerate(parts):
        y = top + at * row
        share = f"{100 * part['us'] / total:.1f} %"
        tip = f"{part['group']}: {part['name']}, {micros(part['us'])}, {share} of the cycle"
        bar_y, bar_height = (y, row - 7) if wide else (y + 17, 12.0)
        art.rect(x(passed), bar_y, x(passed + part["us"]) - x(passed), bar_height, f"f-{part['group']}", tip)
        if wide:
            art.text(left - 10, y + 12, part["name"], "label", "end")
            art.text(width - right + 66, y + 12, micros(part["us"]), "value", "end")
            art.text(width, y + 12, share, "tick", "end")
        else:
            art.text(0, y + 12, part["name"], "label")
            art.text(width - 52, y + 12, micros(part["us"]), "value", "end")
            art.text(width, y + 12, share, "tick", "end")
        passed += part["us"]
    return art.svg()


def _ruler(us: float) -> str:
    """A tick of the time axis: 0, 500 µs, 2 ms."""
    if not us:
        return "0"
    return f"{us:g} µs" if us < 1000 else f"{us / 1000:g} ms"


def _merged(parts: Sequence[Mapping[str, Any]], limit: int = 16) -> list[Mapping[str, Any]]:
    """The smallest parts of a group as one row when there are too many to read."""
    if len(parts) <= limit:
        return list(parts)
    keep = {id(part) for part in sorted(parts, key=lambda part: -part["us"])[: limit - 3]}
    rows: list[Mapping[str, Any]] = []
    for group in dict.fromkeys(part["group"] for part in parts):
        members = [part for part in parts if part["group"] == group]
        small = [part for part in members if id(part) not in keep]
        rows += [part for part in members if id(part) in keep]
        if small:
            rows.append({"name": f"{len(small)} smaller", "group": group, "us": sum(part["us"] for part in small)})
    return rows


def group_strip(cycle: Mapping[str, Any], width: float) -> str:
    """The cycle as one stacked bar of its groups."""
    groups: dict[str, float] = {}
    for part in cycle["parts"]:
        groups[part["group"]] = groups.get(part["group"], 0.0) + part["us"]
    total = sum(groups.values()) or 1.0
    art = Canvas(width, 16, "Draft, verify, sampling and host time as shares of one cycle")
    x = linear(0, total, 0, width)
    passed = 0.0
    for name, us in groups.items():
        art.rect(
            x(passed),
            0,
            x(passed + us) - x(passed) - 1.5,
            16,
            f"f-{name}",
            f"{name}: {micros(us)}, {100 * us / total:.1f} %",
        )
        passed += us
    return art.svg()


def part_changes(parts: Sequence[Mapping[str, Any]], width: float) -> str:
    """How much each part of a cycle gained or lost between two builds; left of the line is faster."""
    left, right, row = (124.0, 178.0, 23.0) if width > 500 else (104.0, 84.0, 26.0)
    gaps = [part["after"] - part["before"] for part in parts]
    reach = max(max(abs(gap) for gap in gaps), 1e-9)
    x = linear(-reach, reach, left, width - right)
    art = Canvas(width, row * len(parts) + 8, "Change of each part of the cycle between two builds")
    for at, (part, gap) in enumerate(zip(parts, gaps, strict=True)):
        y = at * row + 4
        tip = f"{part['name']}: {micros(part['before'])} then, {micros(part['after'])} now"
        art.rect(min(x(0), x(gap)), y, abs(x(gap) - x(0)), row - 8, "f-good" if gap < 0 else "f-bad", tip)
        art.text(left - 10, y + 12, part["name"], "label", "end")
        sign = "+" if gap > 0 else "\N{MINUS SIGN}"
        art.text(
            width - right + 82,
            y + 12,
            f"{sign}{micros(abs(gap))}" if abs(gap) >= 0.001 * reach else "same",
            "value",
            "end",
        )
        if width > 500:
            art.text(width, y + 12, f"{micros(part['after'])} now", "tick", "end")
    art.line(x(0), 0, x(0), art.height, "zero")
    return art.svg()


# -- accuracy ----------------------------------------------------------------------------------------------------------
def differences(data: Mapping[str, Any], width: float) -> str:
    """Served minus source in points, with its interval and the margin it must stay above."""
    tasks = [task for task in data["tasks"] if task.get("difference") is not None]
    margin = data.get("margin")
    left, right, row, top = (124.0, 84.0, 30.0, 30.0) if width > 500 else (74.0, 60.0, 30.0, 30.0)
    lows = [100 * (task["low"] if task.get("low") is not None else task["difference"]) for task in tasks]
    highs = [100 * (task["high"] if task.get("high") is not None else task["difference"]) for task in tasks]
    floor = -100 * margin if margin else 0.0
    span = max([*highs, 0]) - min([*lows, floor]) or 1.0
    low, high = min([*lows, floor]) - 0.08 * span, max([*highs, 0]) + 0.08 * span
    art = Canvas(
        width,
        top + row * len(tasks) + 24,
        "Accuracy of the served model minus the source model by task, with intervals and the margin",
    )
    x = linear(low, high, left, width - right)
    bottom = top + row * len(tasks)
    if margin:
        art.rect(
            left,
            top - 6,
            x(floor) - left,
            bottom - top + 6,
            "zone",
            "An interval that reaches in here is not a pass",
            0,
        )
        art.line(x(floor), top - 10, x(floor), bottom, "limit", f"Non-inferiority margin: {signed(floor, 1)} points")
        art.text(
            x(floor),
            top - 15,
            f"margin {signed(floor, 1)} pt",
            "limitlabel",
            "middle" if x(floor) > left + 50 else "start",
        )
    for tick in ticks(low, high, 5 if width > 500 else 3):
        art.line(x(tick), top - 6, x(tick), bottom, "zero" if abs(tick) < 1e-9 else "grid")
        art.text(
            x(tick), bottom + 16, signed(tick, 1 if span < 4 else 0) if abs(tick) > 1e-9 else "equal", "tick", "middle"
        )
    for at, task in enumerate(tasks):
        y = top + at * row + row / 2
        value = 100 * task["difference"]
        tip = f"{task['task']}: {signed(value, 2)} points, interval {signed(lows[at], 2)} to {signed(highs[at], 2)}"
        art.text(left - 10, y + 4, task["task"], "label", "end")
        art.line(x(lows[at]), y, x(highs[at]), y, "whisker", tip)
        art.dot(x(value), y, 5, "dot f-verify", tip)
        art.text(width, y + 4, f"{signed(value, 1)} pt", "value", "end")
    return art.svg()


# -- quantization ------------------------------------------------------------------------------------------------------
_KINDS = {"weight": "verify", "input": "draft", "kv": "sampling"}
_KIND_WORDS = {"weight": "weights", "input": "activations", "kv": "KV cache"}


def layer_noise(data: Mapping[str, Any], width: float) -> str:
    """The worst tensor of each layer and kind; a line per kind, labelled at its end."""
    rows = data["layers"]
    height, left, right, top, bottom = 220.0, 38.0, 76.0, 22.0, 36.0
    values = [row["sqnr_db"] for row in rows]
    low, high = math.floor(min(values) - 1), math.ceil(max(values) + 1)
    last = max(row["layer"] for row in rows)
    x, y = linear(0, last or 1, left + 6, width - right), linear(low, high, height - bottom, top)
    art = Canvas(width, height, "Signal to quantization noise of the worst tensor by layer")
    for tick in ticks(low, high, 4):
        art.line(left, y(tick), width - right + 6, y(tick), "grid")
        art.text(left - 8, y(tick) + 4, f"{tick:g}", "tick", "end")
    for tick in ticks(0, last, 8 if width > 500 else 4):
        if tick == int(tick):
            art.text(x(tick), height - bottom + 18, f"{tick:.0f}", "tick", "middle")
    art.text(left, 12, "dB of the worst tensor (higher is better)", "axis")
    art.text((left + width - right) / 2, height - 4, "layer", "axis", "middle")
    kinds = sorted({row["kind"] for row in rows}, key=lambda kind: list(_KINDS).index(kind) if kind in _KINDS else 9)
    ends = []
    for kind in kinds:
        mine = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["layer"])
        colour = _KINDS.get(kind, "host")
        art.path([(x(row["layer"]), y(row["sqnr_db"])) for row in mine], f"series s-{colour}")
        for row in mine:
            art.dot(
                x(row["layer"]),
                y(row["sqnr_db"]),
                3 if last < 30 else 2.2,
                f"f-{colour}",
                f"{row['name']} ({kind}): {row['sqnr_db']:.1f} dB",
            )
        ends.append((y(mine[-1]["sqnr_db"]), _KIND_WORDS.get(kind, kind), colour))
    heights = spread([end[0] for end in ends], 14, top, height - bottom)
    for place, (_, words, colour) in zip(heights, ends, strict=True):
        art.text(width - right + 10, place + 4, words, f"t-{colour}")
    return art.svg()
