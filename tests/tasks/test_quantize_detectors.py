"""Every detector of the quantize stage fires on the fault it is for, names the tensor, and is quiet without it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specs.errors import InputError, IntegrityError
from tasks.quantize import coverage, detectors
from tasks.quantize.detectors import TensorRow

CONFIG = {
    "architectures": ["Llama4ForCausalLM"],
    "num_hidden_layers": 2,
    "interleave_moe_layer_step": 2,
    "model_type": "llama4_text",
}
FP8 = [
    {"quantizer_name": "*", "enable": False},
    {"quantizer_name": "*weight_quantizer"},
    {"quantizer_name": "*input_quantizer"},
    {"quantizer_name": "*[kv]_bmm_quantizer"},
    {"quantizer_name": "*lm_head*", "enable": False},
    {"quantizer_name": "*router*", "enable": False},
]
ROW = TensorRow("model.layers.0.self_attn.q_proj.weight", "weight", 0.01, 4.48, 31.0, 0.0)


@pytest.fixture
def wanted() -> coverage.Coverage:
    return coverage.expected(CONFIG, FP8)


def names_tensor(error: pytest.ExceptionInfo[IntegrityError], name: str) -> None:
    assert name in error.value.where


def test_sound_tables_pass(wanted: coverage.Coverage) -> None:
    detectors.check_expert_tokens({"router": [3, 1]})
    detectors.check_scales([ROW])
    detectors.check_saturation([ROW])
    detectors.check_quantizers([f"q{i}" for i in range(wanted.num_quantizers)], wanted)
    detectors.check_excluded(wanted.weights, wanted)
    detectors.check_finite([], "export")
    detectors.check_reload({"layers.0": [1e-7, 2e-3, 1e-7]}, [1e-6], "out")


def test_an_expert_without_tokens() -> None:
    with pytest.raises(IntegrityError, match=r"experts \[1, 3\]") as error:
        detectors.check_expert_tokens({"model.layers.1.feed_forward.router": [9, 0, 4, 0]})
    names_tensor(error, "layers.1.feed_forward.router")


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf"), 1e-40, -0.1])
def test_a_bad_scale(scale: float) -> None:
    with pytest.raises(IntegrityError, match="scale") as error:
        detectors.check_scales([ROW, replace(ROW, name="bad", scale=scale)])
    names_tensor(error, "bad")


@pytest.mark.parametrize("share", [0.011, 1.0, float("nan")])
def test_saturation_above_the_limit(share: float) -> None:
    with pytest.raises(IntegrityError, match="saturates") as error:
        detectors.check_saturation([replace(ROW, name="clipped", saturation_share=share)])
    names_tensor(error, "clipped")


def test_a_quantizer_too_few(wanted: coverage.Coverage) -> None:
    with pytest.raises(IntegrityError, match=f"{wanted.num_quantizers} expected"):
        detectors.check_quantizers([f"q{i}" for i in range(wanted.num_quantizers - 1)], wanted)


@pytest.mark.parametrize("name", ["model.layers.1.feed_forward.router.weight", "lm_head.weight", "model.norm.weight",
                                  "vision_model.layers.0.fc1.weight", "model.embed_tokens.weight"])  # fmt: skip
def test_what_must_stay_bf16(wanted: coverage.Coverage, name: str) -> None:
    with pytest.raises(IntegrityError, match="must stay in BF16") as error:
        detectors.check_excluded({*wanted.weights, name}, wanted)
    names_tensor(error, name)


def test_something_left_out(wanted: coverage.Coverage) -> None:
    gone = "model.layers.1.feed_forward.experts.down_proj"
    with pytest.raises(IntegrityError, match="should be quantized") as error:
        detectors.check_excluded(wanted.weights - {gone}, wanted)
    names_tensor(error, gone)


def test_a_missing_kv_scale(wanted: coverage.Coverage) -> None:
    exported = {f"{a}.{p}_proj.{p}_scale" for a in wanted.kv for p in "kv"} - {
        "model.layers.1.self_attn.v_proj.v_scale"
    }
    with pytest.raises(IntegrityError, match="KV-cache scale") as error:
        detectors.check_kv_scales(exported, wanted)
    names_tensor(error, "model.layers.1.self_attn.v_proj.v_scale")


def test_a_missing_input_scale(wanted: coverage.Coverage) -> None:
    exported = {detectors.scale_name(w, "input") for w in wanted.inputs} - {
        "model.layers.1.feed_forward.experts.gate_up_proj_input_scale"
    }
    with pytest.raises(IntegrityError) as error:
        detectors.check_input_scales(exported, wanted)
    names_tensor(error, "experts.gate_up_proj_input_scale")


def test_unshared_scales_of_a_fused_group(wanted: coverage.Coverage) -> None:
    groups = coverage.fused_groups(sorted(wanted.weights))
    scales = {detectors.scale_name(w, "weight"): 0.5 for group in groups for w in group}
    detectors.check_shared_scales(scales, groups)
    scales["model.layers.0.self_attn.k_proj.weight_scale"] = 0.25
    with pytest.raises(IntegrityError, match="differ") as error:
        detectors.check_shared_scales(scales, groups)
    names_tensor(error, "layers.0.self_attn")


def test_a_nan_weight_is_named() -> None:
    with pytest.raises(IntegrityError, match="NaN") as error:
        detectors.check_finite(["model.layers.0.self_attn.o_proj.weight"], "source checkpoint")
    names_tensor(error, "o_proj")


def test_a_layer_that_reloads_differently() -> None:
    with pytest.raises(IntegrityError, match="layer differs") as error:
        detectors.check_reload({"layers.0": [0.0] * 3, "layers.1": [0.2] * 3}, [0.0], "out")
    names_tensor(error, "layers.1")


def test_logits_that_reload_differently() -> None:
    with pytest.raises(IntegrityError, match="logits"):
        detectors.check_reload({"layers.0": [0.0]}, [0.5], "out")


def test_coverage_counts_dense_and_moe_layers(wanted: coverage.Coverage) -> None:
    assert len(wanted.weights) == 2 * 4 + 3 + 3 + 2  # attention, dense MLP, shared expert, packed experts
    assert wanted.num_quantizers == 2 * 16 + 4
    assert not any("router" in name for name in wanted.weights)


def test_coverage_follows_a_partial_recipe() -> None:
    partial = coverage.expected(CONFIG, [{"quantizer_name": "*", "enable": False}, {"quantizer_name": "*experts*"}])
    assert partial.weights == {f"model.layers.1.feed_forward.experts.{p}_proj" for p in ("gate_up", "down")}
    assert not partial.kv


def test_dense_llama_names() -> None:
    dense = coverage.expected({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}, FP8)
    assert "model.layers.0.mlp.gate_proj.weight" in dense.weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"quantization_config": {"quant_algo": "FP8"}}, "already quantized"),
    ],
)
def test_refused_configs(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        coverage.expected({**CONFIG, **change}, FP8)
