"""The reference model behind the engine's interface, for machines without a compiler.

What it is: correct and slow: it recomputes a request's whole sequence at each cycle.
What it refuses to be: chosen silently; `counters()["backend"]` says "reference" and the bundle warned when it was
opened.
Run it: `python -m pytest tests/engine_plugins/test_reference_backend.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from engine_plugins.native.backend import Prefill, Result
from engine_plugins.native.bundle import Bundle
from engine_plugins.native.checkpoint import E4M3_TO_FLOAT, Tensors
from engine_plugins.native.layout import separate, unpack
from engine_plugins.native.reference import DraftReference, ReferenceModel
from engine_plugins.ops.verify.reference import draw, probabilities, verify_greedy, verify_sampling


class UnpackedBundle:
    """A bundle's weights under their checkpoint names, dequantized."""

    def __init__(self, bundle: Bundle, file: str) -> None:
        self._packed = Tensors(bundle.path / file)
        self._shapes = bundle.record["matrices"]
        self._arrays: dict[str, np.ndarray] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def names(self) -> list[str]:
        """Sorted tensor names."""
        return sorted(self._arrays)

    def float32(self, name: str) -> np.ndarray:
        """Values, scales applied."""
        return self._arrays[name]

    raw = float32

    def scalar(self, name: str, default: float | None = None) -> float | None:
        """One float, or the default."""
        return float(self._arrays[name].reshape(-1)[0]) if name in self._arrays else default

    def packed(self, name: str) -> np.ndarray:
        """A packed matrix as float32 [N, K] or [E, N, K]."""
        raw, shape = self._packed.raw(name), self._shapes[name]
        stack = raw if raw.ndim == 5 else raw[None]
        out = np.stack([unpack(m, shape[-2], shape[-1]) for m in stack])
        if out.dtype == np.uint8:
            scale = self._packed.float32(f"{name}.weight_scale").reshape(len(stack), -1, 1)[:, : shape[-2]]
            out = E4M3_TO_FLOAT[out] * scale
        else:
            out = (out.astype(np.uint32) << 16).view(np.float32)
        return out if raw.ndim == 5 else out[0]

    def vector(self, out: str, name: str) -> None:
        """Copy a small tensor, when present."""
        if name in self._packed:
            self._arrays[out] = self._packed.float32(name)

    def plain(self, out: str, name: str) -> None:
        """Copy a row-major tensor, when present."""
        self.vector(out, name)

    def linear(self, outs: Sequence[str], name: str, rows: Sequence[int], order: np.ndarray | None = None) -> None:
        """Split a fused matrix by rows into checkpoint layers; each inherits the input scale."""
        if name not in self._packed:
            return
        weight = self.packed(name)
        if order is not None:
            restored = np.empty_like(weight)
            restored[order] = weight
            weight = restored
        for out, part in zip(outs, np.split(weight, np.cumsum(rows)[:-1]), strict=False):
            self._arrays[f"{out}.weight"] = part
            self.vector(f"{out}.input_scale", f"{name}.input_scale")

    def gated(self, gate: str, up: str, name: str, size: int) -> None:
        """Split alternating gate/up groups."""
        for out, part in zip((gate, up), separate(self.packed(name)), strict=False):
            self._arrays[f"{out}.weight"] = part[:size]
            self.vector(f"{out}.input_scale", f"{name}.input_scale")

    def experts(self, prefix: str, name: str, size: int) -> None:
        """Back to experts.gate_up_proj [E, in, 2*inter] and down_proj [E, inter, in]."""
        pairs = [separate(expert) for expert in self.packed(f"{name}.gate_up")]
        both = np.stack([np.concatenate((gate[:size], up[:size])) for gate, up in pairs])
        self._arrays[f"{prefix}.gate_up_proj"] = np.swapaxes(both, 1, 2)
        self._arrays[f"{prefix}.down_proj"] = np.swapaxes(self.packed(f"{name}.down")[:, :, :size], 1, 2)
        for part in ("gate_up", "down"):
            self.vector(f"{prefix}.{part}_proj_input_scale", f"{name}.{part}.input_scale")


