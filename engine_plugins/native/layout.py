"""Weights in kernel layout, and back.

What it is: the one description of how a [N, K] weight lies in a bundle. Rows come in groups of 16 (the vector
lanes), inputs
in pairs: [N/16, K/2, 16, 2], zero padded. A kernel reads it as one stream, two inputs of sixteen outputs at a
time, so it
never adds across lanes. Gate and up rows alternate by group, so that SwiGLU needs no second pass; rotary halves are
interleaved, so that the kernel knows only one RoPE style.
What it refuses to be: lossy. FP8 and BF16 bits are moved, never rounded; only FP32 masters become BF16.
Run it: `python -m pytest tests/engine_plugins/test_layout.py`.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

LANES = 16
DTYPE_NAMES = {"uint8": "U8", "uint16": "BF16", "float32": "F32", "int32": "I32"}


def round_up(size: int, multiple: int) -> int:
    """The next multiple, at least `size`."""
    return -(-size // multiple) * multiple


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> BF16 bits (uint16), round to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def pad_rows(weight_NK: np.ndarray) -> np.ndarray:
    """Zero rows and columns up to whole groups and pairs."""
    n, k = weight_NK.shape
    return np.pad(weight_NK, ((0, round_up(n, LANES) - n), (0, round_up(k, 2) - k)))


def pack(weight_NK: np.ndarray) -> np.ndarray:
    """[N, K] -> [N/16, K/2, 16, 2]."""
    padded = pad_rows(weight_NK)
    n, k = padded.shape
    return np.ascontiguousarray(padded.reshape(n // LANES, LANES, k // 2, 2).transpose(0, 2, 1, 3))


def unpack(packed: np.ndarray, n: int, k: int) -> np.ndarray:
    """Inverse of `pack` for the original N and K."""
    groups, pairs = packed.shape[:2]
    return packed.transpose(0, 2, 1, 3).reshape(groups * LANES, pairs * 2)[:n, :k]


def alternate(gate_FK: np.ndarray, up_FK: np.ndarray) -> np.ndarray:
    """Groups of 16 rows: gate, up, gate, up ... [2F, K] with F padded to 16."""
    f = round_up(gate_FK.shape[0], LANES)
    parts = [np.pad(w, ((0, f - w.shape[0]),) + ((0, 0),) * (w.ndim - 1)) for w in (gate_FK, up_FK)]
    shape = (f // LANES, LANES) + gate_FK.shape[1:]
    return np.stack([p.reshape(shape) for p in parts], axis=1).reshape((2 * f,) + gate_FK.shape[1:])


def separate(both_2FK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `alternate` (padding kept)."""
    rows = both_2FK.shape[0] // (2 * LANES)
    grouped = both_2FK.reshape((rows, 2, LANES) + both_2FK.shape[1:])
    flat = (rows * LANES,) + both_2FK.shape[1:]
    return grouped[:, 0].reshape(flat), grouped[:, 1].reshape(flat)


def interleave_halves(rows: int, head_dim: int) -> np.ndarray:
    """Row order that turns half-rotation RoPE (Llama 3) into pair rotation (Llama 4): 0, D/2, 1, D/2+1, ..."""
    order = np.arange(head_dim).reshape(2, head_dim // 2).T.reshape(-1)
    return (np.arange(0, rows, head_dim)[:, None] + order[None, :]).reshape(-1)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Minimal writer: BF16 as uint16 bits, every tensor aligned to 64 bytes for the kernels' loads."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": DTYPE_NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
        if array.nbytes % 64:
            pad = 64 - array.nbytes % 64
            header[f"_pad.{name}"] = {"dtype": "U8", "shape": [pad], "data_offsets": [offset, offset + pad]}
            offset += pad
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (round_up(len(text) + 8, 64) - 8 - len(text))
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            stream.write(np.ascontiguousarray(array).tobytes())
            stream.write(b"\0" * (-array.nbytes % 64))
