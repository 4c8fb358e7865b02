"""Random weights in real shapes: checkpoints for the native engine, and the same shape as GGUF for llama.cpp.

What it is: Llama 3 shapes (both engines run them), one rank of Maverick at TP8 with fewer layers, EAGLE-3 heads. Speed
does not depend on the values; acceptance does, so benches force it and say so.
What it refuses to be: a model that answers anything.
Run it: engine_cpu.py imports it; llamacpp_cpu.py runs `write_gguf` with llama.cpp's own Python.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes. `experts` > 0: every second layer is a mixture of that many, each `expert_width` wide."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    vocab: int
    experts: int = 0
    expert_width: int = 0

    @property
    def read_parameters(self) -> int:
        """Parameters that a token of a dense shape reads: all but the embedding."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.width) + self.hidden * self.vocab


SHAPE_7M = Shape("dense 7M", 256, 8, 8, 4, 32, 768, 1024)
SHAPE_260M = Shape("dense 260M", 1024, 16, 16, 4, 64, 4096, 8192)
# One of 8 ranks; 4 layers of 48 and 16 experts of 128, which read as many bytes per token and layer as the real ones.
MAVERICK_RANK = Shape("Maverick rank", 5120, 4, 5, 1, 128, 2048, 25248, experts=16, expert_width=1024)


class Writer:
    """Collects tensors and writes one safetensors file."""

    def __init__(self, fp8: bool) -> None:
        self.rng, self.fp8 = np.random.default_rng(0), fp8
        self.tensors: dict[str, tuple[str, np.ndarray]] = {}

    def _bf16(self, *shape: int, scale: float) -> np.ndarray:
        values = self.rng.standard_normal(shape, dtype=np.float32)
        values *= scale
        return (values.view(np.uint32) >> 16).astype(np.uint16)

    def vector(self, name: str, size: int) -> None:
        self.tensors[name] = ("BF16", np.full(size, 0x3F80, np.uint16))  # ones

    def matrix(self, name: str, *shape: int, fan_in: int, fp8: bool | None = None, inputs: bool = True) -> None:
        """A weight; in FP8 with its scales, `inputs` False for weights alone."""
        dot = "." if name.endswith(".weight") else "_"
        stem = name.removesuffix(".weight")
        if not (self.fp8 if fp8 is None else fp8):
            self.tensors[name] = ("BF16", self._bf16(*shape, scale=fan_in**-0.5))
            return
        codes = self.rng.integers(0, 0x70, shape, dtype=np.uint8) | (
            self.rng.integers(0, 2, shape, dtype=np.uint8) << 7
        )
        self.tensors[name] = ("F8_E4M3", codes)
        self.tensors[f"{stem}{dot}weight_scale"] = ("F32", np.array(fan_in**-0.5 / 80, np.float32))
        if inputs:
            self.tensors[f"{stem}{dot}input_scale"] = ("F32", np.array(0.02, np.float32))

    def save(self, directory: Path, config: dict[str, Any]) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        header, offset = {}, 0
        for name, (dtype, array) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
            offset += array.nbytes
        text = json.dumps(header).encode()
        with (directory / "model.safetensors").open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for _, array in self.tensors.values():
                stream.write(array.tobytes())
        (directory / "config.json").write_text(json.dumps(config))
        return directory


def _attention(w: Writer, prefix: str, s: Shape, inputs: int, fp8: bool | None = None, scales: bool = True) -> None:
    for part, heads in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads)):
        w.matrix(f"{prefix}.{part}_proj.weight", heads * s.head_dim, inputs, fan_in=inputs, fp8=fp8, inputs=scales)
    width = s.heads * s.head_dim
    w.matrix(f"{prefix}.o_proj.weight", s.hidden, width, fan_in=width, fp8=fp8, inputs=scales)


def _mlp(w: Writer, prefix: str, hidden: int, width: int, fp8: bool | None = None, scales: bool = True) -> None:
    for part in ("gate", "up"):
        w.matrix(f"{prefix}.{part}_proj.weight", width, hidden, fan_in=hidden, fp8=fp8, inputs=scales)
    w.matrix(f"{prefix}.down_proj.weight", hidden, width, fan_in=width, fp8=fp8, inputs=scales)


