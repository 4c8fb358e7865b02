"""Loading: what a user gets wrong is answered with file, line, column, key, value, rule and fix."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from specs.errors import SpecError
from specs.load import load_spec

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "specs" / "tiny-llama4-cpu.yaml"
BASE = """kilotok: 1
name: base
model: {source: file:ckpt}
quantize:
  calibration: {dataset: file:p.jsonl}
draft:
  data: {prompts: file:p.jsonl}
validate:
  accuracy: {tasks: [code], problems: file:p.jsonl}
  gates:
    - {metric: acceptance.length, at_least: 2}
"""


def write(folder: Path, text: str, name: str = "base.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def refused(path: Path, *overrides: str) -> SpecError:
    with pytest.raises(SpecError) as error:
        load_spec(path, overrides)
    return error.value


@pytest.mark.parametrize("path", sorted((ROOT / "specs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_spec_loads_under_its_own_name(path: Path) -> None:
    assert load_spec(path).name == path.stem


def test_typo_is_placed_and_answered(tmp_path: Path) -> None:
    error = refused(write(tmp_path, BASE + "engine:\n  draft_token: 3\n"))
    assert (error.line, error.column, error.key, error.value) == (13, 3, "engine.draft_token", "3")
    assert error.fix == "did you mean 'draft_tokens'?" and error.exit_code == 2


def test_key_in_the_wrong_section_is_sent_home(tmp_path: Path) -> None:
    assert refused(write(tmp_path, BASE + "draft_tokens: 3\n")).fix == "draft_tokens belongs at engine.draft_tokens"


def test_missing_key_is_named(tmp_path: Path) -> None:
    error = refused(write(tmp_path, BASE.replace("model: {source: file:ckpt}", "model: {}")))
    assert error.what == "model.source is missing" and error.line == 3


def test_wrong_type_says_which_is_wanted() -> None:
    error = refused(TINY, "draft.training.epochs=three")
    assert error.rule == "must be a whole number" and "--set draft.training.epochs=three" in str(error)


def test_unquoted_version_is_explained() -> None:
    assert refused(TINY, "engine.version=1.2").fix == 'write it in quotes: "1.2"'


def test_all_errors_are_told_at_once(tmp_path: Path) -> None:
    error = refused(write(tmp_path, BASE + "engine:\n  draft_tokens: 99\n  port: 1\n"))
    assert "draft_tokens" in error.what and "also unknown key 'port'" in str(error)


def test_rule_between_fields_points_at_the_field(tmp_path: Path) -> None:
    error = refused(write(tmp_path, BASE + "engine:\n  draft_tokens: 3\n  backend: trtllm\n"))
    assert (error.key, error.line) == ("engine.backend", 14)


@pytest.mark.parametrize("text", ["a: [1", "a: 1\na: 2\n", "<<: {a: 1}\n", "a: &x [*x]\n", "\tb: 1", "- 1\n", ""])
def test_broken_yaml_is_a_spec_error(tmp_path: Path, text: str) -> None:
    assert refused(write(tmp_path, text)).exit_code == 2


def test_exponent_without_a_dot_is_a_number() -> None:
    assert load_spec(TINY, ["draft.training.learning_rate=1e-4"]).draft.training.learning_rate == 1e-4


def test_extends_merges_mappings_and_replaces_lists(tmp_path: Path) -> None:
    write(tmp_path, BASE + "engine: {draft_tokens: 2, max_seq_len: 512}\n")
    top = "extends: base\nname: top\nengine: {draft_tokens: 5}\nvalidate: {gates: []}\n"
    spec = load_spec(write(tmp_path, top, "top.yaml"))
    assert (spec.name, spec.engine.draft_tokens, spec.engine.max_seq_len) == ("top", 5, 512)
    assert spec.validation.gates == () and spec.validation.accuracy.tasks == ("code",)


def test_error_in_the_extended_file_names_that_file(tmp_path: Path) -> None:
    write(tmp_path, BASE + "deploy: {port: 0}\n")
    assert refused(write(tmp_path, "extends: base\nname: top\n", "top.yaml")).file == str(tmp_path / "base.yaml")


def test_circle_of_extends_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "extends: b\nname: a\n", "a.yaml")
    write(tmp_path, "extends: a\nname: b\n", "b.yaml")
    assert "circle: a.yaml -> b.yaml -> a.yaml" in refused(tmp_path / "a.yaml").what


def test_unknown_base_gets_a_suggestion(tmp_path: Path) -> None:
    write(tmp_path, BASE)
    assert refused(write(tmp_path, "extends: bass\nname: top\n", "top.yaml")).fix == "did you mean base.yaml?"


def test_extending_spec_needs_its_own_name(tmp_path: Path) -> None:
    write(tmp_path, BASE)
    assert "own name" in refused(write(tmp_path, "extends: base\n", "top.yaml")).what


def test_literal_secret_is_refused_and_not_repeated() -> None:
    token = "hf_" + "a1" * 15
    error = refused(TINY, f"model.token={token}")
    assert "Hugging Face token" in error.what and token not in str(error)


def test_secret_reference_stays_a_reference() -> None:
    assert load_spec(TINY, ["model.token='${env:HF_TOKEN}'"]).to_dict()["model"]["token"] == "${env:HF_TOKEN}"


@pytest.mark.parametrize("override", ["engine", "=1", "name.x=1", "validate.gates.99.metric=latency.x", "engine..x=1"])
def test_broken_override_is_a_spec_error(override: str) -> None:
    assert "--set" in refused(TINY, override).where


def test_override_reaches_into_lists() -> None:
    assert load_spec(TINY, ["validate.gates.0.at_least=1"]).validation.gates[0].at_least == 1


def test_missing_file_says_so(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.yaml").what == "no such spec"


def test_root_is_where_pyproject_is(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    path = write(tmp_path / "deep" / "er", BASE)
    assert load_spec(path).root == path.parent
    (tmp_path / "pyproject.toml").touch()
    assert load_spec(path).root == tmp_path


def test_round_trip_through_plain_data() -> None:
    spec = load_spec(TINY)
    assert type(spec).model_validate(spec.to_dict()).to_dict() == spec.to_dict()


def test_loading_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'prefect', 'boto3', 'numpy'}"
    code = f"import sys, specs.load, specs.lock; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
