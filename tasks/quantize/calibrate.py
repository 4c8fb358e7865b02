"""Load the BF16 model and run a modelopt recipe over chat prompts, counting what no recipe counts: tokens per expert.

A long calibration writes down what it has seen every minute, and goes on from there after a crash. It refuses to guess
a recipe (a name of modelopt's, or a YAML file of yours, as the spec says) and a model of which a tensor is missing.
Run it: nothing to run; `python -m pytest tests/tasks/test_quantize.py`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from modelopt.recipe import load_recipe
from safetensors.torch import load_file, save_file

from specs.errors import InputError
from tasks.job import Progress
from tasks.quantize import coverage, rounding

MAX_BATCH_TOKENS = 4096
# Plain maxima for a model that lies on disk: layer by layer, or modelopt would keep every weight it has visited.
FROM_DISK = {"method": "max", "layerwise": {"enable": True, "calib_mutates_weights": False}}


def read_recipe(recipe: str, root: Path) -> dict[str, Any]:
    """modelopt's quantize config of a recipe: a name in its library, or `file:` a YAML under `root`."""
    source: str | Path = root / recipe.removeprefix("file:") if recipe.startswith("file:") else recipe
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the loader prints
            loaded = load_recipe(source)
    except (ValueError, FileNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"recipe not usable: {reason}", recipe, "e.g. general/ptq/fp8_default-kv_fp8") from error
    body = getattr(loaded, "quantize", None)
    if body is None:
        raise InputError("not a post-training quantization recipe", recipe, "its recipe_type must be ptq")
    return dict(body.model_dump())


def load_model(source: Path, config: Mapping[str, Any], offload: Path, free_bytes: int | None = None) -> Any:
    """The checkpoint as a transformers model with nothing missing, wherever it fits.

    On GPUs in BF16, what does not fit there in CPU memory, and the rest read from the checkpoint layer by layer.
    Without a GPU in FP32, where the witness is sharpest, if that fits; else in BF16.
    `free_bytes` of CPU memory are what the system says unless given.
    """
    import transformers

    architecture = getattr(transformers, config["architectures"][0])
    prefixes = {f"^{re.escape(newer)}": older for newer, older in coverage.newer_names(config).items()}
    model, loading = architecture.from_pretrained(
        source, key_mapping=prefixes, output_loading_info=True, **_placement(source, offload, free_bytes)
    )
    wrong = sorted({*loading["missing_keys"], *loading["unexpected_keys"], *map(str, loading["mismatched_keys"])})
    if wrong:
        raise InputError(
            f"{len(wrong)} tensors of the checkpoint do not fit {architecture.__name__}",
            wrong[0],
            "config.json and the weights are not of the same model",
        )
    return model.eval()


def _placement(source: Path, offload: Path, free_bytes: int | None) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    free = free_bytes or psutil.virtual_memory().available
    if not torch.cuda.is_available() and 3 * size < free:
        return {"dtype": torch.float32}
    placement: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": "auto", "offload_folder": offload}
    if not torch.cuda.is_available():
        placement["max_memory"] = {"cpu": int(0.6 * free)}  # the rest is for activations and the fake-quantized weight
    return placement


