"""Load the BF16 model, run a modelopt recipe over chat prompts, and watch what a recipe does not watch.

While the prompts run, hooks on the routers count tokens per expert; on prompts that were held back, hooks on the
quantizers measure what is clipped and how much noise is added. It refuses to guess a recipe: name or YAML file, as the
spec says.
Run it: nothing to run; `python -m pytest tests/tasks/test_quantize.py`.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from modelopt.recipe import load_recipe
from safetensors import safe_open

from specs.errors import InputError
from tasks.job import Progress
from tasks.quantize.detectors import TensorRow

MAX_BATCH_TOKENS = 4096


def read_recipe(recipe: str, root: Path) -> dict[str, Any]:
    """modelopt's quantize config of a recipe: a built-in name, or a YAML file beside the spec."""
    beside = root / recipe
    source: str | Path = beside if beside.is_file() else recipe
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


def non_finite_tensors(checkpoint: Path) -> list[str]:
    """Tensors of a safetensors checkpoint that hold NaN or Inf, one tensor in memory at a time."""
    bad: list[str] = []
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            bad += [name for name in file.keys() if not torch.isfinite(file.get_tensor(name).float()).all()]  # noqa: SIM118
    return bad


def length_batches(sequences: list[list[int]], max_tokens: int = MAX_BATCH_TOKENS) -> Iterator[torch.Tensor]:
    """Batches of equally long sequences: padding would put tokens into amax that no request ever holds."""
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for ids in sequences:
        by_length[len(ids)].append(ids)
    for length, group in sorted(by_length.items()):
        size = max(1, max_tokens // length)
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
    """The enabled leaf quantizers by name."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    return {n: m for n, m in model.named_modules() if isinstance(m, TensorQuantizer) and m.is_enabled}


def calibrate(
    model: Any, recipe: dict[str, Any], sequences: list[list[int]], progress: Progress
) -> dict[str, list[int]]:
    """Insert and calibrate the quantizers in place; returns the tokens that each expert of each router saw."""
    import modelopt.torch.quantization as mtq

    batches = list(length_batches(sequences))
    counter = RouterCounter(model)

    def forward_loop(quantized: Any) -> None:
        for i, input_ids in enumerate(batches):
            quantized(input_ids=input_ids, use_cache=False)
            progress(i + 1, len(batches), "calibrate")

    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(model, recipe, forward_loop=forward_loop if batches else None)
    counter.close()
    return {name: counts.tolist() for name, counts in counter.counts.items()}


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
def snap_weights(model: Any) -> None:
    """Replace each per-tensor FP8 weight by its quantizer's value, so that the export cannot round it otherwise.

    modelopt multiplies in calibration and divides in export. Where amax makes BF16 weights fall on rounding ties, up to
    1% of a tensor's elements would come out one step apart.
    """
    for name, quantizer in quantizers(model).items():
        module, attribute = name.rsplit(".", 1)
        if not attribute.endswith("weight_quantizer") or quantizer.num_bits != (4, 3) or quantizer.amax.numel() != 1:
            continue
        weight = getattr(model.get_submodule(module), attribute.removesuffix("_quantizer").removesuffix("_weight"))
        weight.copy_(quantizer(weight))


class NoiseMeter:
    """Signal, noise and clipping at every enabled quantizer while it is open."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._sums: dict[str, list[float]] = {}
        self._quantizers = quantizers(model)
        self._handles = [q.register_forward_hook(self._hook(name)) for name, q in self._quantizers.items()]

    def _hook(self, name: str) -> Any:
        def measure(quantizer: Any, args: Any, output: torch.Tensor) -> None:
            if name.endswith("weight_quantizer") and name in self._sums:
                return  # the same weight at every call
            x = args[0].float()
            sums = self._sums.setdefault(name, [0.0, 0.0, 0.0, 0.0])
            sums[0] += float(x.square().sum())
            sums[1] += float((x - output.float()).square().sum())
            clipped = (x.abs() > quantizer.amax.float().max() * (1 + 1e-6)).sum() if quantizer.amax is not None else 0
            sums[2] += float(clipped)
            sums[3] += float((x != 0).sum())  # experts are fed zeros for tokens that were not routed to them

        return measure

    def close(self) -> list[TensorRow]:
        """The table's rows; a quantizer that was never called has no row, which `check_quantizers` notices."""
        for handle in self._handles:
            handle.remove()
        rows = []
        for name, (signal, noise, clipped, total) in self._sums.items():
            quantizer = self._quantizers[name]
            amax = float(quantizer.amax.float().max()) if quantizer.amax is not None else math.nan
            sqnr = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else (199.0 if signal > 0 else 0.0)
            rows.append(
                TensorRow(*_row_name(name), amax / float(quantizer.maxbound), amax, sqnr, clipped / max(total, 1.0))
            )
        return rows


def _row_name(quantizer: str) -> tuple[str, str]:
    for suffix, kind in (("weight_quantizer", "weight"), ("input_quantizer", "input")):
        if quantizer.endswith(suffix):
            stem = quantizer.removesuffix(suffix)
            return (f"{stem[:-1]}.weight" if stem.endswith(".") else stem[:-1]), kind
    module, part = quantizer.rsplit(".", 1)
    return f"{module}.{part[0]}_proj.{part[0]}_scale", "kv"
