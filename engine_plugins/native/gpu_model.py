"""The target and the EAGLE-3 head composed from the registered ops, for up to eight rows of one slot.

What it is: straight-line code over tensors of fixed shapes; nothing reads a value back, so a CUDA graph can hold it. On
CPU tensors the same lines run the ops' references.
What it refuses to be: aware of requests, slots or graphs (gpu_backend.py), or a home for kernels (ops/).
Run it: `python -m pytest tests/engine_plugins/test_gpu_backend.py`.
Legend: M rows, H hidden or query heads, G kv heads, D head size, S positions, V vocabulary, C captured layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine_plugins.native.bundle import Bundle
from engine_plugins.native.checkpoint import DraftConfig, ModelConfig
from engine_plugins.native.gpu_kernels import Positioning, place_qkv, silu_mul, to_e4m3
from engine_plugins.native.gpu_weights import Matrix, WeightFile, one_scale
from engine_plugins.ops import library  # noqa: F401  registers torch.ops.kilotok
from specs.errors import InputError

ROWS = 8  # the ops' limit

ops = torch.ops.kilotok


@dataclass(frozen=True)
class Rows:
    """Up to eight rows of one slot, int64 [M] each. What a row leaves in a cache goes to `write`: its position, or
    scratch behind the last one for padding, which otherwise repeats a real row."""

    token: Tensor
    position: Tensor
    write: Tensor


@dataclass(frozen=True)
class Cache:
    """Keys and values of one layer and slot, [S + ROWS, G, D], E4M3 in units of the scales or BF16."""

    k: Tensor
    v: Tensor
    k_scale: float = 1.0
    v_scale: float = 1.0

    @property
    def inv_scales(self) -> tuple[float, float]:
        return 1.0 / self.k_scale, 1.0 / self.v_scale


class Norms:
    """allreduce_rmsnorm with one rank: (E4M3, BF16, residual) of rmsnorm(residual + part)."""

    def __init__(self, hidden: int, eps: float, device: torch.device) -> None:
        self.one = torch.ones(1, device=device)
        self.zeros = torch.zeros((ROWS, hidden), dtype=torch.bfloat16, device=device)
        self._eps, self._inbox = eps, torch.zeros(1, dtype=torch.int64, device=device)
        self._epoch = torch.zeros(ROWS, dtype=torch.int32, device=device)

    def __call__(
        self, part: Tensor, residual: Tensor | None, weight: Tensor, inv_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        before = self.zeros[: len(part)] if residual is None else residual
        inv = self.one if inv_scale is None else inv_scale
        return ops.allreduce_rmsnorm(part, before, weight, self._inbox, self._epoch, 0, self._eps, inv)


def linear(matrix: Matrix, x8: Tensor | None, x: Tensor) -> Tensor:
    """BF16 [M, N]. `x8` is x as E4M3, when somebody made it already."""
    if not matrix.fp8:
        return ops.gemm_low_latency(x, matrix.weight, matrix.scale)
    if x8 is None and matrix.inv_scale is not None:
        x8 = to_e4m3(x, matrix.inv_scale)
    return ops.gemm_low_latency(x8, matrix.weight, matrix.scale)


def gated(gate_up: Matrix, down: Matrix, x8: Tensor | None, x: Tensor) -> Tensor:
    """down(silu(gate) * up), BF16 [M, H]."""
    if gate_up.fp8 and down.fp8 and x8 is not None:
        h8 = ops.fc13_swiglu(x8, gate_up.weight, gate_up.scale, down.inv_scale)
        return ops.gemm_low_latency(h8, down.weight, down.scale)
    return linear(down, None, silu_mul(linear(gate_up, x8, x)))


class Mixture:
    """Router, routed experts and the shared one."""

    def __init__(self, file: WeightFile, name: str, shared: tuple[Matrix, Matrix], experts: int) -> None:
        self.shared, self.router = shared, file.matrix(f"{name}.router").weight[:experts]
        self.gate_up = file.matrix(f"{name}.experts.gate_up", gated=True)
        self.down = file.matrix(f"{name}.experts.down")
        parts = (*shared, self.gate_up, self.down)
        if len({part.fp8 for part in parts}) != 1:
            raise InputError(f"{name}: experts mix FP8 and BF16", "moe_top1", "quantize all experts or none")
        self.fp8 = self.gate_up.fp8
        if self.fp8:
            self.down_scales = one_scale(shared[1], f"{name}.down"), one_scale(self.down, f"{name}.experts.down")
            inverse = [m.inv_scale for m in (self.gate_up, shared[1], self.down) if m.inv_scale is not None]
            self.inv_scale_3 = torch.cat(inverse)

    def __call__(self, x8: Tensor, x: Tensor) -> Tensor:
        logits_ME = ops.router(x, self.router)
        if self.fp8:
            (gate_up, down), (shared_scale, routed_scale) = self.shared, self.down_scales
            return ops.moe_top1(
                *(x8, x, logits_ME, gate_up.weight, gate_up.scale, down.weight, shared_scale),
                *(self.gate_up.weight, self.gate_up.scale, self.down.weight, routed_scale, self.inv_scale_3),
            )
        best_M = logits_ME.argmax(dim=-1)  # BF16 has no fused op: each row's expert is gathered
        score_M1 = torch.sigmoid(logits_ME.gather(1, best_M[:, None]))
        both = torch.bmm(self._chosen(self.gate_up, best_M), (x.float() * score_M1).bfloat16()[..., None])[..., 0]
        routed = torch.bmm(self._chosen(self.down, best_M), silu_mul(both)[..., None])[..., 0]
        return gated(*self.shared, None, x) + routed

    @staticmethod
    def _chosen(experts: Matrix, best_M: Tensor) -> Tensor:
        weight = experts.weight[best_M]
        return weight if experts.scale is None else (weight * experts.scale[best_M][..., None]).bfloat16()


def cos_sin(inv_freq: tuple[float, ...], positions: int, device: torch.device) -> Tensor:
    """fp32 [S, D/2, 2]."""
    angles = torch.arange(positions).float()[:, None] * torch.tensor(inv_freq)[None, :]
    return torch.stack((angles.cos(), angles.sin()), dim=-1).contiguous().to(device)


class _Layer:
    def __init__(self, file: WeightFile, config: ModelConfig, index: int) -> None:
        name = f"layers.{index}"
        self.input_norm, self.post_norm = file.vector(f"{name}.input_norm"), file.vector(f"{name}.post_norm")
        self.qkv, self.o = file.matrix(f"{name}.qkv"), file.matrix(f"{name}.o")
        self.gate_up, self.down = file.matrix(f"{name}.gate_up", gated=True), file.matrix(f"{name}.down")
        self.k_scale, self.v_scale = file.number(f"{name}.k_scale", 1.0), file.number(f"{name}.v_scale", 1.0)
        self.rope = config.rope_layers[index]
        self.moe: Mixture | None = None
        if index in config.moe_layers:
            self.moe = Mixture(file, name, (self.gate_up, self.down), config.num_experts)


class Target:
    """The text decoder."""

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        config, file = bundle.config, WeightFile(bundle, "weights.safetensors", device)
        self.config, self._captures = config, bundle.draft.capture_layers if bundle.draft else ()
        self.fp8_cache = any(name.endswith(".k_scale") for name in file.names())
        self.embed, self.norm_weight = file.rows("embed"), file.vector("norm")
        self.lm_head = file.matrix("lm_head")
        self.layers = [_Layer(file, config, i) for i in range(config.num_layers)]
        self._norm = Norms(config.hidden_size, config.rms_norm_eps, device)
        self._table = cos_sin(config.rope_inv_freq, bundle.max_seq_len, device)
        self._floor_scale = config.floor_scale if config.attn_temperature_tuning else 0.0
        self._qk_norm_eps = config.rms_norm_eps if config.use_qk_norm else 0.0

    def forward(self, rows: Rows, caches: list[Cache]) -> tuple[Tensor, Tensor | None]:
        """(normalized last hidden [M, H], captured layers' outputs [M, C * H]); fills the caches."""
        part, residual, captured = self.embed.index_select(0, rows.token), None, {}
        for index, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            x8, x, residual = self._norm(part, residual, layer.input_norm, layer.qkv.inv_scale)
            captured[index - 1] = residual
            attended = self._attention(layer, cache, rows, x8, x)
            part = linear(layer.o, attended if layer.o.fp8 else None, attended)
            x8, x, residual = self._norm(part, residual, layer.post_norm, layer.gate_up.inv_scale)
            part = layer.moe(x8, x) if layer.moe else gated(layer.gate_up, layer.down, x8, x)
        _, hidden, residual = self._norm(part, residual, self.norm_weight)
        captured[len(self.layers) - 1] = residual
        features = torch.cat([captured[i] for i in self._captures], dim=1) if self._captures else None
        return hidden, features

    def logits(self, hidden: Tensor) -> Tensor:
        """BF16 [M, V]."""
        return linear(self.lm_head, None, hidden)

    def _attention(self, layer: _Layer, cache: Cache, rows: Rows, x8: Tensor, x: Tensor) -> Tensor:
        c, matrix = self.config, layer.qkv
        table = self._table if layer.rope else None
        floor_scale = 0.0 if layer.rope else self._floor_scale
        widths = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.head_dim
        temperature, norm_eps = (floor_scale, c.attn_scale), self._qk_norm_eps if layer.rope else 0.0
        if matrix.fp8 and self.fp8_cache and not norm_eps:
            weights = x8, matrix.weight, matrix.scale, rows.position, table
            qkv = ops.qkv_attn_scaling_cache(*weights, *widths, *temperature, cache.k, cache.v, *cache.inv_scales)
            q_MHD = qkv[:, : widths[0]].unflatten(1, (-1, c.head_dim))
        else:
            how = Positioning(table, norm_eps, *temperature)
            qkv = linear(matrix, x8, x)
            q_MHD = place_qkv(qkv, cache.k, cache.v, rows.position, rows.write, cache.inv_scales, how)
        chunk = c.attention_chunk_size if layer.rope else 0
        settings = cache.k_scale, cache.v_scale, chunk, layer.o.inv_scale if layer.o.fp8 else None
        return ops.attention_decode(q_MHD, cache.k, cache.v, rows.position, *settings).flatten(1)


class Draft:
    """The EAGLE-3 head. A row sees the target's features of its position and the embedding of the token after it."""

    def __init__(self, bundle: Bundle, config: DraftConfig, target: Target, device: torch.device) -> None:
        file = WeightFile(bundle, "draft.safetensors", device)
        self.config = config
        self.fc, self.qkv, self.o = (file.matrix(f"draft.{name}") for name in ("fc", "qkv", "o"))
        self.gate_up, self.down = file.matrix("draft.gate_up", gated=True), file.matrix("draft.down")
        self.lm_head = file.matrix("draft.lm_head") if "draft.lm_head" in file else target.lm_head
        self.embed = file.rows("draft.embed") if "draft.embed" in file else target.embed
        self.to_target = file.rows("draft.to_target").long()
        self._input_norm, self._hidden_norm = file.vector("draft.input_layernorm"), file.vector("draft.hidden_norm")
        self._post_norm = file.vector("draft.post_attention_layernorm")
        self._last_norm = file.vector("draft.norm")
        self._norm = Norms(config.hidden_size, config.rms_norm_eps, device)
        self._how = Positioning(cos_sin(config.rope_inv_freq, bundle.max_seq_len, device))

    def combine(self, features: Tensor) -> Tensor:
        """[M, C * H] -> [M, H]."""
        return linear(self.fc, None, features)

    def keys(self, hidden: Tensor, rows: Rows, cache: Cache) -> Tensor:
        """Queries [M, H, D]; fills the cache. `rows.token` is the one after the row's position."""
        embedded = self._norm(self.embed.index_select(0, rows.token), None, self._input_norm)[1]
        if self.config.normalize_hidden_twice:
            hidden = self._norm(hidden, None, self._input_norm)[1]
        x = torch.cat((embedded, self._norm(hidden, None, self._hidden_norm)[1]), dim=1)
        qkv = linear(self.qkv, None, x)
        return place_qkv(qkv, cache.k, cache.v, rows.position, rows.write, cache.inv_scales, self._how)

    def finish(self, q_MHD: Tensor, hidden: Tensor, position: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """(draft logits [M, draft V], the hidden state that the next chain step eats [M, H])."""
        attended = ops.attention_decode(q_MHD, cache.k, cache.v, position, 1.0, 1.0, 0).flatten(1)
        part, gate_up = linear(self.o, None, attended), self.gate_up
        x8, x, hidden = self._norm(part, hidden, self._post_norm, gate_up.inv_scale)
        part = gated(gate_up, self.down, x8 if gate_up.fp8 else None, x)
        _, x, hidden = self._norm(part, hidden, self._last_norm)
        return linear(self.lm_head, None, x), hidden
