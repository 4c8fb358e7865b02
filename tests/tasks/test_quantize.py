"""The quantize stage on random checkpoints: what comes out, and what bad input says. One calibration serves most."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from specs.errors import InputError, IntegrityError
from tasks.job import Job, Progress
from tasks.quantize import build, calibrate, reload, sensitivity, stage
from tests.tasks.random_checkpoints import (
    llama4_config,
    rename_newer,
    write_checkpoint,
    write_llama3,
    write_multimodal,
    write_prompts,
)

RECIPE = "general/ptq/fp8_default-kv_fp8"
EXPERTS_ONLY = """
metadata: {recipe_type: ptq, description: experts in FP8}
quantize:
  algorithm: max
  quant_cfg:
    - {quantizer_name: "*", enable: false}
    - {quantizer_name: "*.experts.*_quantizer", cfg: {num_bits: e4m3, axis: null}}
"""


def make_job(root: Path, source: Path, out: Path, recipe: str = RECIPE, **calibration: object) -> Job:
    out.mkdir(parents=True, exist_ok=True)
    spec = {"dataset": "file:prompts.jsonl", "samples": 32, "sequence_length": 128, **calibration}
    return Job(
        "quantize", {"name": "t", "quantize": {"recipe": recipe, "calibration": spec}}, root, {"download": source}, out
    )


def described(out: Path) -> dict:
    return json.loads((out / "hf_quant_config.json").read_text())["quantization"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    root = tmp_path_factory.mktemp("quantize")
    write_checkpoint(root / "source")
    write_prompts(root / "prompts.jsonl")
    return root, build(make_job(root, root / "source", root / "out"), Progress())


def test_export_is_modelopts_unified_checkpoint(built: tuple[Path, dict]) -> None:
    root, _ = built
    config = json.loads((root / "out" / "config.json").read_text())
    quant = json.loads((root / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert config["quantization_config"]["quant_method"] == "modelopt"
    assert {**config, "quantization_config": None} == {
        **json.loads((root / "source" / "config.json").read_text()),
        "quantization_config": None,
    }
    assert (quant["quant_algo"], quant["kv_cache_quant_algo"]) == ("FP8", "FP8")
    assert {"lm_head", "model.layers.1.feed_forward.router"} <= set(quant["exclude_modules"])
    assert (root / "out" / "chat_template.jinja").read_bytes() == (root / "source" / "chat_template.jinja").read_bytes()


def test_unquantized_tensors_are_the_sources_own_bytes(built: tuple[Path, dict]) -> None:
    root, _ = built
    before, after = (load_file(root / name / "model.safetensors") for name in ("source", "out"))
    for name in ("lm_head.weight", "model.layers.1.feed_forward.router.weight", "model.norm.weight"):
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(before[name], after[name])


def test_experts_stay_packed_with_one_scale(built: tuple[Path, dict]) -> None:
    root, _ = built
    tensors = load_file(root / "out" / "model.safetensors")
    packed = tensors["model.layers.1.feed_forward.experts.gate_up_proj"]
    assert packed.dtype == torch.float8_e4m3fn
    assert packed.shape == (4, 64, 192)
    assert tensors["model.layers.1.feed_forward.experts.gate_up_proj_weight_scale"].numel() == 1


def test_requantizing_a_fused_group_changes_nothing(built: tuple[Path, dict]) -> None:
    """What TensorRT-LLM does at load: dequantise to BF16, quantise again with the group's largest scale."""
    tensors = load_file(built[0] / "out" / "model.safetensors")
    for part in "qkv":
        stem = f"model.layers.0.self_attn.{part}_proj"
        scale = max(tensors[f"model.layers.0.self_attn.{p}_proj.weight_scale"] for p in "qkv")
        again = ((tensors[f"{stem}.weight"].float() * tensors[f"{stem}.weight_scale"]).bfloat16().float() / scale).to(
            torch.float8_e4m3fn
        )
        assert torch.equal(again.view(torch.uint8), tensors[f"{stem}.weight"].view(torch.uint8))


def test_layer_table_is_complete(built: tuple[Path, dict]) -> None:
    frame = pd.read_parquet(built[0] / "out" / "layers.parquet")
    assert set(frame.kind) == {"weight", "input", "kv"}
    assert (frame[frame.kind == "weight"].sqnr_db > 25).all()
    assert built[1]["quantize.reload_difference"] < 0.05


