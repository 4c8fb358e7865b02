"""Which tensors a recipe must quantize and which it must leave alone, from config.json and the recipe.

It refuses to look at the model: it is the second opinion that the model's own quantizers are compared with.
Run it: nothing to run; `python -m pytest tests/tasks/test_quantize_detectors.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from specs.errors import InputError

ARCHITECTURES = {
    "Llama4ForCausalLM": "",
    "Llama4ForConditionalGeneration": "language_model.",
    "LlamaForCausalLM": "",
}
# transformers has had two layouts of the multimodal names. The older is the hub's, and TensorRT-LLM's loader strips
# exactly `language_model.`; transformers 5.14 would leave a checkpoint in the newer one at random weights.
NEWER_NAMES = {
    "model.language_model.": "language_model.model.",
    "model.vision_model.": "vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
# Served in BF16 whatever a recipe says: routing flips and head errors cost more than their bytes save.
NEVER = ("router", "lm_head", "vision_model", "multi_modal_projector", "embed_tokens", "layernorm", ".norm")
FUSED_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Coverage:
    """Tensor names (as in the exported checkpoint) by what the recipe does to them."""

    weights: frozenset[str]
    inputs: frozenset[str]
    kv: frozenset[str]  # attention modules whose K and V are quantized

    @property
    def num_quantizers(self) -> int:
        """One per weight, one per input, one each for K and V."""
        return len(self.weights) + len(self.inputs) + 2 * len(self.kv)

    def without(self, blocks: Sequence[str]) -> Coverage:
        """The same with the weights of these modules left in BF16."""
        inside = tuple(f"{block}." for block in blocks)
        weights, inputs = (
            frozenset(n for n in names if not n.startswith(inside)) for names in (self.weights, self.inputs)
        )
        return replace(self, weights=weights, inputs=inputs)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of config.json; an architecture we do not know is refused by name."""
    names = config.get("architectures") or []
    if not names or names[0] not in ARCHITECTURES:
        raise InputError(
            f"architecture {names[0] if names else None!r} is not one we quantize",
            "config.json: architectures",
            f"known: {', '.join(ARCHITECTURES)}",
        )
    if config.get("quantization_config"):
        algorithm = config["quantization_config"].get("quant_algo") or config["quantization_config"].get("quant_method")
        raise InputError(
            f"the checkpoint is already quantized ({algorithm})",
            "config.json: quantization_config",
            "point model.source at the BF16 checkpoint",
        )
    return config.get("text_config") or config


def newer_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Prefixes of the newer layout and what they are called in the export; empty for a text-only model."""
    return NEWER_NAMES if ARCHITECTURES[config["architectures"][0]] else {}


def exported_name(name: str, prefixes: Mapping[str, str]) -> str:
    """The tensor's name in the export, whichever layout the source has."""
    for newer, older in prefixes.items():
        if name.startswith(newer):
            return older + name.removeprefix(newer)
    return name


def attention_modules(config: Mapping[str, Any]) -> list[str]:
    """Module names of every attention block."""
    return [f"{layer}.self_attn" for layer in _layers(config)]


def _layers(config: Mapping[str, Any]) -> list[str]:
    text = text_config(config)
    prefix = ARCHITECTURES[config["architectures"][0]]
    return [f"{prefix}model.layers.{i}" for i in range(text["num_hidden_layers"])]


def _moe_layers(config: Mapping[str, Any]) -> set[int]:
    text = text_config(config)
    if "Llama4" not in config["architectures"][0]:
        return set()
    if text.get("moe_layers") is not None:
        return set(text["moe_layers"])
    step = text.get("interleave_moe_layer_step", 1)
    return set(range(step - 1, text["num_hidden_layers"], step))


def matrices(config: Mapping[str, Any]) -> list[str]:
    """Every weight matrix multiplied in a decoder layer except the router: `<module>.weight`, or the packed experts."""
    moe = _moe_layers(config)
    mlp = "feed_forward" if "Llama4" in config["architectures"][0] else "mlp"
    names: list[str] = []
    for i, layer in enumerate(_layers(config)):
        names += [f"{layer}.self_attn.{part}_proj.weight" for part in "qkvo"]
        block = f"{layer}.{mlp}.shared_expert" if i in moe else f"{layer}.{mlp}"
        names += [f"{block}.{part}_proj.weight" for part in ("gate", "up", "down")]
        if i in moe:
            names += [f"{layer}.{mlp}.experts.{part}_proj" for part in ("gate_up", "down")]
    return names


