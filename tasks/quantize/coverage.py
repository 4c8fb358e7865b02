"""Which tensors a recipe must quantize and which it must leave alone, from config.json and the recipe.

It refuses to look at the model: it is the second opinion that the model's own quantizers are compared with.
Run it: nothing to run; `python -m pytest tests/tasks/test_quantize_detectors.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from specs.errors import InputError

ARCHITECTURES = {
    "Llama4ForCausalLM": "",
    "Llama4ForConditionalGeneration": "language_model.",
    "LlamaForCausalLM": "",
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


def expected(config: Mapping[str, Any], quant_cfg: Sequence[Mapping[str, Any]]) -> Coverage:
    """What `quant_cfg` (a recipe's ordered list of patterns, the last match wins) does to this architecture."""
    names = matrices(config)
    attention = attention_modules(config)
    return Coverage(
        frozenset(n for n in names if _enabled(quantizer_name(n, "weight"), quant_cfg)),
        frozenset(n for n in names if _enabled(quantizer_name(n, "input"), quant_cfg)),
        frozenset(a for a in attention if _enabled(f"{a}.k_bmm_quantizer", quant_cfg)),
    )


def _enabled(quantizer: str, quant_cfg: Sequence[Mapping[str, Any]]) -> bool:
    enabled = True  # modelopt's default for an inserted quantizer
    for entry in quant_cfg:
        if entry.get("parent_class") or not fnmatchcase(quantizer, entry.get("quantizer_name", "*")):
            continue
        enabled = entry.get("enable") is not False
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