@pytest.mark.parametrize("precise", [True, False])
def test_a_damaged_export_does_not_pass_the_witness(built: tuple[Path, dict], tmp_path: Path, precise: bool) -> None:
    """The fault: one scale doubled after export, as a renaming or re-sharding tool might."""
    out = shutil.copytree(built[0] / "out", tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    sound = reload.reload(out)
    ids = torch.tensor([list(range(6, 40))] * 3)
    traces = reload.trace(sound, ids)
    tensors["model.layers.2.feed_forward.down_proj.weight_scale"] *= 2
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((built[0] / "source" / "config.json").read_text())
    recipe = calibrate.read_recipe(RECIPE, tmp_path)
    wanted = stage.coverage.expected(config, recipe["quant_cfg"])
    with pytest.raises(IntegrityError, match="layers.2"):
        stage.witness(out, wanted, [], ids, traces, precise)


def test_dense_llama3_simply_works(built: tuple[Path, dict], tmp_path: Path) -> None:
    metrics = build(make_job(built[0], write_llama3(tmp_path / "llama3"), tmp_path / "out"), Progress())
    assert metrics["quantize.tensors"] == 14


def test_tied_embeddings_stay_tied(built: tuple[Path, dict], tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "tied", llama4_config(tie_word_embeddings=True))
    build(make_job(built[0], source, tmp_path / "out"), Progress())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("newer", [False, True])
def test_multimodal_comes_out_as_tensorrt_llm_loads_it(built: tuple[Path, dict], tmp_path: Path, newer: bool) -> None:
    """Its mapper strips exactly `language_model.`; whatever layout went in, the hub's names come out."""
    source = write_multimodal(tmp_path / "vision")
    names = set(load_file(source / "model.safetensors"))
    build(make_job(built[0], rename_newer(source) if newer else source, tmp_path / "out"), Progress())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name in tensors if not name.endswith("_scale")} == names
    layer = "language_model.model.layers.1.feed_forward"
    assert tensors[f"{layer}.experts.gate_up_proj"].shape == (4, 64, 192)  # [experts, in, gate | up]
    assert tensors[f"{layer}.experts.down_proj"].dtype == torch.float8_e4m3fn
    assert tensors[f"{layer}.experts.down_proj_input_scale"].shape == ()
    kept = [n for n in tensors if n.startswith(("vision_model", "multi_modal_projector", "language_model.lm_head"))]
    assert len(kept) > 10
    assert all(tensors[name].dtype == torch.bfloat16 for name in [*kept, f"{layer}.router.weight"])
    excluded = set(described(tmp_path / "out")["exclude_modules"])
    assert {"vision_model*", "multi_modal_projector*", "language_model.lm_head", "lm_head"} <= excluded


def test_weights_of_another_model_are_refused(built: tuple[Path, dict], tmp_path: Path) -> None:
    """transformers would leave what is missing at random values, and calibrate on them."""
    source = shutil.copytree(built[0] / "source", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.final_norm.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="2 tensors of the checkpoint do not fit.*model.final_norm"):
        build(make_job(built[0], source, tmp_path / "out"), Progress())


@pytest.mark.parametrize("recipe", ["nvfp4_default-kv_fp8", "nvfp4_experts_only-kv_fp8", "nvfp4_weight_only-kv_fp16"])
def test_nvfp4_recipes_pass_through(built: tuple[Path, dict], tmp_path: Path, recipe: str) -> None:
    """modelopt's own export, read back by our definition of NVFP4 to the same logits."""
    metrics = build(make_job(built[0], built[0] / "source", tmp_path / "out", f"general/ptq/{recipe}"), Progress())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert metrics["quantize.reload_difference"] < 1e-5
    assert described(tmp_path / "out")["quant_algo"].endswith("NVFP4")
    assert tensors["model.layers.1.feed_forward.experts.down_proj"].dtype == torch.uint8
    assert tensors["model.layers.1.feed_forward.router.weight"].dtype == torch.bfloat16


def test_a_recipe_that_only_casts_k_and_v_has_no_scale_for_them(built: tuple[Path, dict], tmp_path: Path) -> None:
    build(make_job(built[0], built[0] / "source", tmp_path / "out", f"{RECIPE}_cast"), Progress())
    assert not [n for n in load_file(tmp_path / "out" / "model.safetensors") if n.endswith(("k_scale", "v_scale"))]
    assert described(tmp_path / "out")["kv_cache_quant_algo"] == "FP8"


