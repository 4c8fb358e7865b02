"""The schema: rules of single values, gates, and a JSON Schema that editors can trust."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from specs.errors import SpecError
from specs.load import load_spec
from specs.schema import Spec
from specs.validation import parse_bound

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "specs" / "tiny-llama4-cpu.yaml"


@pytest.mark.parametrize(
    "override",
    [
        "model.source=/abs/path",
        "model.source=file:../elsewhere",
        "model.source=hf://only-one-part",
        "name=Has Spaces",
        "draft.capture_layers=[1, 1, 4]",
        "draft.capture_layers=[1, 2]",
        "draft.launch.nodes=0",
        "draft.launch={nodes: 2, processes_per_node: 8}",
        "draft.training.warm_start=best",
        "draft.training.warm_start=quantize/3fa9c2d1",
        "engine.draft_tokens=-1",
        "engine.tensor_parallel=2",
        "engine.options={enable_min_latency: true}",
        "engine.plugins=[fc13_swiglu, fc13_swiglu]",
        "engine.plugins=[fc13]",
        "quantize.recipe='a recipe'",
        "quantize.max_divergence=0",
        "deploy.port=70000",
        "nightly.cron='61 2 * * *'",
        "nightly.timezone=Mars/Base",
        "validate.accuracy.margin=0",
        "validate.accuracy.alpha=.nan",
        "validate.gates=[{metric: latency.x}]",
        "validate.gates=[{metric: latency.x, at_least: 1, at_most: 2}]",
        "validate.gates=[{metric: latency.x, at_least: 0.9 of yesterday}]",
        "validate.gates=[{metric: nonsense.x, at_least: 1}]",
        "validate.gates=[{metric: latency.x, at_least: 1, tolerance: -1}]",
        "validate.latency.profile=artificial_analysis_7k",
        "validate.latency.users=[1]",
        "validate.latency.arrivals_per_s=[0]",
        "validate.latency.witness=trtllm-bench",
        "validate.accuracy.repeats=4",
        "validate.acceptance.golden={code: [1.2]}",
    ],
)
def test_refused(override: str) -> None:
    with pytest.raises(SpecError):
        load_spec(TINY, [override])


def test_a_named_task_is_known_or_refused_and_runs_code_only_when_told() -> None:
    maverick = ROOT / "specs" / "llama4-maverick-b200.yaml"
    with pytest.raises(SpecError, match="no task gpqa"):
        load_spec(maverick, ["validate.accuracy.tasks=[gpqa]"])
    with pytest.raises(SpecError, match="run_generated_code"):
        load_spec(maverick, ["validate.accuracy.run_generated_code=false"])


@pytest.mark.parametrize(
    ("bound", "parsed"),
    [(1000, (1000.0, None)), ("0.97 of last_good", (0.97, "last_good")), ("4 of baseline", (4.0, "baseline"))],
)
def test_bounds(bound: Any, parsed: tuple[float, str | None]) -> None:
    assert parse_bound(bound) == parsed


def test_a_recipe_is_a_name_or_a_file() -> None:
    assert load_spec(TINY, ["quantize.recipe=file:specs/experts.yaml"]).quantize.recipe == "file:specs/experts.yaml"


def test_no_layer_is_kept_in_bf16_unless_asked() -> None:
    assert load_spec(TINY).quantize.max_divergence is None
    assert load_spec(TINY, ["quantize.max_divergence=0.002"]).quantize.max_divergence == 0.002


def test_spec_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_spec(TINY).engine.draft_tokens = 2  # type: ignore[misc]


@pytest.mark.parametrize("path", sorted((ROOT / "specs").glob("*.yaml")), ids=lambda path: path.stem)
def test_json_schema_accepts_every_spec(path: Path) -> None:
    jsonschema.Draft202012Validator(Spec.json_schema()).validate(yaml.safe_load(path.read_text()))


def test_json_schema_refuses_what_the_loader_refuses() -> None:
    data = yaml.safe_load(TINY.read_text())
    for broken in ({**data, "extra": 1}, {key: data[key] for key in data if key != "draft"}):
        assert list(jsonschema.Draft202012Validator(Spec.json_schema()).iter_errors(broken))


def test_every_field_has_a_description() -> None:
    schema = Spec.json_schema()
    for section in (schema, *schema["$defs"].values()):
        bare = [
            key for key, field in section["properties"].items() if not field.get("description") and "$ref" not in field
        ]
        assert not bare and section["description"]


def test_every_plain_number_has_a_unit_or_limits() -> None:
    """A number without unit must at least be bounded: it is then a share, a seed, a rate or a port."""
    for section in Spec.json_schema()["$defs"].values():
        for key, field in section["properties"].items():
            if field.get("type") in ("integer", "number") and "const" not in field:
                assert "x-unit" in field or {"minimum", "exclusiveMinimum"} & set(field), key


def test_gpu_architecture_is_one_that_the_ops_are_written_for() -> None:
    from engine_plugins.ops.compile import ARCHITECTURES

    assert load_spec(TINY).engine.gpu_architecture is None
    for architecture in ARCHITECTURES:
        assert load_spec(TINY, [f"engine.gpu_architecture={architecture}"]).engine.gpu_architecture == architecture
    with pytest.raises(SpecError, match="sm_90a"):
        load_spec(TINY, ["engine.gpu_architecture=sm_70"])
