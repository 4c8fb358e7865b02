"""What a sweep leaves: points.json, the Pareto page with both record marks, the best spec as a patch, specs for a DGX.

Refuses to mix: where points were measured, the front and the best are of measured points only.
Run it: `kilotok sweep SPEC --over engine.draft_tokens=1..7`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tasks.predict.sweep import Point, best, front, patched, reasons, variant

if TYPE_CHECKING:
    from specs.schema import Spec

SHOWN = 12  # reasons that the text names


@dataclass(frozen=True)
class Found:
    """All predicted points, those measured, the front of the latter if there are any, and the best."""

    predicted: tuple[Point, ...]
    measured: tuple[Point, ...]
    front: tuple[Point, ...]
    best: Point

    def to_dict(self) -> dict[str, Any]:
        return {
            "predicted": [point.to_dict() for point in self.predicted],
            "measured": [point.to_dict() for point in self.measured],
            "front": [point.to_dict() for point in self.front],
            "best": self.best.to_dict(),
        }

    def to_text(self, written: Mapping[str, str]) -> str:
        """A table of the measured points beside their prediction, else of the predicted front."""
        refused = [point for point in self.predicted if point.refused]
        lines = [
            f"{len(self.predicted)} points predicted, {len(refused)} cannot run, {len(self.measured)} measured",
            "",
        ]
        width = max(len(point.name) for point in (self.measured or self.front)) + 2
        lines.append(f"  {'point':<{width}} {'one user':>10} {'server':>10} {'users':>6}  front")
        before = {point.values: point for point in self.predicted}
        for point in self.measured or self.front:
            row = f"  {point.name:<{width}} {point.tps_user:>10,.0f} {point.tps_server:>10,.0f} {point.users:>6}"
            mark = "best" if point.values == self.best.values else "yes" if point in self.front else ""
            said = before.get(point.values)
            hint = f"  predicted {said.tps_user:,.0f} and {said.tps_server:,.0f}" if point.measured and said else ""
            lines.append(f"{row}  {mark:<5}{hint}".rstrip())
        lines += ["", *(f"  cannot run  {many(n, name)}: {why}" for why, n, name in reasons(refused)[:SHOWN])]
        lines += [f"  {name:<11} {path}" for name, path in written.items()]
        kind = "measured" if self.best.measured else "predicted, not yet run"
        return "\n".join([*lines, f"  best        {self.best.name} ({kind})"])


def many(number: int, name: str) -> str:
    """The point, or how many like it."""
    return name if number == 1 else f"{name} and {number - 1} more"


def with_measured(points: Sequence[Point], results: Sequence[Mapping[str, float]]) -> list[Point]:
    """The points with what the flow measured in place of what was predicted."""
    return [
        replace(
            point, tps_user=found["tps_user"], tps_server=found["tps_server"], users=int(found["users"]), measured=True,
            extra={"acceptance": round(found["acceptance"], 3), "cycle_us": round(found["cycle_us"], 1)},
        )
        for point, found in zip(points, results, strict=True)
    ]  # fmt: skip


def conclude(predicted: Sequence[Point], measured: Sequence[Point], by: str) -> Found:
    """Measurement decides where there is any."""
    deciding = measured or predicted
    return Found(tuple(predicted), tuple(measured), tuple(front(deciding)), best(deciding, by))


def write(out: Path, spec: Spec, found: Found, for_dgx: Sequence[Point]) -> dict[str, str]:
    """Write everything into `out`; returns {what: path}."""
    from tasks.predict.drawings import sweep_page

    out.mkdir(parents=True, exist_ok=True)
    (out / "points.json").write_text(json.dumps(found.to_dict(), indent=1), encoding="utf-8")
    written = {"points": str(out / "points.json"), "pareto": str(sweep_page(out / "pareto.html", spec.name, found))}
    written["patch"] = str(_patch(out / "best.patch", spec, found.best))
    if for_dgx:
        paths = [_dgx_spec(out, spec, point) for point in for_dgx]
        written["specs"] = f"{out}/*.yaml, {len(paths)} for a DGX: kilotok run {paths[0]}"
    return written


def _patch(path: Path, spec: Spec, point: Point) -> Path:
    """A unified diff of the spec's own YAML, for `git apply`."""
    before = spec.path.read_text(encoding="utf-8")
    after = patched(before, dict(point.values))
    name = os.path.relpath(spec.path.resolve(), spec.root).replace(os.sep, "/")
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), f"a/{name}", f"b/{name}"
    )
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _spec_name(words: str) -> str:
    """At most 63 characters; what is cut off stays in a digest, so that two points never share a name."""
    name = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    return name if len(name) <= 63 else f"{name[:54].rstrip('-')}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"


def _dgx_spec(out: Path, spec: Spec, point: Point) -> Path:
    """A spec of its own that extends the swept one, and how its server will be started."""
    from engine_plugins.trtllm.render import render

    name = _spec_name(f"{spec.name} {point.name}")
    tree: dict[str, Any] = {
        "kilotok": 1,
        "extends": os.path.relpath(spec.path.resolve(), out.resolve()).replace(os.sep, "/"),
        "name": name,
    }
    for key, value in point.values:
        place = tree
        *above, last = key.split(".")
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    rendered = render(variant(spec, point)).to_dict()
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    path.with_suffix(".rendered.json").write_text(json.dumps(rendered, indent=1), encoding="utf-8")
    return path