def test_a_recipe_may_be_a_file(built: tuple[Path, dict], tmp_path: Path) -> None:
    (built[0] / "experts.yaml").write_text(EXPERTS_ONLY)
    metrics = build(make_job(built[0], built[0] / "source", tmp_path / "out", "file:experts.yaml"), Progress())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert metrics["quantize.tensors"] == 4
    assert {n for n in tensors if tensors[n].dtype == torch.float8_e4m3fn} == {
        f"model.layers.{i}.feed_forward.experts.{part}_proj" for i in (1, 3) for part in ("gate_up", "down")
    }


@pytest.mark.parametrize("recipe", ["int4_blockwise_weight_only", "nvfp4_default-kv_nvfp4_cast"])
def test_a_format_nobody_checks_is_refused(built: tuple[Path, dict], tmp_path: Path, recipe: str) -> None:
    with pytest.raises(InputError, match="format is none we can check"):
        build(make_job(built[0], built[0] / "source", tmp_path / "out", f"general/ptq/{recipe}"), Progress())


class Killed(Exception):
    """Stands for the signal."""


def stop_at(word: str) -> Progress:
    def sink(done: float, total: float, note: str) -> None:
        if note == word:
            raise Killed

    return Progress(sink)


def test_a_build_killed_after_calibration_does_not_calibrate_again(built: tuple[Path, dict], tmp_path: Path) -> None:
    job = make_job(built[0], built[0] / "source", tmp_path / "out")
    with pytest.raises(Killed):
        build(job, stop_at("convert"))
    notes: list[str] = []
    again = build(job, Progress(lambda done, total, note: notes.append(note)))
    assert again == built[1]
    assert "calibrate" not in notes


def test_a_killed_calibration_goes_on_at_its_batch(built: tuple[Path, dict], tmp_path: Path) -> None:
    config = json.loads((built[0] / "source" / "config.json").read_text())
    recipe = calibrate.read_recipe(RECIPE, tmp_path)
    sequences = [list(range(6 + i, 40 + 2 * i)) for i in range(8)]

    def run(progress: Progress, saved: Path | None) -> tuple[dict, dict]:
        model = calibrate.load_model(built[0] / "source", config, tmp_path / "offload")
        routed = calibrate.calibrate(model, recipe, sequences, 1, progress, saved, save_every_s=0)
        return routed, calibrate.exported_scales(calibrate.quantizers(model))

    whole = run(Progress(), None)
    saved, batches = tmp_path / "amax.safetensors", []

    def die_at_five(done: float, total: float, note: str) -> None:
        batches.append(done)
        if len(batches) == 5:
            raise Killed

    with pytest.raises(Killed):
        run(Progress(die_at_five), saved)
    assert run(Progress(lambda done, total, note: batches.append(done)), saved) == whole
    assert batches == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_model_larger_than_memory_calibrates_from_disk(built: tuple[Path, dict], tmp_path: Path) -> None:
    config = json.loads((built[0] / "source" / "config.json").read_text())
    recipe = calibrate.read_recipe(RECIPE, tmp_path)
    found = []
    for free_bytes in (500_000, 1_500_000):  # the checkpoint has 638 kB
        model = calibrate.load_model(built[0] / "source", config, tmp_path / "offload", free_bytes)
        found.append(any(parameter.is_meta for parameter in model.parameters()))
        calibrate.calibrate(model, recipe, [list(range(6, 70))] * 4, 4, Progress())
        found.append(calibrate.exported_scales(calibrate.quantizers(model)))
    assert found == [True, found[1], False, found[1]]


def hostile(source: Path, block: str) -> Path:
    """One block whose weights FP8 cannot hold: a value that nobody uses stretches the scale until the rest is lost."""
    tensors = load_file(source / "model.safetensors")
    up = tensors[f"{block}.up_proj.weight"]
    up *= 8  # the block matters
    up[7] = 0  # and its hidden unit 7 is always zero
    tensors[f"{block}.down_proj.weight"][:, 7] = 1e4
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def test_the_block_that_costs_most_is_kept_in_bf16(built: tuple[Path, dict], tmp_path: Path) -> None:
    block = "model.layers.2.feed_forward"
    source = hostile(shutil.copytree(built[0] / "source", tmp_path / "source"), block)
    job = make_job(built[0], source, tmp_path / "out")
    open_end = build(make_job(built[0], source, tmp_path / "all"), Progress())
    job.spec["quantize"]["max_divergence"] = open_end["quantize.divergence"] / 2
    metrics = build(job, Progress())
    assert (open_end["quantize.blocks_kept"], metrics["quantize.blocks_kept"]) == (0, 1)
    assert metrics["quantize.divergence"] <= open_end["quantize.divergence"] / 2
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors[f"{block}.gate_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.feed_forward.gate_proj.weight"].dtype == torch.float8_e4m3fn
    assert f"{block}*" in described(tmp_path / "out")["exclude_modules"]


