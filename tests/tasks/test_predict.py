"""The predictor against the reference roofline's figures for Maverick, and its refusals.

Run it: `python -m pytest tests/tasks/test_predict.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from specs.errors import InputError
from tasks.predict.cost import Setting, cycle, memory_gib_per_gpu
from tasks.predict.hardware import known, load, parse
from tasks.predict.shape import DraftShape, shape_from_config

MAVERICK = {
    "model_type": "llama4_text", "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
    "interleave_moe_layer_step": 2, "num_local_experts": 128, "num_experts_per_tok": 1, "vocab_size": 202048,
    "attention_chunk_size": 8192,
}  # fmt: skip
DRAFT = DraftShape(ffn=32768, vocab=202048)


def test_maverick_has_400_billion_parameters_of_which_16_are_read() -> None:
    shape = shape_from_config(MAVERICK)
    assert shape.total_params == pytest.approx(400.71e9, rel=1e-4)
    assert shape.active_params == pytest.approx(16.15e9, rel=1e-4)


@pytest.mark.parametrize(
    ("hardware", "tp", "k", "context", "hbm_us", "hbm_ar_us", "kernels_us"),
    [
        ("b200", 8, 3, 1000, 569, 887, 2401),
        ("b200", 8, 3, 100000, 635, 953, 2472),
        ("h200", 8, 3, 1000, 949, 1267, 3033),
    ],
)
def test_cycle_agrees_with_the_reference_roofline_to_one_percent(
    hardware: str, tp: int, k: int, context: int, hbm_us: float, hbm_ar_us: float, kernels_us: float
) -> None:
    setting = Setting(tensor_parallel=tp, draft_tokens=k, context=context)
    found = cycle(load(hardware), shape_from_config(MAVERICK), DRAFT, setting)
    assert found.hbm_us == pytest.approx(hbm_us, rel=0.01)
    assert found.hbm_ar_us == pytest.approx(hbm_ar_us, rel=0.01)
    assert found.kernels_us == pytest.approx(kernels_us, rel=0.01)


def test_without_speculation_it_is_one_plain_step() -> None:
    found = cycle(load("b200"), shape_from_config(MAVERICK), DRAFT, Setting(tensor_parallel=8, draft_tokens=0))
    assert found.kernels_us == pytest.approx(1915, rel=0.01)


def test_maverick_fits_eight_b200_and_not_four_h100() -> None:
    shape = shape_from_config(MAVERICK)
    eight = memory_gib_per_gpu(shape, DRAFT, Setting(tensor_parallel=8), max_seq_len=8192)["total"]
    four = memory_gib_per_gpu(shape, DRAFT, Setting(tensor_parallel=4), max_seq_len=8192)["total"]
    assert eight * 1.0737 < load("b200").memory_gb and four * 1.0737 > load("h100").memory_gb


@pytest.mark.parametrize("name", known())
def test_every_hardware_file_is_complete(name: str) -> None:
    assert load(name).bytes_per_us > 0


def test_unknown_hardware_names_the_nearest() -> None:
    with pytest.raises(InputError, match="nearest: b200"):
        load("b2000")


def test_a_negative_bandwidth_is_refused() -> None:
    with pytest.raises(InputError, match="hbm_tbs is -1"):
        parse({"name": "x", "devices": 1, "hbm_tbs": {"value": -1, "source": "s"}}, Path("x.yaml"))


def test_a_config_of_another_family_is_refused() -> None:
    with pytest.raises(InputError, match="not a Llama-shaped model"):
        shape_from_config({"model_type": "mamba", "hidden_size": 8})