def _restore_order(heads: int, kv_heads: int, head_dim: int) -> np.ndarray:
    from engine_plugins.native.layout import interleave_halves

    rotated = interleave_halves((heads + kv_heads) * head_dim, head_dim)
    return np.concatenate((rotated, np.arange(kv_heads * head_dim) + rotated.size))


def unpack_target(bundle: Bundle) -> UnpackedBundle:
    """The target's weights under checkpoint names."""
    c, t = bundle.config, UnpackedBundle(bundle, "weights.safetensors")
    sizes = [c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim]
    order = None if c.rope_interleaved else _restore_order(c.num_heads, c.num_kv_heads, c.head_dim)
    t.plain("model.embed_tokens.weight", "embed")
    t.vector("model.norm.weight", "norm")
    t.linear(["lm_head"], "lm_head", [c.vocab_size])
    for i in range(c.num_layers):
        out, name = f"model.layers.{i}", f"layers.{i}"
        t.vector(f"{out}.input_layernorm.weight", f"{name}.input_norm")
        t.vector(f"{out}.post_attention_layernorm.weight", f"{name}.post_norm")
        t.linear([f"{out}.self_attn.{x}_proj" for x in "qkv"], f"{name}.qkv", sizes, order)
        t.linear([f"{out}.self_attn.o_proj"], f"{name}.o", [c.hidden_size])
        for scale in ("k_scale", "v_scale"):
            t.vector(f"{out}.self_attn.{scale[0]}_proj.{scale}", f"{name}.{scale}")
        dense, size = f"{out}.{'feed_forward' if c.rope_interleaved else 'mlp'}", c.intermediate_size_mlp
        if i in c.moe_layers:
            size = c.intermediate_size
            t.linear([f"{dense}.router"], f"{name}.router", [c.num_experts])
            t.experts(f"{dense}.experts", f"{name}.experts", size)
            dense += ".shared_expert"
        t.gated(f"{dense}.gate_proj", f"{dense}.up_proj", f"{name}.gate_up", size)
        t.linear([f"{dense}.down_proj"], f"{name}.down", [c.hidden_size])
        t._arrays[f"{dense}.down_proj.weight"] = t._arrays[f"{dense}.down_proj.weight"][:, :size]
    return t


def unpack_draft(bundle: Bundle) -> UnpackedBundle:
    """The draft's weights under TensorRT-LLM's names."""
    d, t = bundle.draft, UnpackedBundle(bundle, "draft.safetensors")
    assert d is not None
    sizes = [d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim, d.num_kv_heads * d.head_dim]
    t.linear(["fc"], "draft.fc", [d.hidden_size])
    for norm in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        t.vector(f"midlayer.{norm}.weight", f"draft.{norm}")
    order = _restore_order(d.num_heads, d.num_kv_heads, d.head_dim)
    t.linear([f"midlayer.self_attn.{x}_proj" for x in "qkv"], "draft.qkv", sizes, order)
    t.linear(["midlayer.self_attn.o_proj"], "draft.o", [d.hidden_size])
    t.gated("midlayer.mlp.gate_proj", "midlayer.mlp.up_proj", "draft.gate_up", d.intermediate_size)
    t.linear(["midlayer.mlp.down_proj"], "draft.down", [d.hidden_size])
    t._arrays["midlayer.mlp.down_proj.weight"] = t._arrays["midlayer.mlp.down_proj.weight"][:, : d.intermediate_size]
    t.vector("norm.weight", "draft.norm")
    t.linear(["lm_head"], "draft.lm_head", [d.draft_vocab_size])
    t.plain("embed_tokens.weight", "draft.embed")
    to_target = t._packed.raw("draft.to_target")
    t._arrays["d2t"] = to_target - np.arange(len(to_target), dtype=np.int32)
    return t


@dataclass
class _Slot:
    tokens: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    q: np.ndarray | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    uniform: Callable[[], float] = float
    forced_debt: float = 0.0