def quantizer_name(weight: str, role: str) -> str:
    """modelopt's name of the quantizer that serves this weight matrix; role is `weight` or `input`."""
    if weight.endswith(".weight"):
        return f"{weight.removesuffix('.weight')}.{role}_quantizer"
    return f"{weight}_{role}_quantizer"


def quantizer_target(quantizer: str) -> tuple[str, str]:
    """(weight matrix, "weight" or "input"), or (K or V scale, "kv"), that this quantizer of modelopt's serves."""
    for suffix, kind in (("weight_quantizer", "weight"), ("input_quantizer", "input")):
        if quantizer.endswith(suffix):
            stem = quantizer.removesuffix(suffix)
            return (f"{stem[:-1]}.weight" if stem.endswith(".") else stem[:-1]), kind
    module, part = quantizer.rsplit(".", 1)
    return f"{module}.{part[0]}_proj.{part[0]}_scale", "kv"


def scale_name(weight: str, role: str) -> str:
    """Where an export keeps the `weight` or `input` scale of a weight matrix; a K or V scale has its own name."""
    if role == "kv":
        return weight
    role, _, suffix = role.partition("_")
    scale = f"{role}_scale_{suffix}" if suffix else f"{role}_scale"
    return f"{weight.removesuffix('.weight')}.{scale}" if weight.endswith(".weight") else f"{weight}_{scale}"


def expected(config: Mapping[str, Any], quant_cfg: Sequence[Mapping[str, Any]]) -> Coverage:
    """What `quant_cfg` (a recipe's ordered list of patterns, the last match wins) does to this architecture."""
    names = matrices(config)
    attention = attention_modules(config)
    return Coverage(
        frozenset(n for n in names if _enabled(quantizer_name(n, "weight"), quant_cfg)),
        frozenset(n for n in names if _enabled(quantizer_name(n, "input"), quant_cfg)),
        frozenset(a for a in attention if _enabled(f"{a}.k_bmm_quantizer", quant_cfg)),
    )


def formats(quant_cfg: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """FP8 (one scale per tensor) and NVFP4 (blocks of 16) as a recipe uses them; another format is refused by name."""
    found = set()
    for entry in quant_cfg:
        if entry.get("enable") is False or not entry.get("cfg"):
            continue
        steps = entry["cfg"] if isinstance(entry["cfg"], list) else [entry["cfg"]]
        blocks = steps[0].get("block_sizes")
        kind = (tuple(steps[0]["num_bits"]) if not isinstance(steps[0]["num_bits"], int) else (), bool(blocks))
        known = {((4, 3), False): "FP8", ((2, 1), True): "NVFP4"}.get(kind) if len(steps) == 1 else None
        attention = "bmm_quantizer" in entry["quantizer_name"]
        if known is None or steps[0].get("axis") is not None or (attention and known != "FP8"):
            raise InputError(
                f"the recipe's format is none we can check: num_bits {steps[0]['num_bits']}, block_sizes {blocks}",
                entry["quantizer_name"],
                "take a recipe of FP8 with one scale per tensor or of NVFP4, and FP8 for K and V",
            )
        found.add(known)
    return frozenset(found)


def _enabled(quantizer: str, quant_cfg: Sequence[Mapping[str, Any]]) -> bool:
    enabled = True  # modelopt's default for an inserted quantizer
    for entry in quant_cfg:
        if entry.get("parent_class") or not fnmatchcase(quantizer, entry.get("quantizer_name", "*")):
            continue
        cast_only = isinstance(entry.get("cfg"), dict) and entry["cfg"].get("use_constant_amax")
        enabled = entry.get("enable") is not False and not cast_only
    return enabled


def fused_groups(names: Sequence[str]) -> list[tuple[str, ...]]:
    """The weights that an engine multiplies as one matrix, grouped; only complete groups of two or more."""
    have = set(names)
    groups: list[tuple[str, ...]] = []
    for parts in FUSED_GROUPS:
        for name in names:
            if f".{parts[0]}." not in name:
                continue
            group = tuple(name.replace(f".{parts[0]}.", f".{part}.") for part in parts)
            if have.issuperset(group):
                groups.append(group)
    return groups
