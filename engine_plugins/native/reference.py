"""The model in plain torch fp32: Llama 4 text decoder and EAGLE-3 head, composed from the ops' references.

What it is: the oracle for the C++ engine, and its stand-in where no compiler is found (slow: it recomputes the
sequence).
What it refuses to be: fast, or clever about memory; every weight is fp32.
Run it: `python -m pytest tests/engine_plugins/test_reference.py`.
Legend: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from engine_plugins.native.checkpoint import DraftConfig, ModelConfig, Tensors, read_draft_config, read_model_config
from engine_plugins.ops.allreduce_rmsnorm.reference import rmsnorm
from engine_plugins.ops.attention_decode.reference import attention_decode
from engine_plugins.ops.fc13_swiglu.reference import fc13_swiglu
from engine_plugins.ops.formats import Linear, fake_quantize_e4m3
from engine_plugins.ops.moe_top1.reference import moe_top1
from engine_plugins.ops.qkv_attn_scaling.reference import qkv_attn_scaling


class TensorSource(Protocol):
    """Where weights come from: a checkpoint's files, or a bundle unpacked."""

    def __contains__(self, name: str) -> bool: ...
    def names(self) -> list[str]: ...
    def float32(self, name: str) -> np.ndarray: ...
    def raw(self, name: str) -> np.ndarray: ...
    def scalar(self, name: str, default: float | None = None) -> float | None: ...


def _linear(tensors: TensorSource, name: str) -> Linear:
    weight = torch.from_numpy(tensors.float32(f"{name}.weight").copy())
    if f"{name}.weight_scale" in tensors:
        scale = torch.from_numpy(tensors.float32(f"{name}.weight_scale").copy()).reshape(-1, 1)
        weight = weight * scale
    return Linear(weight, tensors.scalar(f"{name}.input_scale"))


def _experts(tensors: TensorSource, prefix: str, count: int) -> list[tuple[Linear, Linear, Linear]]:
    """Packed [E, in, 2*inter] (gate first) and [E, inter, in], with one scale for all experts or one each."""
    packed: dict[str, tuple[torch.Tensor, float | None]] = {}
    for name in ("gate_up_proj", "down_proj"):
        weight = torch.from_numpy(tensors.float32(f"{prefix}.{name}").copy())
        if f"{prefix}.{name}_weight_scale" in tensors:
            scale = torch.from_numpy(tensors.float32(f"{prefix}.{name}_weight_scale").copy()).reshape(-1)
            weight = weight * (scale.view(-1, 1, 1) if scale.numel() > 1 else scale)
        packed[name] = (weight, tensors.scalar(f"{prefix}.{name}_input_scale"))
    experts = []
    for index in range(count):
        gate, up = packed["gate_up_proj"][0][index].T.chunk(2, dim=0)
        input_scale, down = packed["gate_up_proj"][1], packed["down_proj"]
        experts.append((Linear(gate, input_scale), Linear(up, input_scale), Linear(down[0][index].T, down[1])))
    return experts