class ReferenceBackend:
    """See the module docstring."""

    def __init__(self, bundle: Bundle, draft_tokens: int, forced_acceptance: float | None) -> None:
        self._model = ReferenceModel(bundle.config, unpack_target(bundle))
        self._model.cache_bfloat16 = self._model.layers[0]["k_scale"] is None  # as the compiled engine's cache
        if bundle.draft:
            self._model.draft = DraftReference(bundle.draft, unpack_draft(bundle), self._model)
        self._bundle, self._k, self._forced = bundle, draft_tokens, forced_acceptance
        self._slots = [_Slot() for _ in range(bundle.max_batch_size)]
        self._counters = {"cycles": 0, "seconds": 0.0, "decode_rows": 0}

    def cycle(self, prefills: Sequence[Prefill], decode_slots: Sequence[int]) -> list[Result]:
        started = time.perf_counter()
        for slot, first, tokens in prefills:
            state = self._slots[slot]
            state.tokens[first:] = list(tokens)
        results = [self._decode(self._slots[slot]) for slot in decode_slots]
        self._counters["cycles"] += 1
        self._counters["seconds"] += time.perf_counter() - started
        return results

    def start(self, slot: int, position: int, token: int, temperature: float, top_p: float, seed: int) -> None:
        state = self._slots[slot]
        state.tokens[position:] = [token]
        state.drafts, state.q, state.temperature, state.top_p = [], None, temperature, top_p
        state.uniform = np.random.Generator(np.random.Philox(key=seed)).random

    def copy_prefix(self, source: int, slot: int, count: int) -> None:
        self._slots[slot].tokens = self._slots[source].tokens[:count]

    def _decode(self, state: _Slot) -> Result:
        logits, _ = self._model.forward(state.tokens + state.drafts)
        rows = logits[len(state.tokens) - 1 :].numpy()
        if self._forced and state.drafts:
            state.forced_debt += self._forced - 1
            accepted = min(len(state.drafts), int(state.forced_debt))
            state.forced_debt -= accepted
            new = state.drafts[:accepted] + [int(rows[accepted].argmax())]
        elif state.temperature == 0:
            new = verify_greedy(rows, state.drafts)
        else:
            p = np.stack([probabilities(row, state.temperature, state.top_p) for row in rows])
            new = verify_sampling(p, state.q if state.q is not None else p[:0], state.drafts, state.uniform)
        proposed = len(state.drafts)
        state.tokens += new
        self._counters["decode_rows"] += proposed + 1
        self._draft(state)
        return new, proposed

    def _draft(self, state: _Slot) -> None:
        state.drafts, state.q = [], None
        room = min(self._k, self._bundle.max_seq_len - len(state.tokens))
        if room <= 0 or self._model.draft is None:
            return
        draft = self._model.draft
        _, outputs = self._model.forward(state.tokens[:-1])
        hidden_TH, tokens, rows = draft.combine(outputs), list(state.tokens[1:]), []
        for _ in range(room):
            logits, out_TH = draft.forward(tokens, hidden_TH)
            choice = int(logits[-1].argmax())
            if state.temperature > 0:
                q_draft = probabilities(logits[-1].numpy(), state.temperature, 1.0)
                choice = draw(q_draft, state.uniform())
                q = np.zeros(self._bundle.config.vocab_size)
                q[draft.to_target.numpy()] = q_draft
                rows.append(q)
            token = int(draft.to_target[choice])
            state.drafts.append(token)
            tokens.append(token)
            hidden_TH = torch.cat((hidden_TH, out_TH[-1:]))
        state.q = np.stack(rows) if rows else None

    def forced(self, slot: int, token_ids: list[int], what: str) -> np.ndarray:
        logits, outputs = self._model.forward(token_ids)
        if what == "logits":
            return logits.numpy()
        draft = self._model.draft
        assert draft is not None
        if what == "hidden":
            return torch.cat([outputs[i] for i in draft.config.capture_layers], dim=-1).numpy()
        return draft.forward(token_ids[1:], draft.combine(outputs)[:-1])[0].numpy()

    def counters(self) -> dict[str, Any]:
        return {"backend": "reference", "isa": "torch", "threads": torch.get_num_threads(), **self._counters}

    def close(self) -> None:
        """Nothing to free."""
