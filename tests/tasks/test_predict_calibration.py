"""Whether the intervals hold what they say, on rows that did not make them; and what a build teaches the next one.

Run it: `python -m pytest tests/tasks/test_predict_calibration.py`.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from specs.load import load_spec
from tasks.edges import machine
from tasks.predict.calibrate import CYCLE, THROUGHPUT, Measured, calibrate, native, published
from tasks.predict.forecast import forecast
from tasks.predict.prediction import predict
from tasks.predict.records import KEEP, NAME, Records, learn
from tasks.predict.tables import DOCUMENT, coverage, render
from tasks.store import LocalStore

ROOT = Path(__file__).resolve().parents[2]
TINY = load_spec(ROOT / "specs/tiny-llama4-cpu.yaml")


@pytest.mark.parametrize(("quantity", "at_least"), [(CYCLE, 10), (THROUGHPUT, 12)])
def test_published_rows_lie_inside_the_interval_made_without_them(quantity: str, at_least: int) -> None:
    inside, checked = coverage(published(), quantity)
    assert checked >= at_least and inside >= 0.8 * checked


def test_the_record_is_not_counted_as_a_check() -> None:
    assert [row.name for row in published() if not row.check] == ["record-1038"]


def test_the_tables_of_the_document_are_what_the_data_says() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == render(DOCUMENT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("shape", ["tiny-llama4", "300M"])
def test_native_cycles_of_a_shape_that_was_held_out(shape: str) -> None:
    found = calibrate([row for row in native() if row.check], "native", CYCLE)
    errors = [abs(found.factor * row.modelled / row.measured - 1) for row in native() if row.system == shape]
    assert len(errors) == 6 and max(errors) < 0.15


def rows(**systems: list[float]) -> list[Measured]:
    """Rows of one stack by system, given as measured over modelled."""
    return [Measured(f"{s}{i}", CYCLE, "s", s, ratio, 1.0) for s, r in systems.items() for i, ratio in enumerate(r)]


def test_a_table_of_many_rows_counts_as_one_system() -> None:
    assert calibrate(rows(a=[2.0] * 30, b=[1.0], c=[1.0]), "s", CYCLE).factor == pytest.approx(1.0)


def test_the_interval_grows_with_the_misses() -> None:
    near = calibrate(rows(a=[1.0], b=[1.1], c=[0.9], d=[1.0], e=[1.05]), "s", CYCLE)
    far = calibrate(rows(a=[1.0], b=[3.0], c=[0.4], d=[1.0], e=[2.0]), "s", CYCLE)
    assert near.high / near.low < 1.5 < 4 < far.high / far.low


def test_a_stack_with_one_system_borrows_its_width() -> None:
    other = [Measured(str(i), CYCLE, "other", str(i), ratio, 1.0) for i, ratio in enumerate((1, 2, 4, 1, 2))]
    found = calibrate([*rows(a=[1.0]), *other], "s", CYCLE)
    assert found.borrowed and found.factor == pytest.approx(1.0) and found.high / found.low > 2


def test_a_system_measured_before_is_predicted_from_itself() -> None:
    known = rows(a=[2.0, 2.1, 1.9, 2.0, 2.02], b=[1.0], c=[1.0], d=[1.2], e=[0.9])
    found = calibrate(known, "s", CYCLE, own="a")
    assert found.factor == pytest.approx(2.0) and found.high / found.low < 1.2 and "5 of its own builds" in found.words


def test_nothing_measured_is_said_to_be_wide() -> None:
    found = calibrate([], "s", CYCLE)
    assert found.factor == 1 and math.isclose(found.high, 3.0) and found.systems == 0


# -- what a build teaches ----------------------------------------------------------------------------------------------
def record(build: str, cycle_us: float, quantize_s: float) -> dict[str, object]:
    stages = [{"stage": "quantize", "state": "built", "seconds": quantize_s},
              {"stage": "validate", "state": "built", "seconds": 5.0}]  # fmt: skip
    return {"build": build, "spec": TINY.name, "stages": stages, "metrics": {"cycle.us": cycle_us}}


def test_a_build_moves_the_next_forecast(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    before = forecast(TINY, store)
    for number in range(3):
        learn(store, record(f"b{number}", 3 * before["modelled"]["cycle"], 123.0), before)
    after = forecast(TINY, store)
    assert after["stages"]["quantize"]["predicted"] == pytest.approx(123.0, rel=0.01)
    assert after["metrics"]["cycle.us"]["predicted"] == pytest.approx(3 * before["modelled"]["cycle"], rel=0.01)


def test_a_cached_validation_teaches_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    said = forecast(TINY, store)
    build = {**record("b", 100.0, 1.0), "stages": [{"stage": "validate", "state": "cached", "seconds": 0.1}]}
    assert learn(store, build, said) == [] and store.read_json(NAME) is None


def test_only_the_newest_rows_are_kept(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write_json(NAME, [{"model": "0-older"}] * KEEP)
    learn(store, record("b", 100.0, 1.0), forecast(TINY, store))
    assert len(store.read_json(NAME)) == KEEP


def test_rows_of_another_cpu_are_not_used(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    learn(store, record("b", 100.0, 1.0), forecast(TINY, store))
    own = Records.read(store, TINY.name)
    foreign = [{**row, "machine": "another"} for row in store.read_json(NAME)]
    assert own.rows(predict(TINY).case.gpu) != Records(tuple(foreign)).rows(predict(TINY).case.gpu)
    assert machine.cpu() in {row["machine"] for row in own.learned}


def test_a_forecast_has_what_the_report_reads(tmp_path: Path) -> None:
    said = forecast(TINY, LocalStore(tmp_path))
    assert set(said["metrics"]["cycle.us"]) == {"predicted", "low", "high"}
    assert set(said["stages"]) >= {"download", "quantize", "train_draft", "validate"}


def test_what_is_not_known_yet_stops_nothing(tmp_path: Path) -> None:
    spec = load_spec(ROOT / "specs/llama4-maverick-b200.yaml", ["model.source=hf://someone/unheard-of"])
    assert "not known before its download" in forecast(spec, LocalStore(tmp_path))["unknown"]
