"""From checkpoint tensors to bundle tensors: fuse, reorder, pack, and refuse what would serve garbage.

What it is: `pack_target` and `pack_draft`; each returns {bundle name: array} and {matrix name: [N, K] before padding}.
What it refuses to be: tolerant. NaN or infinity in a weight, a zero scale, or fused parts with different input
scales raise.
Run it: `python -m pytest tests/engine_plugins/test_bundle.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine_plugins.native.checkpoint import DraftConfig, ModelConfig, Tensors
from engine_plugins.native.layout import alternate, interleave_halves, pack, round_up, to_bfloat16
from specs.errors import IntegrityError

Arrays = dict[str, np.ndarray]
Shapes = dict[str, list[int]]


def _values(tensors: Tensors, name: str) -> np.ndarray:
    """FP8 bits as uint8, everything else as BF16 bits; refuses NaN and infinity."""
    raw, dtype = tensors.raw(name), tensors.dtype(name)
    if dtype == "F8_E4M3":
        bad = bool(((raw & 0x7F) == 0x7F).any())
    elif dtype == "BF16":
        bad = bool(((raw & 0x7F80) == 0x7F80).any())
    else:
        values = tensors.float32(name)
        bad = not bool(np.isfinite(values).all())
        raw = to_bfloat16(values)
    if bad:
        raise IntegrityError(f"{name} holds NaN or infinity", tensors.where, "the checkpoint is broken; make it again")
    return raw


def _float(tensors: Tensors, name: str) -> np.ndarray:
    values = tensors.float32(name)
    if not np.isfinite(values).all():
        raise IntegrityError(f"{name} holds NaN or infinity", tensors.where, "the checkpoint is broken; make it again")
    return np.ascontiguousarray(values, dtype=np.float32)


def _scale(tensors: Tensors, name: str) -> np.ndarray:
    scale = _float(tensors, name).reshape(-1)
    if not (scale > 0).all():
        raise IntegrityError(f"{name} is not positive", tensors.where, "calibrate the checkpoint again")
    return scale


def _shared_input_scale(tensors: Tensors, names: Sequence[str]) -> float | None:
    present = [name for name in names if name in tensors]
    if not present:
        return None
    scales = {float(_scale(tensors, name)[0]) for name in present}
    if len(present) != len(names) or len(scales) != 1:
        raise IntegrityError(
            f"input scales differ: {', '.join(names)}",
            tensors.where,
            "parts that share an input must share its scale; export with modelopt's unified export",
        )
    return scales.pop()


class Packer:
    """Collects one bundle file's arrays."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors, self.arrays, self.shapes = tensors, {}, {}  # type: Tensors, Arrays, Shapes

    def vector(self, out: str, name: str) -> None:
        """A norm weight, kept in fp32."""
        self.arrays[out] = _float(self.tensors, name)

    def matrix(self, out: str, parts: Sequence[str], order: np.ndarray | None = None, gated: bool = False) -> None:
        """Linear layers `parts` fused by rows (or alternating, when gated) into one packed matrix with its scales."""
        t = self.tensors
        weights = [_values(t, f"{part}.weight") for part in parts]
        if len({w.dtype for w in weights}) != 1:
            raise IntegrityError(f"{out}: parts mix FP8 and BF16", t.where, "quantize all of them or none")
        scales = [self._row_scales(part, w.shape[0], w.dtype) for part, w in zip(parts, weights, strict=False)]
        fuse = alternate if gated else lambda *w: np.concatenate(w)
        weight, scale = fuse(*weights), fuse(*scales)
        if order is not None:
            weight, scale = weight[order], scale[order]
        input_scale = _shared_input_scale(t, [f"{p}.input_scale" for p in parts])
        self.put(out, weight, scale, input_scale)

    def _row_scales(self, part: str, rows: int, dtype: np.dtype) -> np.ndarray:
        if dtype != np.uint8:
            return np.ones(rows, np.float32)
        if f"{part}.weight_scale" not in self.tensors:
            raise IntegrityError(f"{part}.weight_scale is missing", self.tensors.where, "export with modelopt again")
        return np.broadcast_to(_scale(self.tensors, f"{part}.weight_scale"), (rows,)).astype(np.float32)

    def put(self, out: str, weight: np.ndarray, scale: np.ndarray, input_scale: float | None) -> None:
        """Store one [N, K] (or [E, N, K]) weight with its row scales."""
        stack = weight if weight.ndim == 3 else weight[None]
        packed = np.stack([pack(w) for w in stack])
        self.arrays[out] = packed if weight.ndim == 3 else packed[0]
        self.shapes[out] = list(weight.shape)
        if weight.dtype == np.uint8:
            rows = round_up(weight.shape[-2], 16)
            self.arrays[f"{out}.weight_scale"] = np.pad(
                scale, [(0, 0)] * (scale.ndim - 1) + [(0, rows - scale.shape[-1])]
            )
        if input_scale is not None:
            self.arrays[f"{out}.input_scale"] = np.array([input_scale], np.float32)

    def plain(self, out: str, weight: np.ndarray) -> None:
        """A BF16 matrix that stays row-major (embeddings are looked up, not multiplied)."""
        self.arrays[out] = np.ascontiguousarray(weight)
        self.shapes[out] = list(weight.shape)

    def experts(self, out: str, prefix: str) -> None:
        """Packed experts.gate_up_proj [E, in, 2*inter] (gate first) and down_proj [E, inter, in]."""
        t = self.tensors
        for name, fused in (("gate_up", True), ("down", False)):
            source = f"{prefix}.{name}_proj"
            weight = np.swapaxes(_values(t, source), 1, 2)  # [E, out, in]
            scale = np.ones(weight.shape[:2], np.float32)
            if weight.dtype == np.uint8:
                given = _scale(t, f"{source}_weight_scale")
                scale *= given.reshape(-1, 1) if given.size > 1 else given
            if fused:
                half = weight.shape[1] // 2
                weight = np.stack([alternate(w[:half], w[half:]) for w in weight])
                scale = np.stack([alternate(s[:half], s[half:]) for s in scale])
            else:
                weight = np.pad(weight, ((0, 0), (0, 0), (0, round_up(weight.shape[2], 16) - weight.shape[2])))
            self.put(f"{out}.{name}", weight, scale, _shared_input_scale(t, [f"{source}_input_scale"]))

    def down(self, out: str, part: str) -> None:
        """A down projection; its inputs are padded to 16 because gate_up makes whole groups."""
        weight = _values(self.tensors, f"{part}.weight")
        scale = self._row_scales(part, weight.shape[0], weight.dtype)
        padded = np.pad(weight, ((0, 0), (0, round_up(weight.shape[1], 16) - weight.shape[1])))
        self.put(out, padded, scale, _shared_input_scale(self.tensors, [f"{part}.input_scale"]))


