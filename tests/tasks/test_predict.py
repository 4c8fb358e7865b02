"""The predictor against the reference roofline for Maverick, and what it refuses with the nearest right value.

Run it: `python -m pytest tests/tasks/test_predict.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine_plugins.trtllm.kernels import record_kernels
from specs.errors import InputError
from specs.load import load_spec
from tasks.predict import levers
from tasks.predict.acceptance import at, expect
from tasks.predict.cost import Setting, cycle, memory_gib_per_gpu
from tasks.predict.hardware import known, load, parse
from tasks.predict.limits import check_engine
from tasks.predict.prediction import KERNELS, Prediction, predict, targets
from tasks.predict.shape import DraftShape, known_models, known_shape, shape_from_config

ROOT = Path(__file__).resolve().parents[2]
MAVERICK = known_shape("meta-llama/Llama-4-Maverick-17B-128E-Instruct")
DRAFT = DraftShape(ffn=32768, vocab=202048)
# [hardware, tensor parallel, drafts, context, hbm us, hbm + all-reduce us] of every row of the reference roofline.
ROOFLINE = json.loads(Path(__file__).with_name("roofline.json").read_text())
B200 = "specs/llama4-maverick-b200.yaml"


def foretell(spec: str = B200, *overrides: str) -> Prediction:
    return predict(load_spec(ROOT / spec, overrides))


@pytest.mark.parametrize(
    ("model", "total", "active"),
    [
        ("meta-llama/Llama-4-Maverick-17B-128E-Instruct", 400.7e9, 16.15e9),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", 107.8e9, 16.14e9),
        ("meta-llama/Llama-3.1-8B-Instruct", 8.03e9, 7.50e9),
        ("meta-llama/Llama-3.1-405B-Instruct", 405.8e9, 403.7e9),
        ("deepseek-ai/DeepSeek-R1", 671.0e9, 36.6e9),
    ],
)
def test_known_models_have_their_parameters(model: str, total: float, active: float) -> None:
    assert known_shape(model).total_params == pytest.approx(total, rel=2e-3)
    assert known_shape(model).active_params == pytest.approx(active, rel=2e-3)


def test_every_row_of_the_reference_roofline_within_one_percent() -> None:
    worst = 0.0
    for hardware, tp, k, context, hbm_us, hbm_ar_us in ROOFLINE:
        found = cycle(load(hardware), MAVERICK, DRAFT, Setting(tensor_parallel=tp, draft_tokens=k, context=context))
        worst = max(worst, abs(found.hbm_us / hbm_us - 1), abs(found.hbm_ar_us / hbm_ar_us - 1))
    assert len(ROOFLINE) == 144 and worst < 0.01


@pytest.mark.parametrize(("hardware", "k", "kernels_us"), [("b200", 3, 2401), ("b200", 0, 1915), ("h200", 3, 3033)])
def test_kernels_level_is_the_roofline_kernel_per_operator(hardware: str, k: int, kernels_us: float) -> None:
    found = cycle(load(hardware), MAVERICK, DRAFT, Setting(tensor_parallel=8, draft_tokens=k))
    assert found.kernels_us == pytest.approx(kernels_us, rel=0.015)  # ours adds the wire time of each message


def test_expert_parallelism_waits_for_the_busiest_gpu() -> None:
    cycles = [cycle(load("b200"), MAVERICK, DRAFT, Setting(tensor_parallel=8, expert_parallel=ep)) for ep in (1, 8)]
    together, apart = (next(row.bytes for row in c.operators if row.name == "routed_experts") for c in cycles)
    assert 2 < apart / together < 4  # whole experts, and with four tokens some GPU has one or two


def test_a_parallel_drafter_pays_one_pass() -> None:
    chain, one = (Setting(tensor_parallel=8, draft_tokens=15, parallel_draft=parallel) for parallel in (False, True))
    assert cycle(load("b200"), MAVERICK, DRAFT, chain).allreduces - 3 * 14 == (
        cycle(load("b200"), MAVERICK, DRAFT, one).allreduces
    )


@pytest.mark.parametrize("plugin", sorted(KERNELS))
def test_every_plugin_costs_when_it_is_not_fused(plugin: str) -> None:
    with_it = cycle(load("b200"), MAVERICK, DRAFT, Setting(tensor_parallel=8))
    without = cycle(load("b200"), MAVERICK, DRAFT, Setting(tensor_parallel=8, fused=with_it.setting.fused - {plugin}))
    assert without.kernels_us > with_it.kernels_us


def test_plugin_names_still_match_the_kernels_of_the_record() -> None:
    names = [kernel.name for kernel in record_kernels(load_spec(ROOT / B200))]
    assert [plugin for plugin, starts in KERNELS.items() if not any(n.startswith(starts) for n in names)] == []


def test_precisions_order_the_bytes() -> None:
    bytes_ = [
        cycle(load("b200"), MAVERICK, None, Setting(tensor_parallel=8, weight_bytes=w)).bytes for w in (0.5625, 1, 2)
    ]
    assert bytes_ == sorted(bytes_)


def test_maverick_fits_eight_b200_and_not_four_h100() -> None:
    eight, four = (
        memory_gib_per_gpu(MAVERICK, DRAFT, Setting(tensor_parallel=tp), max_seq_len=8192)["total"] for tp in (8, 4)
    )
    assert eight < load("b200").memory_gib and four > load("h100").memory_gib


# -- a spec ------------------------------------------------------------------------------------------------------------
def test_the_json_has_what_scripts_rely_on() -> None:
    found = foretell().to_dict()
    assert {"hbm", "hbm_ar", "expected", "low", "high"} <= set(found["cycle_us"])
    assert found["cycle_us"]["hbm"] < found["cycle_us"]["hbm_ar"] <= found["cycle_us"]["low"]
    assert found["tps_per_user"]["low"] < found["tps_per_user"]["expected"] < found["tps_per_user"]["high"]
    assert found["tps_per_server"]["users"] == 8 and "MT-Bench" in found["acceptance"]["source"]
    assert {"qkv", "routed_experts", "draft_mlp", "allreduce"} <= {row["operator"] for row in found["operators"]}
    assert sum(row["share"] for row in found["operators"]) == pytest.approx(1, abs=0.01)


def test_the_verdict_of_physics() -> None:
    assert "needs a cycle of 2.53 ms" in targets(load_spec(ROOT / B200), foretell())[0]
    absurd = load_spec(ROOT / B200, ["validate.gates=[{metric: latency.tps_per_user.p50, at_least: 9000}]"])
    assert "below the floor: impossible" in targets(absurd, foretell())[0]


def test_levers_are_worth_what_the_reference_says() -> None:
    gains = {lever.name: lever.gain for lever in levers.levers(foretell().case)}
    expected = {"all-reduce 8.7 -> 5 us": 0.20, "NVFP4 weights (0.5625 bytes)": 0.08, "32k draft vocabulary": 0.038,
                "all tokens of a pass on one expert": 0.07, "all-reduce not fused with RMSNorm": -0.175}  # fmt: skip
    assert {name: gains[name] for name in expected} == pytest.approx(expected, abs=0.012)


def test_explain_covers_draft_lengths_zero_to_fifteen() -> None:
    rows = levers.draft_lengths(foretell(), "hf://meta-llama/Llama-4-Maverick-17B-128E-Instruct")
    assert [row["draft_tokens"] for row in rows] == list(range(16))


def test_a_routing_trace_replaces_the_assumption(tmp_path: Path) -> None:
    trace = tmp_path / "routing.json"
    trace.write_text(json.dumps({"experts": [[7] * 10, [7] * 10]}))
    spec = load_spec(ROOT / B200)
    same = predict(spec, routing=trace)
    assert same.case.setting.distinct_experts == 1 and same.case.cycle.bytes < foretell().case.cycle.bytes
    trace.write_text("{}")
    with pytest.raises(InputError, match="no routing trace of at least 4 tokens"):
        predict(spec, routing=trace)


def test_acceptance_of_the_last_build_wins() -> None:
    metrics = {"acceptance.length": 2.5, "acceptance.position.1": 0.9, "acceptance.position.2": 0.6,
               "acceptance.length.code": 3.0, "acceptance.length.math": 2.0}  # fmt: skip
    found = expect("file:x", 2, metrics, "b1")
    assert found.length == pytest.approx(1 + 0.9 + 0.54) and "b1" in found.source
    assert found.low < found.length < found.high


def test_acceptance_beyond_what_was_measured_gains_ever_less() -> None:
    lengths = [at((1.7, 2.2, 2.5), k) for k in range(16)]
    steps = [b - a for a, b in zip(lengths, lengths[1:], strict=False)]
    assert steps == sorted(steps, reverse=True) and steps[-1] > 0


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["hardware=B2000"], "unknown hardware 'B2000'.*nearest: b200"),
        (["engine.tensor_parallel=6"], "does not divide 40 query heads.*use tensor_parallel: 8"),
        (["engine.tensor_parallel=16"], "tensor_parallel 16 on 8 x DGX B200.*use tensor_parallel: 8"),
        (["hardware=h100", "engine.tensor_parallel=4"], "GiB per GPU are needed.*use tensor_parallel: 8"),
        (["engine.max_seq_len=40000000"], "GiB per GPU are needed.*use max_seq_len: "),
        (["engine.draft_tokens=16"], "less than or equal to 15.*use draft_tokens: 15"),
        (["engine.expert_parallel=3"], "does not divide tensor_parallel 8.*use expert_parallel: 2"),
    ],
)
def test_what_cannot_run_names_the_nearest_that_can(overrides: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        foretell(B200, *overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["engine.draft_tokens=9"], "steps of 10 tokens; .* takes at most 8.*use draft_tokens: 7"),
        (["engine.draft_tokens=9", "engine.plugins=[]"], "enable_min_latency takes at most 8"),
        (["engine.draft_tokens=9", "engine.options={}"], "the plugin .* takes at most 8"),
        (["validate.latency.forced_acceptance=2.5"], "trtllm forces whole numbers from 2.*use forced_acceptance: 2"),
        (["engine.parallel_draft=true"], "no engine here serves a parallel drafter.*use parallel_draft: false"),
    ],
)
def test_drafts_beyond_the_engine_are_predicted_and_not_built(overrides: list[str], words: str) -> None:
    assert foretell(B200, *overrides).case.tps_per_user.expected > 0
    with pytest.raises(InputError, match=words):
        check_engine(load_spec(ROOT / B200, overrides))


def test_a_parallel_drafter_is_a_setting_of_the_spec() -> None:
    chain, one = (
        foretell(B200, "engine.draft_tokens=15", f"engine.parallel_draft={word}") for word in ("false", "true")
    )
    rows = {row["draft_tokens"]: row for row in levers.draft_lengths(chain, "hf://meta-llama/Llama-4-Maverick")}
    said = [found.to_dict()["cycle_us"]["expected"] for found in (chain, one)]
    assert said == pytest.approx([rows[15]["chain_us"], rows[15]["parallel_us"]], abs=0.2)
    assert said[1] < said[0] and "acceptance is taken" in " ".join(one.notes)


def test_expert_parallelism_that_does_not_divide_the_experts() -> None:
    with pytest.raises(InputError, match="does not divide 16 experts.*use expert_parallel: 2"):
        overrides = [
            "engine.tensor_parallel=6",
            "engine.expert_parallel=3",
            "engine.options={enable_attention_dp: true}",
        ]
        foretell("specs/llama4-scout-h200.yaml", *overrides)


def test_a_model_nobody_knows_names_the_nearest() -> None:
    with pytest.raises(InputError, match="nearest known: meta-llama/Llama-3.1-70B-Instruct"):
        known_shape("meta-llama/Llama-3.1-7B-Instruct")


@pytest.mark.parametrize("name", known())
def test_every_hardware_file_is_complete(name: str) -> None:
    assert load(name).bytes_per_us > 0


def constants(**changes: Any) -> dict[str, Any]:
    from tasks.predict.hardware import CONSTANTS

    return {"name": "x", "devices": 1, **{c: {"value": 1.0, "source": "s"} for c in CONSTANTS}, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hbm_tbs": {"value": -3.35, "source": "s"}}, "hbm_tbs is -3.35.*did you mean 3.35"),
        ({"hbm_tbs": {"value": 0, "source": "s"}}, "hbm_tbs is 0.*above 0"),
        ({"hbm_tbs": {"value": "fast", "source": "s"}}, "hbm_tbs is 'fast'.*give a number"),
        ({"hbm_tbs": {"value": 3.35}}, "hbm_tbs has no source.*value: 3.35"),
        ({"hbm_tb": {"value": 1, "source": "s"}}, "unknown constant 'hbm_tb'.*did you mean hbm_tbs"),
        ({"price_per_device_hour": {"value": 2.5, "source": "s"}}, "no currency.*value: 2.5, currency: USD"),
    ],
)
def test_a_wrong_constant_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse(constants(**changes), Path("x.yaml"))


def test_a_config_of_another_family_is_refused() -> None:
    with pytest.raises(InputError, match="not a Llama-shaped model"):
        shape_from_config({"model_type": "mamba", "hidden_size": 8})


def test_configs_of_known_models_read() -> None:
    assert all(known_shape(name).layers > 0 for name in known_models())
