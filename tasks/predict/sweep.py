"""A grid of specs, predicted and pruned, and the best of those that were measured: pure functions, no flow, no files.

The predictor only decides what is worth measuring; what is best is decided by measurement, or said to be predicted.
Refuses a key that the spec does not have and a grid that nobody would wait for. Run it: `kilotok sweep SPEC --over
KEY=1..7`.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from engine_plugins.trtllm.render import render
from specs.errors import InputError, KilotokError
from tasks.predict.limits import check_engine
from tasks.predict.prediction import predict
from tasks.predict.records import Records

if TYPE_CHECKING:
    from specs.schema import Spec

MOST_POINTS = 20_000
SEARCHED = 500  # points that Optuna proposes where there are more than two dimensions
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?")


@dataclass(frozen=True)
class Point:
    """One spec of the grid. Speeds are predicted, then measured; `refused` says why it cannot run."""

    values: tuple[tuple[str, Any], ...]  # dotted key -> value
    tps_user: float = 0.0
    tps_server: float = 0.0
    users: int = 1
    measured: bool = False
    refused: str = ""
    extra: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def overrides(self) -> list[str]:
        """As `--set` takes them."""
        return [f"{key}={yaml_value(value)}" for key, value in self.values]

    @property
    def name(self) -> str:
        """ "draft_tokens=3 max_batch_size=8"."""
        return " ".join(f"{key.rpartition('.')[2]}={yaml_value(value)}" for key, value in self.values)

    def to_dict(self) -> dict[str, Any]:
        return {
            "values": dict(self.values), "tps_user": round(self.tps_user, 1), "tps_server": round(self.tps_server, 1),
            "users": self.users, "measured": self.measured, "refused": self.refused, **self.extra,
        }  # fmt: skip


def yaml_value(value: Any) -> str:
    """One line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def parse_over(text: str) -> tuple[str, list[Any]]:
    """ "engine.draft_tokens=1..7" or "a.b=1,4,8" -> key and values; "8..64..8" has a step."""
    key, separator, right = text.partition("=")
    if not separator or not key or not right:
        raise InputError(f"--over {text!r} names no values", "--over", "write KEY=1..7, KEY=8..64..8 or KEY=1,4,8")
    match = _RANGE.fullmatch(right)
    if match:
        low, high, step = int(match[1]), int(match[2]), int(match[3] or 1)
        if high < low or step < 1:
            raise InputError(f"--over {text!r} is an empty range", "--over", f"write {key}={high}..{low}")
        return key, list(range(low, high + 1, step))
    return key, [yaml.safe_load(part) for part in right.split(",")]


def grid(over: Sequence[str]) -> list[Point]:
    """Every combination, in order. Raises InputError for a key said twice and for too many points."""
    axes = [parse_over(text) for text in over]
    keys = [key for key, _ in axes]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise InputError(f"{twice[0]} is swept twice", "--over", "give all of its values at once")
    if (total := math.prod(len(values) for _, values in axes)) > MOST_POINTS:
        raise InputError(f"{total} points", "--over", f"at most {MOST_POINTS}; use a step, such as 8..64..8")
    return [Point(tuple(zip(keys, values, strict=True))) for values in itertools.product(*(v for _, v in axes))]


def variant(spec: Spec, point: Point) -> Spec:
    """The spec with the point's values. Raises InputError for a key it does not have and for values it may not have."""
    tree = copy.deepcopy(spec.to_dict())
    for key, value in point.values:
        place: Any = tree
        *above, last = key.split(".")
        for part in above:
            place = place.get(part) if isinstance(place, dict) else None
        free = key.startswith(("engine.options.", "engine.env."))  # these sections take any key
        if not isinstance(place, dict) or (last not in place and not free):
            known = sorted(_keys(spec.to_dict()))
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
            raise InputError(
                f"the spec has no {key}", "--over", f"did you mean {near[0]}?" if near else "see docs/spec.md"
            )
        place[last] = value
    try:
        made = type(spec).model_validate(tree)
    except ValueError as error:  # pydantic's own
        first = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{where}: {first['msg']}", f"--over {point.name}", "leave this value out") from None
    made._path, made._marks = spec._path, spec._marks
    return made


def _keys(tree: Mapping[str, Any], above: str = "") -> Iterable[str]:
    for key, value in tree.items():
        yield f"{above}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{above}{key}.")


def foretell(spec: Spec, point: Point, records: Records) -> Point:
    """The point with predicted speeds, or with the reason why it cannot run."""
    try:
        made = variant(spec, point)
        check_engine(made)
        case = predict(made, records).case
        if made.engine.backend == "trtllm":
            render(made)
    except KilotokError as error:
        return Point(point.values, refused=str(error))
    return Point(point.values, case.tps_per_user.expected, case.tps_per_server.expected, case.users)


