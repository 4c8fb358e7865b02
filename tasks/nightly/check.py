"""What a spec edit would meet on its first night, asked before it is merged: schema, lock, engine options, plan, gates.

Refuses to build and to use the network. Gates are held against the prediction, and against the last good build's
figures where there is one.
Run it: `kilotok check specs/`; as a pre-commit hook from `.pre-commit-config.yaml`, in CI from `.github/workflows/`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from specs.errors import InputError, KilotokError
from specs.load import load_spec
from specs.lock import check_lock, read_lock
from tasks.plan import CACHED, plan

if TYPE_CHECKING:
    from specs.schema import Spec
    from tasks.store import Store


@dataclass
class Checked:
    """One spec: `wrong` refuses the merge, `notes` are for the reader."""

    path: str
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        return {"path": self.path, "wrong": self.wrong, "notes": self.notes}


def spec_files(paths: Iterable[Path]) -> list[Path]:
    """The specs among files and folders; a folder's own YAML files, not those below it."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError("no such file or folder", str(path), "kilotok check specs/")
        found += sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    return found


def check(path: Path, store: Store, locked: bool = True) -> Checked:
    """Everything that can be said of one spec without building; `locked` False turns a missing lock into a note."""
    result = Checked(str(path))
    try:
        spec = load_spec(path, [])
    except KilotokError as error:
        result.wrong.append(str(error))
        return result
    if spec.name != path.stem:
        result.wrong.append(f"the spec is named {spec.name}, its file {path.stem}: give both the same name")
    try:
        lock = read_lock(spec)
        if lock is None and not locked:
            result.notes.append("not locked: a night would refuse it until `kilotok lock` has run")
        else:
            check_lock(spec, lock)
    except KilotokError as error:
        result.wrong.append(str(error))
    try:
        _engine(spec)
        built = [row.stage for row in plan(spec, store).rows if row.state != CACHED]
        result.notes.append(f"a night would build {', '.join(built)}" if built else "a night would build nothing")
        for text in [*_predicted(spec, store), *_gates(spec, store)]:
            (result.wrong if text.endswith("impossible") else result.notes).append(text)
    except KilotokError as error:
        result.wrong.append(str(error))
    return result


def _engine(spec: Spec) -> None:
    """The arguments of the pinned TensorRT-LLM; unknown ones are refused here instead of on the DGX."""
    if spec.engine.backend == "trtllm":
        from engine_plugins.trtllm.render import render

        render(spec)


def _predicted(spec: Spec, store: Store) -> list[str]:
    """Physics' verdict on the gates that ask for a speed. Raises InputError for what cannot fit the hardware."""
    from tasks.predict.prediction import predict, targets, unknown
    from tasks.predict.records import Records

    records = Records.read(store, spec.name)
    if why := unknown(spec, records):
        return [f"not predicted: {why}"]
    return targets(spec, predict(spec, records))


def _gates(spec: Spec, store: Store) -> list[str]:
    """Gates that the last good build would not pass."""
    from tasks.validate.gates import judge

    good = store.read_json(f"last_good/{spec.name}")
    if not good:
        return []
    gates = [gate.model_dump(exclude_none=True) for gate in spec.validation.gates]
    results = judge(good["metrics"], gates, good["metrics"])
    return [f"the last good build would fail: {one.metric} {one.reason}" for one in results if one.blocks]


def to_text(results: list[Checked]) -> str:
    """A line per spec, its faults and notes below."""
    lines = []
    for result in results:
        lines.append(f"{'WRONG' if result.wrong else 'ok   '}  {result.path}")
        lines += [f"         {text}" for text in (*result.wrong, *result.notes)]
    return "\n".join(lines)