def pack_target(config: ModelConfig, tensors: Tensors) -> tuple[Arrays, Shapes]:
    """All of the target's tensors under their bundle names."""
    p = Packer(tensors)
    block = "feed_forward" if config.rope_interleaved else "mlp"
    order = None
    if not config.rope_interleaved:
        rotated = interleave_halves((config.num_heads + config.num_kv_heads) * config.head_dim, config.head_dim)
        rest = np.arange(config.num_kv_heads * config.head_dim) + rotated.size
        order = np.concatenate((rotated, rest))
    p.plain("embed", _values(tensors, "model.embed_tokens.weight"))
    for i in range(config.num_layers):
        source, out = f"model.layers.{i}", f"layers.{i}"
        p.vector(f"{out}.input_norm", f"{source}.input_layernorm.weight")
        p.vector(f"{out}.post_norm", f"{source}.post_attention_layernorm.weight")
        p.matrix(f"{out}.qkv", [f"{source}.self_attn.{x}_proj" for x in "qkv"], order=order)
        p.matrix(f"{out}.o", [f"{source}.self_attn.o_proj"])
        for name in ("k_scale", "v_scale"):
            if f"{source}.self_attn.{name[0]}_proj.{name}" in tensors:
                p.arrays[f"{out}.{name}"] = _scale(tensors, f"{source}.self_attn.{name[0]}_proj.{name}")[:1]
        dense = f"{source}.{block}"
        if i in config.moe_layers:
            p.matrix(f"{out}.router", [f"{dense}.router"])
            p.experts(f"{out}.experts", f"{dense}.experts")
            dense += ".shared_expert"
        p.matrix(f"{out}.gate_up", [f"{dense}.gate_proj", f"{dense}.up_proj"], gated=True)
        p.down(f"{out}.down", f"{dense}.down_proj")
    p.vector("norm", "model.norm.weight")
    p.matrix("lm_head", ["model.embed_tokens" if config.tie_word_embeddings else "lm_head"])
    return p.arrays, p.shapes


def pack_draft(config: DraftConfig, tensors: Tensors, target: ModelConfig) -> tuple[Arrays, Shapes]:
    """The EAGLE-3 head's tensors under bundle names `draft.*`; `draft.to_target` maps draft ids to target ids."""
    p = Packer(tensors)
    layer = "midlayer" if "midlayer.hidden_norm.weight" in tensors else "layers.0"
    rotated = interleave_halves((config.num_heads + config.num_kv_heads) * config.head_dim, config.head_dim)
    order = np.concatenate((rotated, np.arange(config.num_kv_heads * config.head_dim) + rotated.size))
    p.matrix("draft.fc", ["fc"])
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        p.vector(f"draft.{name}", f"{layer}.{name}.weight")
    p.matrix("draft.qkv", [f"{layer}.self_attn.{x}_proj" for x in "qkv"], order=order)
    p.matrix("draft.o", [f"{layer}.self_attn.o_proj"])
    p.matrix("draft.gate_up", [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"], gated=True)
    p.down("draft.down", f"{layer}.mlp.down_proj")
    p.vector("draft.norm", "norm.weight")
    if "lm_head.weight" in tensors:
        p.matrix("draft.lm_head", ["lm_head"])
    if "embed_tokens.weight" in tensors:
        p.plain("draft.embed", _values(tensors, "embed_tokens.weight"))
    to_target = np.arange(config.draft_vocab_size, dtype=np.int64)
    if "d2t" in tensors:
        to_target = to_target + tensors.raw("d2t").astype(np.int64)
    if to_target.min() < 0 or to_target.max() >= target.vocab_size or len(set(to_target.tolist())) != len(to_target):
        raise IntegrityError(
            "d2t does not map draft tokens to distinct target tokens", tensors.where, "train the draft again"
        )
    p.arrays["draft.to_target"] = to_target.astype(np.int32)
    expected = [config.hidden_size, 3 * config.hidden_size]
    if p.shapes["draft.fc"] != expected:
        raise IntegrityError(
            f"fc.weight is {p.shapes['draft.fc']}, not {expected}", tensors.where, "train it for this target"
        )
    return p.arrays, p.shapes