def search(spec: Spec, points: Sequence[Point], records: Records, trials: int = SEARCHED) -> list[Point]:
    """Predict all points of one or two dimensions; of more, those that Optuna's NSGA-II proposes for both speeds."""
    variant(spec, points[0])  # a wrong key is one error, not a thousand refused points
    if len(points[0].values) <= 2 or len(points) <= trials:
        return [foretell(spec, point, records) for point in points]
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    axes: dict[str, list[Any]] = {}
    for point in points:
        for key, value in point.values:
            if value not in axes.setdefault(key, []):
                axes[key].append(value)
    study = optuna.create_study(directions=["maximize", "maximize"], sampler=optuna.samplers.NSGAIISampler(seed=0))
    found: dict[tuple[tuple[str, Any], ...], Point] = {}
    for _ in range(trials):
        trial = study.ask()
        values = tuple((key, axis[trial.suggest_int(key, 0, len(axis) - 1)]) for key, axis in axes.items())
        point = found.get(values) or foretell(spec, Point(values), records)
        found[values] = point
        study.tell(trial, [point.tps_user, point.tps_server])
    return list(found.values())


def front(points: Iterable[Point]) -> list[Point]:
    """Points that no other beats in both speeds, fastest for one user first."""
    kept: list[Point] = []
    for point in sorted((p for p in points if not p.refused), key=lambda p: (-p.tps_user, -p.tps_server)):
        if not kept or point.tps_server > kept[-1].tps_server:
            kept.append(point)
    return kept


def worth_measuring(points: Sequence[Point], limit: int) -> list[Point]:
    """Up to `limit` points: the predicted front, then the front of what is left, and so on; and never a refused one."""
    left, chosen = [point for point in points if not point.refused], []  # type: list[Point], list[Point]
    while left and len(chosen) < limit:
        layer = front(left)
        chosen += _spread(layer, limit - len(chosen))
        left = [point for point in left if point not in layer]
    return chosen


def _spread(layer: list[Point], limit: int) -> list[Point]:
    """Both ends and evenly between."""
    if len(layer) <= limit:
        return layer
    if limit == 1:
        return layer[:1]
    return [layer[round(at * (len(layer) - 1) / (limit - 1))] for at in range(limit)]


def reasons(points: Sequence[Point]) -> list[tuple[str, int, str]]:
    """(why, how many points, one of them) of what cannot run, the most frequent first."""
    found: dict[str, list[str]] = {}
    for point in points:
        if point.refused:
            found.setdefault(point.refused, []).append(point.name)
    return sorted(((why, len(names), names[0]) for why, names in found.items()), key=lambda row: -row[1])


def best(points: Sequence[Point], by: str) -> Point:
    """The fastest for one "user", or for the "server"; among equals the other speed decides."""
    able = [point for point in points if not point.refused]
    if not able:
        raise InputError("no point can run", "--over", points[0].refused if points else "give other values")
    order = (lambda p: (p.tps_user, p.tps_server)) if by == "user" else (lambda p: (p.tps_server, p.tps_user))
    return max(able, key=order)


def patched(text: str, values: Mapping[str, Any]) -> str:
    """The YAML text with the values of dotted keys replaced or added, comments and order kept.

    A key inside a one-line mapping is changed there; a key that is not written down gets a line of its own.
    """
    for key, value in values.items():
        text = _patched(text, key.split("."), yaml_value(value))
        found: Any = yaml.safe_load(text)
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found != value:
            raise InputError(
                f"{key} cannot be written into this YAML", "sweep", f"set {key}: {yaml_value(value)} by hand"
            )
    return text


def _patched(text: str, parts: list[str], value: str) -> str:
    lines = text.splitlines(keepends=True)
    start, end, indent = 0, len(lines), 0
    for depth, part in enumerate(parts):
        at = next((i for i in range(start, end) if re.match(rf" {{{indent}}}{re.escape(part)}:(\s|$)", lines[i])), None)
        if at is None:
            inner = "".join(f"{' ' * (indent + 2 * i)}{name}:\n" for i, name in enumerate(parts[depth:-1]))
            added = f"{inner}{' ' * (indent + 2 * (len(parts) - 1 - depth))}{parts[-1]}: {value}\n"
            return "".join([*lines[:start], added, *lines[start:]])
        rest = "/".join(parts[depth + 1 :])
        if depth == len(parts) - 1:
            lines[at] = re.sub(r"^(\s*[\w-]+:)\s*(?:\{.*?\}|\[.*?\]|[^#\n]*?)(\s+#.*)?$", rf"\1 {value}\2", lines[at])
            return "".join(lines)
        if "{" in lines[at] and rest and "/" not in rest:  # engine: {draft_tokens: 3, ...}
            inside = rf"(\b{re.escape(rest)}:\s*)[^,}}]+"
            changed = re.sub(inside, rf"\g<1>{value}", lines[at], count=1)
            lines[at] = changed if changed != lines[at] else lines[at].replace("{", f"{{{rest}: {value}, ", 1)
            return "".join(lines)
        start, indent = at + 1, indent + 2
        end = next((i for i in range(start, end) if re.match(rf" {{0,{indent - 1}}}\S", lines[i])), end)
    return "".join(lines)
