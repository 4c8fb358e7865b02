"""What surrounds the weights of an exported checkpoint, and modelopt's own exporter for formats that are not streamed.

config.json is the source's own plus `quantization_config`: a newer transformers writes keys that older readers lack.
Refuses to rename: names come out as the hub has them.
Run it: nothing to run; `python -m pytest tests/tasks/test_quantize.py`.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tasks.quantize.coverage import exported_name, newer_names
from tasks.quantize.shards import INDEX, read_float, read_header, shard_files

COPIED = (".json", ".jinja", ".model", ".txt")  # tokenizer, template, processor; weights and code are not


def quantization_config(model: Any) -> dict[str, Any]:
    """modelopt's description of a calibrated model: the content of hf_quant_config.json.

    Excluded modules of a multimodal model are named with and without `language_model.`: TensorRT-LLM strips the prefix
    from weights, not from these.
    """
    from modelopt.torch.export.quant_utils import get_quant_config

    described = get_quant_config(model)
    excluded = described["quantization"].get("exclude_modules") or []
    prefix = "language_model."
    bare = [name.removeprefix(prefix) for name in excluded if name.startswith(prefix) and name != f"{prefix}*"]
    described["quantization"]["exclude_modules"] = sorted({*excluded, *bare})
    return described


def write_configs(source: Path, out: Path, described: dict[str, Any]) -> None:
    """Both places where an engine looks for the format, and everything of the source that is not a weight."""
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in COPIED and file.name not in (INDEX, "config.json"):
            shutil.copyfile(file, out / file.name)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = convert_hf_quant_config_format(described)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "hf_quant_config.json").write_text(json.dumps(described, indent=2) + "\n")


def export(model: Any, source: Path, out: Path, config: Mapping[str, Any], weights: frozenset[str]) -> None:
    """modelopt's unified Hugging Face checkpoint, for formats with more than one scale per tensor.

    In FP32, so that each weight is rounded once; what is not quantized is written as the source has it.
    """
    from modelopt.torch.export import export_hf_checkpoint

    prefixes = newer_names(config)
    kept = {exported_name(name, prefixes): tensor for name, tensor in source_tensors(source)}
    kept = {name: tensor for name, tensor in kept.items() if name not in weights}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dtype notice: we export FP32 on purpose and overwrite what is not quantized
        export_hf_checkpoint(model, dtype=torch.float32, export_dir=out, extra_state_dict=kept)


def source_tensors(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every shard."""
    for shard in shard_files(checkpoint):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def exported_tables(out: Path) -> tuple[set[str], dict[str, float], set[str]]:
    """(names of quantized tensors, scalar scales by name, all names) of an exported checkpoint."""
    quantized: set[str] = set()
    scales: dict[str, float] = {}
    names: set[str] = set()
    for shard in shard_files(out):
        for tensor in read_header(shard):
            names.add(tensor.name)
            if tensor.name.endswith(("_scale", "_scale_2")):
                if tensor.dtype == "F32" and not tensor.shape:
                    scales[tensor.name] = read_float(shard, tensor)
            elif tensor.dtype in ("F8_E4M3", "U8"):
                quantized.add(tensor.name)
    return quantized, scales, names