class ReferenceModel:
    """Teacher-forced forward passes of a checkpoint directory (BF16, or modelopt's FP8 export) and its draft."""

    def __init__(self, config: ModelConfig, tensors: TensorSource) -> None:
        self.config, self.tensors = config, tensors
        self.draft: DraftReference | None = None
        self.cache_bfloat16 = False  # keep K and V as the engine's BF16 cache does, instead of fp32
        self.inv_freq = torch.tensor(self.config.rope_inv_freq)
        self.embed = self._tensor("model.embed_tokens.weight")
        head = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        self.lm_head = self._tensor(head)
        self.layers = [self._load_layer(i) for i in range(self.config.num_layers)]
        self.norm = self._tensor("model.norm.weight")

    @classmethod
    def from_checkpoint(cls, checkpoint: Path, draft: Path | None = None) -> ReferenceModel:
        """Load a Hugging Face directory (BF16 or modelopt FP8) and, optionally, an EAGLE-3 draft directory."""
        model = cls(read_model_config(Path(checkpoint)), Tensors(Path(checkpoint)))
        if draft:
            model.draft = DraftReference(read_draft_config(Path(draft), model.config), Tensors(Path(draft)), model)
        return model

    def _tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.tensors.float32(name).copy())

    def _load_layer(self, index: int) -> dict[str, Any]:
        prefix = f"model.layers.{index}"
        layer: dict[str, Any] = {
            name: self._tensor(f"{prefix}.{name}.weight") for name in ("input_layernorm", "post_attention_layernorm")
        }
        for name in ("q", "k", "v", "o"):
            layer[name] = _linear(self.tensors, f"{prefix}.self_attn.{name}_proj")
        for name in ("k_scale", "v_scale"):
            layer[name] = self.tensors.scalar(f"{prefix}.self_attn.{name[0]}_proj.{name}")
        block = "feed_forward" if self.config.rope_interleaved else "mlp"
        dense = f"{prefix}.{block}" + (".shared_expert" if index in self.config.moe_layers else "")
        layer["mlp"] = tuple(_linear(self.tensors, f"{dense}.{name}_proj") for name in ("gate", "up", "down"))
        if index in self.config.moe_layers:
            layer["router"] = self._tensor(f"{prefix}.feed_forward.router.weight")
            layer["experts"] = _experts(self.tensors, f"{prefix}.feed_forward.experts", self.config.num_experts)
        return layer

    def _attention(self, index: int, x_TH: torch.Tensor) -> torch.Tensor:
        config, layer = self.config, self.layers[index]
        rope = config.rope_layers[index]
        position_T = torch.arange(x_TH.shape[0])
        q, k, v = qkv_attn_scaling(
            x_TH,
            layer["q"],
            layer["k"],
            layer["v"],
            position_T,
            head_dim=config.head_dim,
            inv_freq=self.inv_freq if rope else None,
            interleaved=config.rope_interleaved,
            qk_norm_eps=config.rms_norm_eps if config.use_qk_norm else None,
            temperature=(config.floor_scale, config.attn_scale) if config.attn_temperature_tuning else None,
        )
        k, v = fake_quantize_e4m3(k, layer["k_scale"]), fake_quantize_e4m3(v, layer["v_scale"])
        if self.cache_bfloat16:
            k, v = k.bfloat16().float(), v.bfloat16().float()
        chunk = config.attention_chunk_size if rope else 0
        return layer["o"](attention_decode(q, k, v, position_T, chunk).flatten(1))

    @torch.no_grad()
    def forward(self, token_ids: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits [T, V] and each layer's output [T, H] (the residual stream after the layer)."""
        hidden_TH, outputs = self.embed[torch.as_tensor(list(token_ids))], []
        eps = self.config.rms_norm_eps
        for index, layer in enumerate(self.layers):
            hidden_TH = hidden_TH + self._attention(index, rmsnorm(hidden_TH, layer["input_layernorm"], eps))
            x_TH = rmsnorm(hidden_TH, layer["post_attention_layernorm"], eps)
            if index in self.config.moe_layers:
                hidden_TH = hidden_TH + moe_top1(x_TH, layer["router"], layer["experts"], layer["mlp"])
            else:
                gate, up, down = layer["mlp"]
                hidden_TH = hidden_TH + down(fc13_swiglu(x_TH, gate, up))
            outputs.append(hidden_TH)
        return rmsnorm(hidden_TH, self.norm, eps) @ self.lm_head.T, outputs

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """[T, V] float32."""
        return self.forward(token_ids)[0].numpy()


class DraftReference:
    """The EAGLE-3 head. Row i sees the target's features of position i and the embedding of token i+1."""

    def __init__(self, config: DraftConfig, tensors: TensorSource, target: ReferenceModel) -> None:
        self.target, self.config = target, config
        self.inv_freq = torch.tensor(self.config.rope_inv_freq)
        layer = "midlayer" if "midlayer.hidden_norm.weight" in tensors else "layers.0"
        self.weights = {}
        for name in tensors.names():
            short = name.removeprefix("model.").removeprefix(f"{layer}.").removesuffix(".weight")
            if short != "d2t":
                self.weights[short] = torch.from_numpy(tensors.float32(name).copy())
        offsets = (
            tensors.raw("d2t").astype(np.int64)
            if "d2t" in tensors
            else np.zeros(self.config.draft_vocab_size, np.int64)
        )
        self.to_target = torch.from_numpy(np.arange(self.config.draft_vocab_size) + offsets)
        self.embed = self.weights.get("embed_tokens", target.embed)
        self.lm_head = self.weights.get("lm_head", target.lm_head)

    def combine(self, layer_outputs: list[torch.Tensor]) -> torch.Tensor:
        """Features [T, 3H] of the captured layers -> [T, H]."""
        features = torch.cat([layer_outputs[i] for i in self.config.capture_layers], dim=-1)
        return features @ self.weights["fc"].T

    @torch.no_grad()
    def forward(self, next_tokens: Sequence[int], hidden_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft logits [T, draft V] and the hidden state before the last norm [T, H] (what the next chain step
        eats)."""
        config, w = self.config, self.weights
        rows, eps = hidden_TH.shape[0], config.rms_norm_eps
        position_T = torch.arange(rows)
        embed_TH = self.embed[torch.as_tensor(list(next_tokens))]
        normed_TH = rmsnorm(hidden_TH, w["input_layernorm"], eps) if config.normalize_hidden_twice else hidden_TH
        x = torch.cat((rmsnorm(embed_TH, w["input_layernorm"], eps), rmsnorm(normed_TH, w["hidden_norm"], eps)), dim=-1)
        q, k, v = qkv_attn_scaling(
            x,
            Linear(w["self_attn.q_proj"]),
            Linear(w["self_attn.k_proj"]),
            Linear(w["self_attn.v_proj"]),
            position_T,
            head_dim=config.head_dim,
            inv_freq=self.inv_freq,
            interleaved=False,
            qk_norm_eps=None,
            temperature=None,
        )
        if self.target.cache_bfloat16:
            k, v = k.bfloat16().float(), v.bfloat16().float()
        hidden_TH = hidden_TH + attention_decode(q, k, v, position_T).flatten(1) @ w["self_attn.o_proj"].T
        x = rmsnorm(hidden_TH, w["post_attention_layernorm"], eps)
        gated = F.silu(x @ w["mlp.gate_proj"].T) * (x @ w["mlp.up_proj"].T)
        hidden_TH = hidden_TH + gated @ w["mlp.down_proj"].T
        return rmsnorm(hidden_TH, w["norm"], eps) @ self.lm_head.T, hidden_TH

    def chain(self, token_ids: Sequence[int], layer_outputs: list[torch.Tensor], num_drafts: int) -> list[torch.Tensor]:
        """Logits of each of `num_drafts` greedy chain steps. `token_ids` has one token more than the features have
        rows."""
        hidden_TH, tokens, steps = self.combine(layer_outputs), list(token_ids[1:]), []
        for _ in range(num_drafts):
            logits, out_TH = self.forward(tokens, hidden_TH)
            steps.append(logits[-1])
            tokens.append(int(self.to_target[int(logits[-1].argmax())]))
            hidden_TH = torch.cat((hidden_TH, out_TH[-1:]))
        return steps
