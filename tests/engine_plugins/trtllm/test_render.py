"""The renderer: recipes come out of our specs, and what a version would refuse stops the plan.

The golden files are what we render. That they hold the published recipes is asserted key by key below them.
After a meant change: `python -m tests.engine_plugins.trtllm.test_render` writes them anew; read the diff.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from engine_plugins.trtllm.contract import argv_complaints, contract_for, lines, load_contract, yaml_complaints
from engine_plugins.trtllm.kernels import record_kernels
from engine_plugins.trtllm.render import Rendered, render
from specs.errors import SpecError
from specs.load import load_spec

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = Path(__file__).parent / "golden"
LATENCY, THROUGHPUT, SCOUT = "llama4-maverick-b200", "llama4-maverick-b200-throughput", "llama4-scout-h200"
VALUES = {"checkpoint": "/m", "draft": "/d", "args": "/a.yaml", "host": "0.0.0.0", "port": "8000"}
VERSIONS = ["1.1.0", "1.2.1", "1.3.0rc22", "1.4.0rc1"]


def spec(name: str, *overrides: str) -> Any:
    return load_spec(ROOT / "specs" / f"{name}.yaml", overrides)


def refused(*overrides: str, name: str = LATENCY, version: str | None = None) -> SpecError:
    with pytest.raises(SpecError) as error:
        render(spec(name, *overrides), version)
    return error.value


def as_text(rendered: Rendered) -> str:
    return yaml.safe_dump(rendered.to_dict(), sort_keys=False, width=120)


@pytest.mark.parametrize("name", [LATENCY, THROUGHPUT, SCOUT])
@pytest.mark.parametrize("version", VERSIONS)
def test_golden(name: str, version: str) -> None:
    assert as_text(render(spec(name), version)) == (GOLDEN / f"{name}_{version}.yaml").read_text()


def test_tech_blog_6_is_in_the_latency_spec() -> None:
    made = render(spec(LATENCY))
    draft = made.args_yaml.pop("speculative_config")
    assert made.args_yaml == {
        "enable_autotuner": False,
        "enable_attention_dp": False,
        "enable_min_latency": True,
        "cuda_graph_config": {"max_batch_size": 8},
        "kv_cache_config": {"enable_block_reuse": False},
    }
    assert draft["decoding_type"] == "Eagle3" and draft["max_draft_len"] == 3 and "speculative_model_dir" in draft
    line = " ".join(made.argv)
    for flag in ("--tp_size 8", "--ep_size 1", "--trust_remote_code", "--kv_cache_free_gpu_memory_fraction 0.75"):
        assert flag in line
    assert made.env == {"TRTLLM_ENABLE_PDL": "1", "TRT_LLM_DISABLE_LOAD_WEIGHTS_IN_PARALLEL": "True"}


def test_max_throughput_recipe_is_in_the_throughput_spec() -> None:
    made = render(spec(THROUGHPUT))
    wanted = {"enable_attention_dp": True, "stream_interval": 2}
    assert wanted.items() <= made.args_yaml.items() and "speculative_config" not in made.args_yaml
    assert made.args_yaml["cuda_graph_config"] == {"max_batch_size": 512, "enable_padding": True}
    for flag in ("--max_batch_size 512", "--ep_size 8", "--num_postprocess_workers 2"):
        assert flag in " ".join(made.argv)


def test_scout_guide_is_in_the_scout_spec() -> None:
    made = render(spec(SCOUT)).args_yaml
    assert made["enable_attention_dp"] is False and made["kv_cache_config"] == {"dtype": "fp8"}
    assert made["cuda_graph_config"]["enable_padding"] is True


def test_old_version_gets_old_spellings() -> None:
    made = render(spec(LATENCY), "1.1.0")
    assert made.args_yaml["speculative_config"]["decoding_type"] == "Eagle"
    assert made.args_yaml["speculative_config"]["eagle3_one_model"] is True
    assert "--extra_llm_api_options" in made.argv


def test_unknown_option_names_the_version_that_knows_it() -> None:
    error = refused("engine.options.sampler_type=auto", version="1.1.0")
    assert "1.1.0 does not know sampler_type" in error.what and "1.2" in error.fix


def test_renamed_option_gets_its_new_name() -> None:
    assert refused("engine.options.use_cuda_graph=true").fix == "write cuda_graph_config"


def test_typo_is_answered() -> None:
    assert refused("engine.options.enable_min_latancy=true").fix == "did you mean enable_min_latency?"


def test_refusal_says_where_in_the_spec() -> None:
    path = ROOT / "specs" / f"{THROUGHPUT}.yaml"
    error = refused("engine.options.enable_min_latency=true", name=THROUGHPUT)
    assert "enable_attention_dp" in str(error) and "enable_min_latency" in error.where and path


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("engine.options.tensor_parallel_size=4", "engine.tensor_parallel"),
        ("engine.options.max_batch_size=4", "engine.max_batch_size"),
        ("engine.options.speculative_config={max_draft_len: 2}", "engine.draft_tokens"),
        ("engine.options.stream_interval=0", "at least 1"),
        ("engine.options.stream_interval=two", "whole number"),
        ("engine.options.enable_autotuner=1", "true or false"),
        ("engine.options.allreduce_strategy=FAST", "use one of AUTO"),
        ("engine.options.kv_cache_config={free_gpu_memory_fraction: 1.5}", "at most 1"),
        ("engine.options.kv_cache_config={block_reuse: true}", "does not know kv_cache_config.block_reuse"),
        ("engine.options.cuda_graph_config={batch_sizes: [1, 4], max_batch_size: 8}", "make them equal"),
        ("engine.options.cuda_graph_config={max_batch_size: 64}", "engine.max_batch_size to 8"),
        ("engine.options.enable_attention_dp=true", "no effect"),
        ("engine.expert_parallel=8", "expert_parallel 1"),
        ("engine.options.moe_tensor_parallel_size=4", "drop it"),
        ("engine.options.max_num_tokens=16", "tokens of one full step"),
        ("engine.options.speculative_config={draft_len_schedule: {2: 3}}", "must start with 1: 3"),
        ("engine.options.speculative_config={draft_len_schedule: {1: 3, 4: 5}}", "never exceed"),
        ("engine.options.speculative_config={use_dynamic_tree: true}", "dynamic_tree_max_topK"),
        ("engine.env.TRTLLM_ENABLE_PLD='1'", "did you mean TRTLLM_ENABLE_PDL?"),
        ("engine.env.TRTLLM_ENABLE_PDL='yes'", "use 0 or 1"),
        ("engine.plugins=[router, attention_decode]", "attention_decode has no place in TensorRT-LLM"),
        ("engine.version='1.0.0'", "no contract for TensorRT-LLM 1.0.0"),
    ],
)
def test_refused(override: str, says: str) -> None:
    assert says in str(refused(override))


def test_draft_len_schedule_reaches_the_engine_with_numbers() -> None:
    made = render(spec(LATENCY, "engine.options.speculative_config={draft_len_schedule: {1: 3, 8: 0}}"))
    assert made.args_yaml["speculative_config"]["draft_len_schedule"] == {1: 3, 8: 0}


def test_slice_of_a_spec_renders_like_the_spec() -> None:
    whole = spec(LATENCY).to_dict()
    assert render({"engine": whole["engine"], "draft": {"capture_layers": [1, 23, 44]}}) == render(spec(LATENCY))


def test_placeholders_are_filled_in() -> None:
    made = render(spec(LATENCY)).resolve(**VALUES)
    assert "{" not in str(made.argv) + str(made.args_yaml["speculative_config"]["speculative_model_dir"])


@pytest.mark.parametrize("line", lines())
def test_contract_is_sound(line: str) -> None:
    """Every field has a type that exists, and every default fits it."""
    from engine_plugins.trtllm.contract import fits

    contract = load_contract(line)
    for rules in (contract.fields, *contract.models.values()):
        for name, rule in rules.items():
            assert fits(contract, rule["type"], rule.get("default")) or "default" not in rule, name
            assert "default" not in rule or rule["default"] in rule.get("values", [rule["default"]]), name


@pytest.mark.parametrize("name", [LATENCY, THROUGHPUT, SCOUT])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_spec_renders_without_an_unknown_flag_or_key(name: str, version: str) -> None:
    made, contract = render(spec(name), version).resolve(**VALUES), contract_for(version)
    assert not list(argv_complaints(contract, made.argv, version))
    assert not list(yaml_complaints(contract, made.args_yaml, version))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--config", "x"], "1.1.0 has no --config"),
        (["--tp_size", "eight"], "--tp_size needs a whole number"),
        (["--prot", "1"], "did you mean --port?"),
        (["--port"], "--port needs"),
    ],
)
def test_command_line_is_part_of_the_contract(argv: list[str], says: str) -> None:
    (only,) = list(argv_complaints(contract_for("1.1.0"), ["trtllm-serve", "model", *argv], "1.1.0"))[:1]
    assert says in f"{only.what}: {only.fix}"


def test_every_version_of_a_line_finds_it() -> None:
    assert [contract_for(version).line for version in VERSIONS] == list(lines())


# ---------------------------------------------------------------- which kernels run


def runs(*overrides: str, requests: int = 1, name: str = LATENCY) -> dict[str, bool]:
    return {kernel.name: kernel.runs for kernel in record_kernels(spec(name, *overrides), requests=requests)}


def test_record_draft_length_misses_the_swiglu_gemv() -> None:
    """Three draft tokens make a step of four, one too many for it; the trtllm-gen kernel runs instead."""
    found = runs()
    assert not found["FC13 + SwiGLU GEMV"] and found["FC13 + SwiGLU trtllm-gen"] and found["FC_QKV GEMV"]


def test_two_draft_tokens_reach_it() -> None:
    assert runs("engine.draft_tokens=2")["FC13 + SwiGLU GEMV"]


def test_seven_draft_tokens_keep_all_but_the_rope_gemv() -> None:
    found = runs("engine.draft_tokens=7")
    assert not found["FC_QKV GEMV"] and found["FC_QKV trtllm-gen (RoPE layers)"]
    assert found["MoE top-1, FC13 + SwiGLU + FC2"] and found["FC_QKV + attention scaling (NoPE layers)"]


def test_three_users_lose_the_moe_kernel() -> None:
    assert not runs(requests=3)["MoE top-1, FC13 + SwiGLU + FC2"]


def test_other_tensor_parallel_loses_the_gemvs() -> None:
    assert not runs("engine.tensor_parallel=4")["FC_QKV GEMV"]


def test_scout_and_throughput_run_none_of_them() -> None:
    assert not any(ran for name, ran in runs(name=SCOUT).items() if "AllReduce" not in name)
    assert not any(runs(name=THROUGHPUT).values())


def test_unknown_model_is_said_to_be_unknown() -> None:
    (only,) = record_kernels(spec(LATENCY, "model.source=hf://org/other"))
    assert not only.runs and "not known before the download" in only.why


if __name__ == "__main__":
    for each in (LATENCY, THROUGHPUT, SCOUT):
        for release in VERSIONS:
            (GOLDEN / f"{each}_{release}.yaml").write_text(as_text(render(spec(each), release)))
