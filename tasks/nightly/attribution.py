"""What changed between a good night and a bad one, and which of it can have moved a figure.

Compares every key component of every stage, the packages and the machine. What cannot be the cause is left out: a
changed input whose stage nevertheless made the same bytes, and stages that no figure passes through. The rest is ranked
by how directly its stage shapes the figure. Refuses to prove: that is `kilotok bisect`'s, which swaps inputs.
Run it: `python -m pytest tests/tasks/nightly/test_attribution.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from specs.errors import IntegrityError, StoreError
from tasks.store.keys import changes

if TYPE_CHECKING:
    from tasks.store import Store

Inputs = Mapping[str, Mapping[str, str]]
ENVIRONMENT = "environment"  # a stage of its own: what no key holds, yet every measurement stands on
DIGEST = "digest"
# For each group of figures, the stages that shape them, most direct first. A stage that is not listed cannot.
_SHAPES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("acceptance", ("train_draft", "synthesize", "quantize", "download", "build_engine", "validate")),
    ("accuracy", ("quantize", "download", "build_engine", "validate")),
    ("", ("build_engine", "deploy", "train_draft", "quantize", "download", "validate")),
)
_MEASURE = ("validate", "deploy", ENVIRONMENT)  # judged by their inputs: their output is the measurement itself
_ENVIRONMENT_KINDS = {"gpu_driver": "driver", "container": "container"}
_KINDS = {"package": "packages", "machine": "machine", "code": "code", "spec": "spec", "data": "data", "lock": "lock"}


@dataclass(frozen=True)
class Cause:
    """One changed input: its kind (spec, lock, packages, container, driver, code, data or machine), in words."""

    kind: str
    name: str  # the key component, such as spec.draft.training.epochs
    stage: str
    what: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inputs_of(store: Store, build: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Components and digest of every artifact of a build, and its environment, as far as the store still has them."""
    found: dict[str, dict[str, str]] = {}
    for row in build.get("stages") or ():
        try:
            manifest = store.load(row["uri"]) if row.get("uri") else None
        except (StoreError, IntegrityError):
            continue
        if manifest is not None:
            own = {name: value for name, value in manifest.components.items() if not name.startswith("input.")}
            found[manifest.stage] = {**own, DIGEST: manifest.digest}
    return found


def environment() -> dict[str, str]:
    """What no key holds: every package, the driver, the kernel."""
    from tasks.edges.machine import describe
    from tasks.provenance import packages

    machine = {f"machine.{name}": value for name, value in describe().items()}
    return {**machine, **{f"package.{name}": version for name, version in packages().items()}}


def causes(good: Inputs, bad: Inputs, metric: str) -> list[Cause]:
    """The changed inputs that can have moved `metric`, most direct first; empty when nothing known changed."""
    order = next(stages for group, stages in _SHAPES if metric.startswith(group))
    found: dict[str, Cause] = {}
    for stage in (*order, ENVIRONMENT):
        old, new = good.get(stage), bad.get(stage)
        if not old or not new or (stage not in _MEASURE and old.get(DIGEST) == new.get(DIGEST)):
            continue
        for name in sorted({*old, *new} - {DIGEST}):
            if old.get(name) != new.get(name) and name not in found:
                (what,) = changes(_only(old, name), _only(new, name))
                found[name] = Cause(_kind(name), name, stage, what)
    return list(found.values())


def _only(components: Mapping[str, str], name: str) -> dict[str, str]:
    return {name: components[name]} if name in components else {}


def _kind(name: str) -> str:
    head, _, rest = name.partition(".")
    return _ENVIRONMENT_KINDS.get(rest) or _KINDS.get(head, head)


def words(found: list[Cause], limit: int = 3) -> str:
    """One line for people; says so when nothing that is recorded changed."""
    if not found:
        return "no input changed: look at the machine (clocks, temperature, neighbours)"
    lines = [f"{cause.kind}: {cause.what}" for cause in found[:limit]]
    return "; ".join(lines) + (f" and {len(found) - limit} more" if len(found) > limit else "")
