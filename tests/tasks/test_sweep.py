"""What a sweep asks, keeps and writes. The flow itself runs in tests/flows/test_sweep_flow.py.

Run it: `python -m pytest tests/tasks/test_sweep.py`.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
import yaml

from specs.errors import InputError
from specs.load import load_spec
from tasks.predict.records import Records
from tasks.predict.sweep import Point, best, front, grid, parse_over, patched, search, variant, worth_measuring
from tasks.predict.sweeping import conclude, with_measured, write

ROOT = Path(__file__).resolve().parents[2]
TINY = load_spec(ROOT / "specs/tiny-llama4-cpu.yaml")
B200 = load_spec(ROOT / "specs/llama4-maverick-b200.yaml")


def point(name: int, user: float, server: float) -> Point:
    return Point((("engine.draft_tokens", name),), user, server)


@pytest.mark.parametrize(
    ("text", "values"),
    [("a.b=1..3", [1, 2, 3]), ("a.b=8..32..8", [8, 16, 24, 32]), ("a.b=1,4,x", [1, 4, "x"]), ("a.b=true", [True])],
)
def test_values_of_an_axis(text: str, values: list[object]) -> None:
    assert parse_over(text) == ("a.b", values)


@pytest.mark.parametrize("text", ["engine.draft_tokens", "=1..3", "a.b="])
def test_an_axis_without_values_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="names no values"):
        parse_over(text)


def test_a_backward_range_names_the_right_one() -> None:
    with pytest.raises(InputError, match="write a.b=1..7"):
        parse_over("a.b=7..1")


def test_a_key_the_spec_does_not_have_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean engine.draft_tokens?"):
        search(TINY, grid(["engine.draft_tokenz=1..3"]), Records())


def test_points_that_cannot_run_stay_in_the_table_with_their_reason() -> None:
    found = search(TINY, grid(["engine.draft_tokens=1,16"]), Records())
    assert not found[0].refused and "less than or equal to 15" in found[1].refused
    dgx = search(B200, grid(["engine.draft_tokens=7,8"]), Records())
    assert not dgx[0].refused and "use draft_tokens: 7" in dgx[1].refused


def test_five_hundred_points_in_five_seconds() -> None:
    points = grid(["engine.draft_tokens=0..7", "engine.max_batch_size=1..64"])
    started = time.process_time()
    found = search(TINY, points, Records())
    assert len(found) == 512 and time.process_time() - started < 5


def test_more_than_two_dimensions_are_searched_for_both_speeds() -> None:
    axes = ["engine.draft_tokens=0..7", "engine.max_batch_size=1..32", "engine.max_seq_len=256..2048..256"]
    found = search(TINY, grid(axes), Records(), trials=120)
    whole = search(TINY, grid(axes[:2]), Records())
    assert len(found) <= 120
    assert best(found, "user").tps_user > 0.95 * best(whole, "user").tps_user


def test_the_front_is_what_no_other_point_beats() -> None:
    points = [point(1, 10, 1), point(2, 5, 5), point(3, 4, 4), point(4, 1, 10), point(5, 10, 0.5)]
    assert [p.values[0][1] for p in front(points)] == [1, 2, 4]


def test_measuring_starts_at_the_front_and_takes_its_ends() -> None:
    points = [point(i, 10 - i, i) for i in range(9)] + [point(20, 0.1, 0.1)]
    chosen = [p.values[0][1] for p in worth_measuring(points, 3)]
    assert chosen == [0, 4, 8] and len(worth_measuring(points, 99)) == 10


def test_measurement_decides_against_the_predictor() -> None:
    predicted = [point(1, 10, 1), point(2, 9, 1)]
    results = [{"tps_user": 3.0, "tps_server": 3.0, "users": 1.0, "acceptance": 2.0, "cycle_us": 5.0},
               {"tps_user": 8.0, "tps_server": 2.0, "users": 1.0, "acceptance": 2.0, "cycle_us": 5.0}]  # fmt: skip
    found = conclude(predicted, with_measured(predicted, results), "user")
    assert found.best.values == predicted[1].values and found.best.measured


def test_a_value_no_point_may_have_is_one_error() -> None:
    with pytest.raises(InputError, match="less than or equal to 15"):
        best(search(TINY, grid(["engine.draft_tokens=16,17"]), Records()), "user")


@pytest.mark.parametrize(
    ("before", "key", "value", "after"),
    [
        ("engine:\n  draft_tokens: 3 # why\n", "engine.draft_tokens", 5, "engine:\n  draft_tokens: 5 # why\n"),
        ("engine: {draft_tokens: 3, a: 1}\n", "engine.draft_tokens", 5, "engine: {draft_tokens: 5, a: 1}\n"),
        ("engine: {a: 1}\n", "engine.draft_tokens", 5, "engine: {draft_tokens: 5, a: 1}\n"),
        ("engine:\n  a: 1\nb: 2\n", "engine.draft_tokens", 5, "engine:\n  draft_tokens: 5\n  a: 1\nb: 2\n"),
        ("b: 2\n", "engine.draft_tokens", 5, "engine:\n  draft_tokens: 5\nb: 2\n"),
        ("draft:\n  training:\n    epochs: 1\n", "draft.training.epochs", 2, "draft:\n  training:\n    epochs: 2\n"),
    ],
)
def test_a_patch_keeps_the_rest_of_the_file(before: str, key: str, value: int, after: str) -> None:
    assert patched(before, {key: value}) == after


def test_the_patch_applies_and_gives_the_best_spec(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "specs").mkdir(parents=True)
    (tree / "pyproject.toml").touch()
    copy = tree / "specs/tiny.yaml"
    copy.write_text((ROOT / "specs/tiny-llama4-cpu.yaml").read_text())
    found = conclude([point(5, 10, 1)], [], "user")
    written = write(tmp_path / "out", load_spec(copy), found, [])
    subprocess.run(["git", "apply", written["patch"]], cwd=tree, check=True)
    assert load_spec(copy).engine.draft_tokens == 5


def test_points_of_a_trtllm_spec_are_specs_that_load(tmp_path: Path) -> None:
    points = search(B200, grid(["engine.draft_tokens=2,3"]), Records())
    write(tmp_path, B200, conclude(points, [], "user"), points)
    specs = sorted(tmp_path.glob("*.yaml"))
    assert [load_spec(path).engine.draft_tokens for path in specs] == [2, 3]
    assert all(yaml.safe_load(path.with_suffix(".rendered.json").read_text())["argv"] for path in specs)


def test_points_whose_names_are_cut_alike_are_two_specs(tmp_path: Path) -> None:
    keys = ("engine.draft_tokens=3", "engine.max_batch_size=64", "engine.tensor_parallel=4,8")
    points = search(B200, grid(keys), Records())
    write(tmp_path, B200, conclude(points, [], "user"), points)
    specs = [load_spec(path) for path in tmp_path.glob("*.yaml")]
    assert sorted(spec.engine.tensor_parallel for spec in specs) == [4, 8]
    assert all(len(spec.name) <= 63 for spec in specs)


def test_the_page_shows_both_record_marks_and_every_point(tmp_path: Path) -> None:
    refused = [Point((("engine.draft_tokens", n),), refused="too long [spec]: use 7") for n in (8, 9)]
    points = [point(1, 10, 1), point(2, 5, 5), point(3, 4, 4), *refused]
    write(tmp_path, TINY, conclude(points, [], "user"), [])
    page = (tmp_path / "pareto.html").read_text()
    assert "1,038" in page and "72,000" in page and "http" not in page.replace("http-equiv", "")
    assert 'name="viewport"' in page and "3. draft_tokens=3" in page and page.count("too long") == 1
    assert "draft_tokens=8 and 1 more: too long" in conclude(points, [], "user").to_text({})


def test_a_variant_is_a_checked_spec() -> None:
    assert variant(TINY, point(6, 0, 0)).engine.draft_tokens == 6