def write_target(directory: Path, s: Shape, fp8: bool) -> Path:
    """A checkpoint of this shape: Llama 3 when dense, Llama 4 with experts; FP8 as modelopt exports it, KV included."""
    w = Writer(fp8)
    moe = tuple(range(1, s.layers, 2)) if s.experts else ()
    w.matrix("model.embed_tokens.weight", s.vocab, s.hidden, fan_in=1, fp8=False)
    for i in range(s.layers):
        layer = f"model.layers.{i}"
        (
            w.vector(f"{layer}.input_layernorm.weight", s.hidden),
            w.vector(f"{layer}.post_attention_layernorm.weight", s.hidden),
        )
        _attention(w, f"{layer}.self_attn", s, s.hidden)
        if fp8:
            for part in "kv":
                w.tensors[f"{layer}.self_attn.{part}_proj.{part}_scale"] = ("F32", np.array(0.02, np.float32))
        mlp = f"{layer}.feed_forward" if s.experts else f"{layer}.mlp"
        if i in moe:
            w.matrix(f"{mlp}.router.weight", s.experts, s.hidden, fan_in=s.hidden, fp8=False)
            w.matrix(f"{mlp}.experts.gate_up_proj", s.experts, s.hidden, 2 * s.expert_width, fan_in=s.hidden)
            w.matrix(f"{mlp}.experts.down_proj", s.experts, s.expert_width, s.hidden, fan_in=s.expert_width)
            _mlp(w, f"{mlp}.shared_expert", s.hidden, s.expert_width)
        else:
            _mlp(w, mlp, s.hidden, s.width)
    w.vector("model.norm.weight", s.hidden)
    w.matrix("lm_head.weight", s.vocab, s.hidden, fan_in=s.hidden, fp8=False)
    config = {
        "model_type": "llama4_text" if s.experts else "llama",
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "intermediate_size": s.expert_width if s.experts else s.width,
        "vocab_size": s.vocab,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
    }
    if s.experts:
        config |= {"intermediate_size_mlp": s.width, "num_local_experts": s.experts, "moe_layers": list(moe)}
        config |= {"use_qk_norm": False, "attention_chunk_size": 8192}
    return w.save(directory, config)


def write_draft(directory: Path, s: Shape, fp8: bool, draft_vocab: int) -> Path:
    """An EAGLE-3 head for the shape with the target's own width; FP8 means weights only."""
    w = Writer(fp8)
    w.matrix("fc.weight", s.hidden, 3 * s.hidden, fan_in=3 * s.hidden, inputs=False)
    for name in ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm"):
        w.vector(f"{name}.weight", s.hidden)
    _attention(w, "midlayer.self_attn", s, 2 * s.hidden, scales=False)
    _mlp(w, "midlayer.mlp", s.hidden, s.width, scales=False)
    w.matrix("lm_head.weight", draft_vocab, s.hidden, fan_in=s.hidden, inputs=False)
    config = {
        "hidden_size": s.hidden,
        "intermediate_size": s.width,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "vocab_size": s.vocab,
        "draft_vocab_size": draft_vocab,
        "eagle3_layers_to_capture": [1, s.layers // 2, s.layers - 1],
    }
    return w.save(directory, config)


def write_gguf(path: Path, s: Shape, quantization: str) -> None:
    """The dense shape for llama.cpp; `quantization` is F16 or Q8_0, norms are F32."""
    import gguf

    kind = gguf.GGMLQuantizationType[quantization]
    out, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    out.add_block_count(s.layers), out.add_context_length(2048), out.add_embedding_length(s.hidden)
    out.add_feed_forward_length(s.width), out.add_head_count(s.heads), out.add_head_count_kv(s.kv_heads)
    out.add_key_length(s.head_dim), out.add_value_length(s.head_dim), out.add_rope_dimension_count(s.head_dim)
    out.add_layer_norm_rms_eps(1e-5), out.add_vocab_size(s.vocab), out.add_tokenizer_model("no_vocab")

    def matrix(name: str, n: int, k: int) -> None:
        values = rng.standard_normal((n, k), dtype=np.float32) * k**-0.5
        data = values.astype(np.float16) if quantization == "F16" else gguf.quants.quantize(values, kind)
        out.add_tensor(name, data, raw_dtype=kind)

    def ones(name: str) -> None:
        out.add_tensor(name, np.ones(s.hidden, np.float32))

    matrix("token_embd.weight", s.vocab, s.hidden)
    for i in range(s.layers):
        ones(f"blk.{i}.attn_norm.weight"), ones(f"blk.{i}.ffn_norm.weight")
        for part, heads in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads)):
            matrix(f"blk.{i}.attn_{part}.weight", heads * s.head_dim, s.hidden)
        matrix(f"blk.{i}.attn_output.weight", s.hidden, s.heads * s.head_dim)
        matrix(f"blk.{i}.ffn_gate.weight", s.width, s.hidden), matrix(f"blk.{i}.ffn_up.weight", s.width, s.hidden)
        matrix(f"blk.{i}.ffn_down.weight", s.hidden, s.width)
    ones("output_norm.weight")
    matrix("output.weight", s.vocab, s.hidden)
    out.write_header_to_file(), out.write_kv_data_to_file(), out.write_tensors_to_file(), out.close()