def first_device(model: Any) -> torch.device:
    """Where token ids go; a model spread over devices takes them anywhere."""
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def length_batches(sequences: list[list[int]], batch_size: int) -> Iterator[torch.Tensor]:
    """Batches of equally long sequences: padding would put tokens into amax that no request ever holds."""
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for ids in sequences:
        by_length[len(ids)].append(ids)
    for length, group in sorted(by_length.items()):
        size = max(1, min(batch_size, MAX_BATCH_TOKENS // length))
        for start in range(0, len(group), size):
            yield torch.tensor(group[start : start + size])


class RouterCounter:
    """Counts, per router, the tokens that each expert was chosen for."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.counts: dict[str, torch.Tensor] = {}
        self._handles = []
        for name, module in model.named_modules():
            if type(module).__name__.endswith("Llama4Router"):
                self.counts[name] = torch.zeros(module.num_experts, dtype=torch.long)
                self._handles.append(module.register_forward_hook(self._hook(name)))

    def _hook(self, name: str) -> Any:
        def count(module: Any, args: Any, output: Any) -> None:
            _, logits = output
            chosen = logits.topk(module.top_k, dim=-1).indices.flatten()
            self.counts[name] += torch.bincount(chosen, minlength=module.num_experts).cpu()

        return count

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def quantizers(model: torch.nn.Module) -> dict[str, Any]:
    """The enabled leaf quantizers by name, without those that only cast: nothing is calibrated or exported there."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    found = {n: m for n, m in model.named_modules() if isinstance(m, TensorQuantizer) and m.is_enabled}
    return {name: quantizer for name, quantizer in found.items() if not quantizer._use_constant_amax}


def calibrate(
    model: Any,
    recipe: dict[str, Any],
    sequences: list[list[int]],
    batch_size: int,
    progress: Progress,
    saved: Path | None = None,
    save_every_s: float = 60.0,
) -> dict[str, list[int]]:
    """Insert and calibrate the quantizers in place; returns the tokens that each expert of each router saw.

    `saved` is where a recipe of plain maxima keeps what it has seen so far, and resumes from.
    """
    import modelopt.torch.quantization as mtq

    batches = list(length_batches(sequences, batch_size))
    counter = RouterCounter(model)
    plain = recipe["algorithm"] in ("max", {"method": "max"})
    if plain and any(parameter.is_meta for parameter in model.parameters()):
        recipe, plain = {**recipe, "algorithm": FROM_DISK}, False
    saved = saved if plain else None
    device = first_device(model)

    def forward_loop(quantized: Any) -> None:
        seen = load_file(saved) if saved and saved.is_file() else {}
        first = int(seen.get("batches", 0))
        last_save = time.monotonic()
        for i, input_ids in enumerate(batches[first:], start=first + 1):
            quantized(input_ids=input_ids.to(device), use_cache=False)
            if i == first + 1:
                _merge(quantized, counter, seen)
            if saved and i < len(batches) and time.monotonic() - last_save >= save_every_s:
                _save(quantized, counter, i, saved)
                last_save = time.monotonic()
            progress(i, len(batches), "calibrate")

    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(model, recipe, forward_loop=forward_loop if batches else None)
    counter.close()
    if device.type == "cpu":
        rounding.lend_nvfp4(quantizers(model).values())
    return {name: counts.tolist() for name, counts in counter.counts.items()}


def _save(model: Any, counter: RouterCounter, batches_done: int, path: Path) -> None:
    maxima = {name: q._calibrator._calib_amax for name, q in quantizers(model).items() if hasattr(q, "_calibrator")}
    state = {f"amax {name}": amax.cpu().contiguous() for name, amax in maxima.items() if amax is not None}
    state |= {f"tokens {name}": counts for name, counts in counter.counts.items()}
    state["batches"] = torch.tensor(batches_done)
    save_file(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def _merge(model: Any, counter: RouterCounter, seen: Mapping[str, torch.Tensor]) -> None:
    """Add what was seen before a crash; after a batch, when every maximum already lies on its own device."""
    for name, quantizer in quantizers(model).items():
        if f"amax {name}" in seen:
            calibrator = quantizer._calibrator
            earlier = seen[f"amax {name}"].to(calibrator._calib_amax)
            calibrator._calib_amax = torch.max(calibrator._calib_amax, earlier)
    for name in counter.counts:
        counter.counts[name] += seen.get(f"tokens {name}", 0)


def share_scales(model: Any, groups: list[tuple[str, ...]]) -> None:
    """Give each fused group one weight amax and one input amax: the maximum, as the engine that fuses them would."""
    for group in groups:
        modules = [model.get_submodule(weight.removesuffix(".weight")) for weight in group]
        for role in ("weight_quantizer", "input_quantizer"):
            parts = [getattr(module, role) for module in modules]
            if not all(q.is_enabled and q.amax is not None and q.amax.numel() == 1 for q in parts):
                continue
            shared = torch.stack([q.amax.float().reshape(()) for q in parts]).max()
            for quantizer in parts:
                quantizer.amax = shared.clone().to(quantizer.amax.dtype).reshape(quantizer.amax.shape)


@torch.no_grad()
def snap_weights(model: Any, quantizers: Mapping[str, Any]) -> None:
    """Replace each FP8 weight by its exported value, so that traces of the model are traces of the export.

    modelopt multiplies by the inverse scale where the export divides: where amax makes BF16 weights fall on rounding
    ties, one in a hundred would come out a step apart. A weight that lies on disk stays as it is.
    """
    for name, quantizer in quantizers.items():
        weight, kind = coverage.quantizer_target(name)
        parameter = model.get_parameter(weight) if kind == "weight" else None
        if parameter is not None and not parameter.is_meta:
            scale = quantizer.amax.float().reshape(()) / quantizer.maxbound
            for part in parameter if parameter.ndim == 3 else [parameter]:
                part.copy_(rounding.round_e4m3(part.float(), scale))


def exported_scales(quantizers: Mapping[str, Any]) -> dict[str, float]:
    """What the export stores for each quantizer with one scale, by its exported name, in float32: amax / 448."""
    return {
        coverage.scale_name(*coverage.quantizer_target(name)): float(
            quantizer.amax.float().cpu().reshape(()) / quantizer.maxbound
        )
        for name, quantizer in quantizers.items()
    }
