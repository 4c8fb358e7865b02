"""The compiled step behind the engine's interface, through ctypes.

What it is: hands weights and slots to the C ABI (cpp/api.cpp) and makes one call per cycle; ctypes releases the
GIL for it.
What it refuses to be: arithmetic.
Run it: `python -m engine_plugins.native.bench --bundle DIR`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine_plugins.native.backend import Prefill, Result
from engine_plugins.native.bundle import Bundle
from engine_plugins.native.checkpoint import Tensors
from engine_plugins.native.layout import round_up
from specs.errors import InputError, IntegrityError

GROUPS = ("embed", "norms", "qkv", "attention", "o", "dense_mlp", "moe", "lm_head", "sampling", "draft", "host")
LAYER_MATRICES = ("qkv", "o", "gate_up", "down", "router", "experts.gate_up", "experts.down")
DRAFT_MATRICES = ("fc", "qkv", "o", "gate_up", "down", "lm_head")
MAX_ROWS, MAX_DRAFTS = 2048, 15
ISA_CODES = {None: 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3}
FORCED = {"logits": 0, "hidden": 1, "draft": 2}


class _CycleIO(ctypes.Structure):
    _fields_ = [
        ("num_prefills", ctypes.c_int),
        ("prefill_slot", ctypes.c_void_p),
        ("prefill_position", ctypes.c_void_p),
        ("prefill_length", ctypes.c_void_p),
        ("prefill_tokens", ctypes.c_void_p),
        ("num_decodes", ctypes.c_int),
        ("decode_slot", ctypes.c_void_p),
        ("out_tokens", ctypes.c_void_p),
        ("out_count", ctypes.c_void_p),
        ("out_proposed", ctypes.c_void_p),
    ]


def open_library(path: str) -> ctypes.CDLL:
    """Load a bundle's library and declare the calls whose arguments ctypes would guess wrong."""
    lib = ctypes.CDLL(path)
    p, i, f = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    lib.kt_new.restype, lib.kt_new.argtypes = p, [p, p, p, p]
    lib.kt_isa.restype, lib.kt_isa.argtypes = ctypes.c_char_p, [p]
    lib.kt_matrix.argtypes = [p, i, i, p, i, i, i, i, p, f]
    lib.kt_layer.argtypes = [p, i, p, p, f, f, i, i, i]
    lib.kt_target.argtypes, lib.kt_draft.argtypes = [p] * 3, [p] * 7
    lib.kt_start.argtypes = [p, i, i, ctypes.c_int32, f, f, ctypes.c_uint64]
    lib.kt_copy_prefix.argtypes = [p, i, i, i]
    lib.kt_cycle.argtypes, lib.kt_forced.argtypes = [p, p], [p, i, p, i, i, p]
    lib.kt_counters.argtypes, lib.kt_free.argtypes, lib.kt_share_lm_head.argtypes = [p, p, p], [p], [p]
    lib.kt_gemm_new.restype, lib.kt_gemm_new.argtypes = p, [p, p, i, i, i, p, f]
    lib.kt_gemm.argtypes = [p, p, p, i, p]
    lib.kt_read.restype, lib.kt_read.argtypes = f, [p, p]
    return lib


def _ints(values: Sequence[int]) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.int32)


