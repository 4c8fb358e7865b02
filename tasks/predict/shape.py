"""What a decode step must read: the sizes of a Llama-shaped model and of its draft head, from an HF config.json.

Refuses to know time or hardware. Dense Llama, Llama 4 (interleaved MoE, shared expert, chunked attention), plain MoE
and DeepSeek's latent attention are read; anything else is named and refused. Run it: `kilotok predict SPEC`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from specs.errors import InputError
from tasks.predict.hardware import read_yaml

KNOWN_MODELS = Path(__file__).with_name("models.yaml")


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek): ranks and widths in elements; one latent per token serves all heads."""

    q_rank: int
    kv_rank: int
    rope: int
    nope: int
    value: int


@dataclass(frozen=True)
class Shape:
    """Counts of a decoder; sizes are in elements."""

    hidden: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    ffn_dense: int
    vocab: int
    moe_layers: int = 0
    ffn_expert: int = 0  # routed and shared experts
    experts: int = 0
    top_k: int = 1
    shared_experts: int = 0
    chunk: int = 0  # tokens a local layer attends to; 0: every layer is global
    global_layers: int = 0
    tied_embeddings: bool = False
    latent: Latent | None = None

    @property
    def qkv_params(self) -> int:
        if self.latent:
            a = self.latent
            down = self.hidden * (a.q_rank + a.kv_rank + a.rope)
            return down + self.q_heads * (a.q_rank * (a.nope + a.rope) + a.kv_rank * (a.nope + a.value))
        return self.hidden * (self.q_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def o_params(self) -> int:
        return self.q_heads * (self.latent.value if self.latent else self.head_dim) * self.hidden

    @property
    def dense_params(self) -> int:
        return 3 * self.hidden * self.ffn_dense

    @property
    def expert_params(self) -> int:
        return 3 * self.hidden * self.ffn_expert

    @property
    def router_params(self) -> int:
        return self.hidden * self.experts

    @property
    def head_params(self) -> int:
        return self.hidden * self.vocab

    @property
    def total_params(self) -> int:
        attention = self.layers * (self.qkv_params + self.o_params)
        dense = (self.layers - self.moe_layers) * self.dense_params
        moe = self.moe_layers * (self.expert_params * (self.shared_experts + self.experts) + self.router_params)
        return attention + dense + moe + (1 if self.tied_embeddings else 2) * self.head_params

    @property
    def active_params(self) -> int:
        """Read for one token; the input embedding is a lookup of one row and does not count."""
        attention = self.layers * (self.qkv_params + self.o_params)
        dense = (self.layers - self.moe_layers) * self.dense_params
        moe = self.moe_layers * (self.expert_params * (self.shared_experts + self.top_k) + self.router_params)
        return attention + dense + moe + self.head_params

    def distinct_experts(self, tokens: int) -> float:
        """Expected distinct routed experts of one layer when tokens route independently and uniformly."""
        if not self.experts:
            return 0.0
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)

    def kv_tokens(self, context: float) -> float:
        """KV positions read by one token, summed over layers; local layers at their worst, a full chunk."""
        local = self.layers - self.global_layers
        return self.global_layers * context + local * (min(context, self.chunk) if self.chunk else context)

    def kv_elements(self, tensor_parallel: int = 1) -> int:
        """Elements cached per token and layer on one GPU; a latent is the same on every GPU."""
        if self.latent:
            return self.latent.kv_rank + self.latent.rope
        return 2 * max(1, self.kv_heads // tensor_parallel) * self.head_dim


@dataclass(frozen=True)
class DraftShape:
    """An EAGLE-3 head: `fc` from three captured states, one layer with 2H-wide QKV input, its own lm_head."""

    ffn: int
    vocab: int
    bytes_per_weight: float = 2.0  # heads are kept in BF16

    def params(self, target: Shape) -> int:
        """All weights of the head; it shares the target's embedding."""
        block = 2 * target.qkv_params + target.o_params + 3 * target.hidden * self.ffn
        return 3 * target.hidden**2 + block + target.hidden * self.vocab


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """HF repository -> config of the models that need no download to be predicted."""
    return dict(read_yaml(KNOWN_MODELS))


def known_shape(repository: str) -> Shape:
    """Shape of a model in models.yaml. Raises InputError with the nearest name."""
    models = known_models()
    if repository in models:
        return shape_from_config(models[repository], repository)
    near = difflib.get_close_matches(repository, models, n=1, cutoff=0.3)
    nearest = f"nearest known: {near[0]}; " if near else ""
    raise InputError(
        f"the shape of {repository} is not known before its download", "model.source",
        f"{nearest}run its download stage, or add its config to tasks/predict/models.yaml",
    )  # fmt: skip


def shape_from_config(config: Mapping[str, Any], where: str = "config.json") -> Shape:
    """The shape of an HF config (llama, llama4, llama4_text, deepseek_v3, and MoE configs with the usual names)."""
    text = config.get("text_config", config)
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    if missing := [name for name in needed if name not in text]:
        raise InputError(
            f"no {', '.join(missing)}: not a Llama-shaped model",
            where,
            "predict knows llama, llama4, deepseek_v3 and MoE configs with HF's names",
        )
    layers, heads = text["num_hidden_layers"], text["num_attention_heads"]
    experts = text.get("num_local_experts") or text.get("num_experts") or text.get("n_routed_experts") or 0
    is_llama4 = str(text.get("model_type", "")).startswith("llama4")
    dense_ffn = text.get("intermediate_size_mlp", text["intermediate_size"]) if is_llama4 else text["intermediate_size"]
    return Shape(
        hidden=text["hidden_size"],
        layers=layers,
        q_heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        ffn_dense=dense_ffn,
        vocab=text["vocab_size"],
        moe_layers=_moe_layers(text, layers, is_llama4) if experts else 0,
        ffn_expert=text.get("moe_intermediate_size", text["intermediate_size"]) if experts else 0,
        experts=experts,
        top_k=text.get("num_experts_per_tok", 1),
        shared_experts=1 if is_llama4 and experts else int(text.get("n_shared_experts", 0)),
        chunk=(text.get("attention_chunk_size") or 0) if is_llama4 else 0,
        global_layers=layers - sum(_rope_layers(text, layers)) if is_llama4 else layers,
        tied_embeddings=bool(text.get("tie_word_embeddings", False)),
        latent=_latent(text),
    )


def _moe_layers(text: Mapping[str, Any], layers: int, is_llama4: bool) -> int:
    if is_llama4:
        return layers // int(text.get("interleave_moe_layer_step", 1))
    return layers - int(text.get("first_k_dense_replace", 0))


def _latent(text: Mapping[str, Any]) -> Latent | None:
    if not text.get("kv_lora_rank"):
        return None
    names = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    return Latent(*(int(text[name]) for name in names))


def _rope_layers(text: Mapping[str, Any], layers: int) -> list[int]:
    """1 for a RoPE (chunked) layer, 0 for a NoPE (global) one; HF derives the list when it is absent or empty."""
    listed = text.get("no_rope_layers")
    every = text.get("no_rope_layer_interval", 4)
    return list(listed) if listed else [int((index + 1) % every != 0) for index in range(layers)]
