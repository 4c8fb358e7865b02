"""What a bundle refuses, and what happens without a compiler. Run: `pytest tests/engine_plugins/test_bundle.py`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_plugins.native import compiler
from engine_plugins.native.bundle import build_bundle, load_bundle
from engine_plugins.native.engine import Engine, SamplingParams
from specs.errors import InputError, IntegrityError
from tests.engine_plugins.models import tokens


@pytest.fixture
def broken(models: Path, tmp_path: Path) -> Callable[[str, Callable[[dict], None]], Path]:
    """Copy of a model or draft directory with its tensors changed."""

    def change(name: str, edit: Callable[[dict], None]) -> Path:
        copy = tmp_path / name
        shutil.copytree(models / name, copy)
        tensors = load_file(copy / "model.safetensors")
        edit(tensors)
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        return copy

    return change


@pytest.fixture
def copied_bundle(bundles: Path, tmp_path: Path) -> Path:
    shutil.copytree(bundles / "tiny", tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights_are_refused_by_name(broken: Callable[..., Path], tmp_path: Path, value: float) -> None:
    name = "model.layers.3.feed_forward.experts.down_proj"
    checkpoint = broken("tiny", lambda t: t[name].view(-1).__setitem__(7, value))
    with pytest.raises(IntegrityError, match=f"{name} holds NaN"):
        build_bundle(checkpoint, tmp_path / "out", max_seq_len=64)


def test_a_missing_tensor_is_named(broken: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="self_attn.k_proj.weight is missing"):
        build_bundle(
            broken("tiny", lambda t: t.pop("model.layers.2.self_attn.k_proj.weight")), tmp_path / "out", max_seq_len=64
        )


def test_a_truncated_file_is_refused(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "tiny", tmp_path / "tiny")
    file = tmp_path / "tiny" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match="cut short"):
        build_bundle(tmp_path / "tiny", tmp_path / "out", max_seq_len=64)


def test_a_missing_shard_is_named(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "tiny", tmp_path / "tiny")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "tiny" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match="model-00002-of-00002.safetensors is missing"):
        build_bundle(tmp_path / "tiny", tmp_path / "out", max_seq_len=64)


def test_a_draft_map_that_is_no_bijection_is_refused(broken: Callable[..., Path], models: Path, tmp_path: Path) -> None:
    draft = broken("draft", lambda t: t["d2t"].__setitem__(5, t["d2t"][4] - 1))
    with pytest.raises(IntegrityError, match="d2t"):
        build_bundle(models / "tiny", tmp_path / "out", draft=draft, draft_tokens=3, max_seq_len=64)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_seq_len": 4096}, "max_seq_len"),
        ({"draft_tokens": 16}, "draft_tokens"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"plugins": ["magic"]}, "unknown plugin"),
    ],
)
def test_options_outside_the_contract_are_refused(models: Path, tmp_path: Path, options: dict, match: str) -> None:
    options = {"draft": models / "draft", "draft_tokens": 3, "max_seq_len": 64, **options}
    with pytest.raises(InputError, match=match):
        build_bundle(models / "tiny", tmp_path / "out", **options)


@pytest.mark.parametrize("name", ["weights.safetensors", "draft.safetensors", "plugins/libkilotok.so", "config.json"])
def test_one_flipped_bit_is_noticed(copied_bundle: Path, name: str) -> None:
    data = bytearray((copied_bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied_bundle / name).write_bytes(data)
    with pytest.raises(IntegrityError, match="sha256"):
        load_bundle(copied_bundle)


@pytest.mark.parametrize(
    ("key", "value", "match"), [("machine", "aarch64", "built for aarch64"), ("kilotok_bundle", 99, "schema 99")]
)
def test_another_architecture_or_schema_is_refused(copied_bundle: Path, key: str, value: object, match: str) -> None:
    record = json.loads((copied_bundle / "bundle.json").read_text())
    record[key] = value
    (copied_bundle / "bundle.json").write_text(json.dumps(record))
    with pytest.raises(IntegrityError, match=match):
        load_bundle(copied_bundle)


def test_a_directory_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bundle.json"):
        load_bundle(tmp_path)


def test_without_a_compiler_the_reference_serves_the_same_tokens(
    models: Path, bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_engine: Callable[..., Engine]
) -> None:
    monkeypatch.setenv("PATH", "")  # no g++, no clang++
    with pytest.warns(UserWarning, match="reference"):
        build_bundle(models / "tiny", tmp_path / "out", draft=models / "draft", draft_tokens=3, max_seq_len=256)
    with pytest.warns(UserWarning, match="slow reference engine"):
        slow = open_engine(tmp_path / "out")
    assert slow.counters()["backend"] == "reference"
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompt = tokens(6)
    assert (
        slow.generate([prompt], params)[0].token_ids
        == open_engine(bundles / "tiny").generate([prompt], params)[0].token_ids
    )


def test_a_source_that_does_not_compile_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from specs.errors import StageFailed

    (tmp_path / "step.cpp").write_text("this is not C++\n")
    (tmp_path / "api.cpp").write_text("")
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)
    with pytest.raises(StageFailed, match="does not compile"):
        compiler.compile_library(tmp_path / "out")


def test_weights_are_stored_as_they_came(models: Path, bundles: Path) -> None:
    """Packing moves bits: every BF16 value of the checkpoint is in the bundle, bit for bit."""
    from engine_plugins.native.reference_backend import unpack_target

    unpacked, source = unpack_target(load_bundle(bundles / "tiny")), load_file(models / "tiny" / "model.safetensors")
    for name, tensor in source.items():
        assert np.array_equal(unpacked.float32(name), tensor.to(torch.float32).numpy()), name


def test_a_format_the_engine_does_not_compute_is_refused(models: Path, tmp_path: Path) -> None:
    """Packed NVFP4 looks like bytes; multiplied as such it would answer nonsense."""
    checkpoint = shutil.copytree(models / "tiny", tmp_path / "nvfp4")
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="NVFP4 is not supported"):
        build_bundle(checkpoint, tmp_path / "out", max_seq_len=64)
