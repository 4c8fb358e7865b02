"""Export a calibrated model through modelopt, keeping what must stay in the source's own bytes.

The model is calibrated in FP32 so that each weight is rounded to E4M3 once (in BF16, modelopt's division rounds twice);
unquantized tensors are written as the source has them. Refuses to rename: names come out as the checkpoint's own.
Run it: nothing to run; `python -m pytest tests/tasks/test_quantize.py`.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tasks.prompts import TOKENIZER_FILES

FP8 = torch.float8_e4m3fn


def export(model: Any, source: Path, out: Path, weights: frozenset[str]) -> None:
    """modelopt's unified Hugging Face checkpoint of `model` in `out`, plus the tokenizer and template of `source`."""
    from modelopt.torch.export import export_hf_checkpoint

    kept = {name: tensor for name, tensor in source_tensors(source) if name not in weights}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dtype notice: we export FP32 on purpose and overwrite what is not quantized
        export_hf_checkpoint(model, dtype=torch.float32, export_dir=out, extra_state_dict=kept)
    _restore_dtype(source, out)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def source_tensors(checkpoint: Path) -> Any:
    """(name, tensor) of every shard."""
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def _restore_dtype(source: Path, out: Path) -> None:
    before = json.loads((source / "config.json").read_text())
    path = out / "config.json"
    after = json.loads(path.read_text())
    for key in ("dtype", "torch_dtype"):
        after.pop(key, None)
        if key in before:
            after[key] = before[key]
    path.write_text(json.dumps(after, indent=2) + "\n")


def exported_tables(out: Path) -> tuple[set[str], dict[str, float], set[str]]:
    """(names of FP8 tensors, scalar scales by name, all names) of an exported checkpoint."""
    quantized: set[str] = set()
    scales: dict[str, float] = {}
    names: set[str] = set()
    for name, tensor in source_tensors(out):
        names.add(name)
        if tensor.dtype == FP8:
            quantized.add(name)
        elif name.endswith("_scale") and tensor.numel() == 1:
            scales[name] = float(tensor)
    return quantized, scales, names
