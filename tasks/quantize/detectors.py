"""What can go wrong in a quantized checkpoint without anyone noticing, one small pure function per fault.

Each takes plain tables and raises IntegrityError naming the tensor. They refuse to repair: a checkpoint is right or
not. Each has a test that injects its fault. Run it: `python -m pytest tests/tasks/test_quantize_detectors.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from specs.errors import IntegrityError
from tasks.quantize.coverage import NEVER, Coverage, scale_name

SMALLEST_NORMAL = 1.1754943508222875e-38  # float32; what is below loses bits, and GPUs flush it to zero
SATURATION_LIMIT = 0.01  # share of elements clipped; per-tensor max calibration clips none of the data it saw
# Relative L2 against the traced model: one layer given the same input, and the logits of a free run. Measured on random
# checkpoints: 1e-7 when traced in FP32, 1e-3 where roundings tie; 0.06 and 0.08 when traced in BF16, whose own rounding
# flips every twentieth FP8 rounding after it.
LAYER_TOLERANCE, BF16_LAYER_TOLERANCE = 0.01, 0.15
LOGIT_TOLERANCE, BF16_LOGIT_TOLERANCE = 0.1, 0.3


@dataclass(frozen=True)
class TensorRow:
    """One quantized tensor: a weight, the input of a matrix product, or K or V on its way into the cache."""

    name: str
    kind: str  # weight | input | kv
    scale: float
    amax: float
    sqnr_db: float
    saturation_share: float


def check_expert_tokens(routed: Mapping[str, Iterable[int]]) -> None:
    """`routed[router] = tokens per expert`. modelopt feeds every token to every expert, so only the router knows."""
    for router, counts in routed.items():
        starved = [expert for expert, tokens in enumerate(counts) if tokens == 0]
        if starved:
            raise IntegrityError(
                f"experts {starved} saw no calibration token",
                router,
                "calibrate on more, or more varied, prompts (quantize.calibration.samples)",
            )


def check_scales(rows: Iterable[TensorRow]) -> None:
    """Zero, NaN, infinite and denormal scales."""
    for row in rows:
        if math.isnan(row.scale) or math.isinf(row.scale):
            raise IntegrityError(
                f"{row.kind} scale is {row.scale}", row.name, "look for NaN or Inf in this layer's activations"
            )
        if row.scale == 0:
            raise IntegrityError(f"{row.kind} scale is zero", row.name, "the tensor was all zeros in calibration")
        if row.scale < SMALLEST_NORMAL:
            raise IntegrityError(
                f"{row.kind} scale {row.scale:.3g} is negative or denormal", row.name, "check its amax"
            )


def check_saturation(rows: Iterable[TensorRow], limit: float = SATURATION_LIMIT) -> None:
    """Share of elements beyond the representable range, on data that did not set the scale."""
    for row in rows:
        if not row.saturation_share <= limit:  # also catches NaN
            raise IntegrityError(
                f"{row.saturation_share:.2%} of the {row.kind} saturates, the limit is {limit:.2%}",
                row.name,
                "calibrate on more prompts, or keep this layer in BF16",
            )


def check_quantizers(enabled: Iterable[str], wanted: Coverage) -> None:
    """The model's enabled quantizers against the number the config and the recipe ask for."""
    found = sorted(enabled)
    if len(found) != wanted.num_quantizers:
        raise IntegrityError(
            f"{len(found)} quantizers are enabled, {wanted.num_quantizers} expected",
            found[0] if found else "no quantizer",
            "the recipe's patterns and the model's module names do not meet",
        )


def check_excluded(quantized: Iterable[str], wanted: Coverage) -> None:
    """Exported FP8 tensors against the ones that must be and the ones that never may be."""
    have = set(quantized)
    for name in sorted(have):
        if any(part in name for part in NEVER):
            raise IntegrityError("must stay in BF16 but is quantized", name, "exclude it in the recipe")
    for name in sorted(have - wanted.weights):
        raise IntegrityError("is quantized but the recipe does not ask for it", name, "check the recipe's patterns")
    for name in sorted(wanted.weights - have):
        raise IntegrityError("should be quantized but is not", name, "check the recipe's patterns")


def check_kv_scales(exported: Iterable[str], wanted: Coverage) -> None:
    """Every attention block with a quantized cache carries its K and V scale; without, engines silently use 1.0."""
    have = set(exported)
    for attention in sorted(wanted.kv):
        for part in "kv":
            name = f"{attention}.{part}_proj.{part}_scale"
            if name not in have:
                raise IntegrityError(
                    "KV-cache scale is missing from the export", name, "was the recipe's kv part applied?"
                )


def check_input_scales(exported: Iterable[str], wanted: Coverage) -> None:
    """A missing input scale turns static quantization into dynamic in the engine, which breaks its fused kernels."""
    have = set(exported)
    for weight in sorted(wanted.inputs):
        name = scale_name(weight, "input")
        if name not in have:
            raise IntegrityError("input scale is missing from the export", name, "was this layer calibrated?")


def check_shared_scales(scales: Mapping[str, float], groups: Iterable[tuple[str, ...]]) -> None:
    """q/k/v and gate/up share both scales, so an engine that fuses them re-quantizes to the same bytes."""
    for group in groups:
        for role in ("weight", "weight_2", "input"):
            names = [scale_name(weight, role) for weight in group]
            found = {scales[name] for name in names if name in scales}
            if len(found) > 1:
                raise IntegrityError(
                    f"{role} scales of a fused group differ: {sorted(found)}", names[0], "share them at export"
                )


def check_finite(bad: Iterable[str], where: str) -> None:
    """`bad` are the tensors that hold NaN or Inf."""
    for name in bad:
        raise IntegrityError(f"the {where} holds NaN or Inf", name, "the checkpoint is damaged; download it again")


def check_reload(
    layers: Mapping[str, Sequence[float]], logits: Sequence[float], where: str, precise: bool = True
) -> None:
    """The exported checkpoint, read back without modelopt, against the model exported: relative differences per prompt.

    Layers are compared on equal inputs, so that a fault is found where it is; `logits` is the free run. The median
    judges: a value on a rounding tie may flip in one prompt, a lost tensor changes all of them. `precise`: traced in
    FP32.
    """
    limit, logit_limit = LAYER_TOLERANCE, LOGIT_TOLERANCE
    if not precise:
        limit, logit_limit = BF16_LAYER_TOLERANCE, BF16_LOGIT_TOLERANCE
    for name, differences in layers.items():
        if not _median(differences) <= limit:
            raise IntegrityError(
                f"the reloaded layer differs by {_median(differences):.2g} (relative), limit {limit:.2g}",
                f"{where}: {name}",
                "the export lost or changed a tensor of this layer; do not serve it",
            )
    if not _median(logits) <= logit_limit:
        raise IntegrityError(
            f"reloaded logits differ by {_median(logits):.2g} (relative), limit {logit_limit:.2g}",
            where,
            "the export lost or changed a tensor; do not serve it",
        )


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
