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
from tasks.quantize import build, calibrate, export, reload, stage
from tests.tasks.random_checkpoints import write_checkpoint, write_llama3, write_multimodal, write_prompts

RECIPE = "general/ptq/fp8_default-kv_fp8"


def make_job(root: Path, source: Path, out: Path, **calibration: object) -> Job:
    out.mkdir(parents=True, exist_ok=True)
    spec = {"dataset": "file:prompts.jsonl", "samples": 32, "sequence_length": 128, **calibration}
    return Job(
        "quantize", {"name": "t", "quantize": {"recipe": RECIPE, "calibration": spec}}, root, {"download": source}, out
    )


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
    assert config["dtype"] == "bfloat16"
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
            export.FP8
        )
        assert torch.equal(again.view(torch.uint8), tensors[f"{stem}.weight"].view(torch.uint8))


def test_layer_table_is_complete(built: tuple[Path, dict]) -> None:
    frame = pd.read_parquet(built[0] / "out" / "layers.parquet")
    assert set(frame.kind) == {"weight", "input", "kv"}
    assert (frame[frame.kind == "weight"].sqnr_db > 25).all()
    assert built[1]["quantize.reload_difference"] < 0.05


def test_a_damaged_export_does_not_pass_the_witness(built: tuple[Path, dict], tmp_path: Path) -> None:
    """The fault: one scale doubled after export, as a renaming or re-sharding tool might."""
    out = shutil.copytree(built[0] / "out", tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    sound = reload.reload(out)
    ids = [list(range(6, 40))] * 3
    traces = [reload.trace(sound, i) for i in ids]
    tensors["model.layers.2.feed_forward.down_proj.weight_scale"] *= 2
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((built[0] / "source" / "config.json").read_text())
    recipe = calibrate.read_recipe(RECIPE, tmp_path)
    wanted = stage.coverage.expected(config, recipe["quant_cfg"])
    with pytest.raises(IntegrityError, match="layers.2"):
        stage.witness(out, wanted, [], ids, traces)


def test_dense_llama3_simply_works(built: tuple[Path, dict], tmp_path: Path) -> None:
    metrics = build(make_job(built[0], write_llama3(tmp_path / "llama3"), tmp_path / "out"), Progress())
    assert metrics["quantize.tensors"] == 14


def test_the_vision_tower_stays_bf16(built: tuple[Path, dict], tmp_path: Path) -> None:
    build(make_job(built[0], write_multimodal(tmp_path / "vision"), tmp_path / "out"), Progress())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["language_model.model.layers.1.feed_forward.experts.down_proj"].dtype == torch.float8_e4m3fn
    kept = [name for name in tensors if name.startswith(("vision_model", "multi_modal_projector"))]
    assert kept
    assert all(tensors[name].dtype == torch.bfloat16 for name in kept)


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