class NativeBackend:
    """See the module docstring."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        draft_tokens: int,
        prefill_rows: int,
        threads: int,
        forced_acceptance: float | None,
        isa: str | None,
        row_budget: int,
        fused: bool,
    ) -> None:
        slots, k = bundle.max_batch_size, draft_tokens
        rows = prefill_rows + slots * (k + 1)
        if rows > MAX_ROWS:
            raise InputError(
                f"max_batch_size={slots} with {k} drafts needs {rows} rows",
                "engine.max_batch_size",
                f"at most {MAX_ROWS}",
            )
        if isa not in ISA_CODES:
            raise InputError(f"isa {isa!r}", "engine", f"one of {', '.join(str(x) for x in ISA_CODES)}")
        self._bundle, self._k, self._rows, self._threads = bundle, k, rows, threads
        self._check_memory()
        self._lib = open_library(str(bundle.library))
        self._handle = self._create(threads, forced_acceptance or 0.0, ISA_CODES[isa], row_budget, fused)
        self._isa = self._lib.kt_isa(self._handle).decode()
        self._load_target(Tensors(bundle.path / "weights.safetensors"))
        if bundle.draft:
            self._load_draft(Tensors(bundle.path / "draft.safetensors"))
        self._out_tokens = np.zeros((slots, k + 1), np.int32)
        self._out_count, self._out_proposed = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
        self._slots = np.zeros(slots, np.int32)
        self._io = _CycleIO(
            out_tokens=self._out_tokens.ctypes.data,
            out_count=self._out_count.ctypes.data,
            out_proposed=self._out_proposed.ctypes.data,
            decode_slot=self._slots.ctypes.data,
        )
        self._io_pointer = ctypes.addressof(self._io)

    def _check_memory(self) -> None:
        b, c = self._bundle, self._bundle.config
        weights = sum(f.stat().st_size for f in b.path.glob("*.safetensors"))
        cache = (
            2
            * c.num_layers
            * c.num_kv_heads
            * c.head_dim
            * b.max_seq_len
            * b.max_batch_size
            * (1 if self._fp8_cache() else 2)
        )
        try:
            pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            with open("/proc/meminfo", encoding="ascii") as lines:
                free = next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")), pages)
        except (OSError, ValueError):
            return  # unknown: let the allocation speak
        if weights + cache > free:
            raise InputError(
                f"weights and KV cache need {(weights + cache) / 2**30:.1f} GiB, {free / 2**30:.1f} are free",
                "engine.max_batch_size",
                "lower max_batch_size or max_seq_len, or use a larger machine",
            )

    def _create(self, threads: int, forced_acceptance: float, isa: int, row_budget: int, fused: bool) -> int:
        b, c, d = self._bundle, self._bundle.config, self._bundle.draft
        widths = [c.intermediate_size_mlp, c.intermediate_size] + ([d.intermediate_size] if d else [])
        ints = _ints(
            [
                c.num_layers,
                c.hidden_size,
                c.vocab_size,
                c.num_experts,
                len(d.capture_layers) if d else 0,
                self._k,
                self._rows,
                max(16, b.max_batch_size * (self._k + 1)),
                b.max_batch_size,
                b.max_seq_len,
                c.num_heads,
                c.num_kv_heads,
                c.head_dim,
                c.attention_chunk_size,
                int(self._fp8_cache()),
                int(c.use_qk_norm),
                int(c.attn_temperature_tuning),
                threads,
                max(round_up(w, 16) for w in widths),
                int(d is not None),
                d.num_heads if d else 0,
                d.num_kv_heads if d else 0,
                d.head_dim if d else 0,
                d.draft_vocab_size if d else 0,
                int(d.normalize_hidden_twice) if d else 0,
                isa,
                row_budget,
                int(fused),
            ]
        )
        floats = np.array(
            [c.rms_norm_eps, forced_acceptance, c.floor_scale, c.attn_scale, d.rms_norm_eps if d else 0.0], np.float32
        )
        freq = np.array(c.rope_inv_freq, np.float32)
        draft_freq = np.array(d.rope_inv_freq if d else [0.0], np.float32)
        handle = self._lib.kt_new(ints.ctypes.data, floats.ctypes.data, freq.ctypes.data, draft_freq.ctypes.data)
        if not handle:
            raise IntegrityError(
                "this CPU lacks the instructions asked for", "engine", "use isa=None, or another machine"
            )
        return handle

    def _fp8_cache(self) -> bool:
        return any(name.endswith(".k_scale") for name in Tensors(self._bundle.path / "weights.safetensors").names())

    def _matrix(self, tensors: Tensors, layer: int, which: int, name: str) -> None:
        packed = np.ascontiguousarray(tensors.raw(name))
        count = packed.shape[0] if packed.ndim == 5 else 1
        groups, pairs = packed.shape[-4:-2]
        fp8 = packed.dtype == np.uint8
        scale = np.ascontiguousarray(tensors.float32(f"{name}.weight_scale")) if fp8 else None
        self._lib.kt_matrix(
            self._handle,
            layer,
            which,
            packed.ctypes.data,
            0 if fp8 else 1,
            count,
            groups * 16,
            pairs * 2,
            scale.ctypes.data if scale is not None else None,
            tensors.scalar(f"{name}.input_scale", 0.0),
        )

    def _load_target(self, tensors: Tensors) -> None:
        config, captures = self._bundle.config, self._bundle.draft.capture_layers if self._bundle.draft else ()
        vectors = {n: np.ascontiguousarray(tensors.float32(n)) for n in tensors.names() if n.endswith("norm")}
        embed = np.ascontiguousarray(tensors.raw("embed"))
        self._lib.kt_target(self._handle, vectors["norm"].ctypes.data, embed.ctypes.data)
        self._matrix(tensors, -1, 0, "lm_head")
        for i in range(config.num_layers):
            name = f"layers.{i}"
            self._lib.kt_layer(
                self._handle,
                i,
                vectors[f"{name}.input_norm"].ctypes.data,
                vectors[f"{name}.post_norm"].ctypes.data,
                tensors.scalar(f"{name}.k_scale", 1.0),
                tensors.scalar(f"{name}.v_scale", 1.0),
                int(config.rope_layers[i]),
                int(i in config.moe_layers),
                captures.index(i) if i in captures else -1,
            )
            for which, part in enumerate(LAYER_MATRICES):
                if f"{name}.{part}" in tensors:
                    self._matrix(tensors, i, which, f"{name}.{part}")

    def _load_draft(self, tensors: Tensors) -> None:
        vectors = [
            np.ascontiguousarray(tensors.float32(f"draft.{n}"))
            for n in ("input_layernorm", "hidden_norm", "post_attention_layernorm", "norm")
        ]
        embed = np.ascontiguousarray(tensors.raw("draft.embed")) if "draft.embed" in tensors else None
        to_target = np.ascontiguousarray(tensors.raw("draft.to_target"))
        self._lib.kt_draft(
            self._handle,
            *(v.ctypes.data for v in vectors),
            embed.ctypes.data if embed is not None else None,
            to_target.ctypes.data,
        )
        for which, part in enumerate(DRAFT_MATRICES):
            if f"draft.{part}" in tensors:
                self._matrix(tensors, -2, which, f"draft.{part}")
        if "draft.lm_head" not in tensors:
            self._lib.kt_share_lm_head(self._handle)

    def cycle(self, prefills: Sequence[Prefill], decode_slots: Sequence[int]) -> list[Result]:
        io, count = self._io, len(decode_slots)
        io.num_prefills, io.num_decodes = len(prefills), count
        self._slots[:count] = decode_slots
        if prefills:
            slot, position = _ints([p[0] for p in prefills]), _ints([p[1] for p in prefills])
            length = _ints([len(p[2]) - 1 for p in prefills])
            tokens = _ints([t for p in prefills for t in p[2]])
            io.prefill_slot, io.prefill_position = slot.ctypes.data, position.ctypes.data
            io.prefill_length, io.prefill_tokens = length.ctypes.data, tokens.ctypes.data
        self._lib.kt_cycle(self._handle, self._io_pointer)
        counts, proposed = self._out_count[:count].tolist(), self._out_proposed[:count].tolist()
        tokens_out = self._out_tokens[:count].tolist()
        return [(row[:n], p) for row, n, p in zip(tokens_out, counts, proposed, strict=False)]

    def start(self, slot: int, position: int, token: int, temperature: float, top_p: float, seed: int) -> None:
        self._lib.kt_start(self._handle, slot, position, token, temperature, top_p, seed)

    def copy_prefix(self, source: int, slot: int, count: int) -> None:
        self._lib.kt_copy_prefix(self._handle, source, slot, count)

    def forced(self, slot: int, token_ids: list[int], what: str) -> np.ndarray:
        b, count = self._bundle, len(token_ids)
        if what != "logits" and b.draft is None:
            raise InputError("this bundle has no draft", what, "build it with one")
        shapes = {"logits": (count, b.config.vocab_size)}
        if b.draft:
            shapes["hidden"] = (count, len(b.draft.capture_layers) * b.config.hidden_size)
            shapes["draft"] = (max(0, count - 1), b.draft.draft_vocab_size)
        out, tokens = np.zeros(shapes[what], np.float32), _ints(token_ids)
        self._lib.kt_forced(self._handle, slot, tokens.ctypes.data, count, FORCED[what], out.ctypes.data)
        return out

    def counters(self) -> dict[str, Any]:
        groups, counts = np.zeros(len(GROUPS) + 1), np.zeros(5 + MAX_DRAFTS, np.uint64)
        self._lib.kt_counters(self._handle, groups.ctypes.data, counts.ctypes.data)
        seconds = {name: float(value) for name, value in zip(GROUPS, groups, strict=False)}
        return {
            "backend": "native",
            "isa": self._isa,
            "threads": self._threads,
            "cycles": int(counts[0]),
            "decode_rows": int(counts[1]),
            "prefill_rows": int(counts[2]),
            "proposed_cycles": int(counts[3]),
            "phases": int(counts[4]),
            "accepted_by_position": [int(x) for x in counts[5 : 5 + self._k]],
            "seconds": float(groups[-1]),
            "seconds_by_group": seconds,
        }

    def close(self) -> None:
        if self._handle:
            self._lib.kt_free(self._handle)
            self._handle = 0