def test_no_block_is_kept_that_the_budget_does_not_need(built: tuple[Path, dict], tmp_path: Path) -> None:
    config = json.loads((built[0] / "source" / "config.json").read_text())
    model = calibrate.load_model(built[0] / "source", config, tmp_path / "offload")
    calibrate.calibrate(model, calibrate.read_recipe(RECIPE, tmp_path), [list(range(6, 70))] * 4, 4, Progress())
    found, ids_BT = calibrate.quantizers(model), torch.tensor([list(range(6, 70))] * 2)
    _, without = sensitivity.keep(model, found, ids_BT, None, Progress())
    budget = 0.45 * without  # the first five by cost reach it, and one of them is not needed
    kept, left = sensitivity.keep(model, found, ids_BT, budget, Progress())
    assert kept and left <= budget
    members = sensitivity.blocks(model, found)
    with sensitivity.disabled(found.values()):
        reference_BTV = sensitivity.log_probabilities(model, ids_BT)
    for block in kept:
        for name in members[block]:
            found[name].enable()
        assert sensitivity.divergence(reference_BTV, sensitivity.log_probabilities(model, ids_BT)) > budget
        for name in members[block]:
            found[name].disable()


def test_a_divergence_out_of_reach_is_refused(built: tuple[Path, dict], tmp_path: Path) -> None:
    job = make_job(built[0], built[0] / "source", tmp_path / "out")
    job.spec["quantize"]["max_divergence"] = 1e-12
    with pytest.raises(InputError, match="every weight in BF16"):
        build(job, Progress())


def test_a_starved_expert_stops_the_stage(built: tuple[Path, dict], tmp_path: Path) -> None:
    source = shutil.copytree(built[0] / "source", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    router = tensors["model.layers.1.feed_forward.router.weight"]
    router[2] = (router[0] + router[1]) / 2  # never above both
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"experts \[2\].*layers.1.feed_forward.router"):
        build(make_job(built[0], source, tmp_path / "out"), Progress())


def test_nan_in_a_source_weight_is_named(built: tuple[Path, dict], tmp_path: Path) -> None:
    source = shutil.copytree(built[0] / "source", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.3.self_attn.o_proj.weight"][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="layers.3.self_attn.o_proj.weight"):
        build(make_job(built[0], source, tmp_path / "out"), Progress())
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_an_already_quantized_checkpoint_is_refused(built: tuple[Path, dict], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already quantized"):
        build(make_job(built[0], built[0] / "out", tmp_path / "out"), Progress())


def test_a_quantized_checkpoint_that_hides_it_is_refused(built: tuple[Path, dict], tmp_path: Path) -> None:
    source = shutil.copytree(built[0] / "out", tmp_path / "source")
    shutil.copyfile(built[0] / "source" / "config.json", source / "config.json")
    with pytest.raises(InputError, match="already quantized: 32 tensors.*layers.0.feed_forward.down_proj.weight"):
        build(make_job(built[0], source, tmp_path / "out"), Progress())


def test_a_calibration_set_shorter_than_asked(built: tuple[Path, dict], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="48 prompts, 64 are asked for"):
        build(make_job(built[0], built[0] / "source", tmp_path / "out", samples=64), Progress())


def test_a_broken_prompt_line_is_named(built: tuple[Path, dict], tmp_path: Path) -> None:
    lines = (built[0] / "prompts.jsonl").read_text().splitlines()
    lines[4] = lines[4][:-5]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"prompts.jsonl:5"):
        build(make_job(tmp_path, built[0] / "source", tmp_path / "out"), Progress())


def test_an_unknown_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="recipe"):
        calibrate.read_recipe("general/ptq/no_such_recipe", tmp_path)
