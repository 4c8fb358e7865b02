"""The safetensors container by hand: where each tensor's bytes lie, and a header for bytes still to be written.

The library maps whole files and serialises whole dictionaries; streaming needs offsets. It refuses to interpret
values, and a shard that is cut short or missing.
Run it: nothing to run; `python -m pytest tests/tasks/test_quantize_convert.py`.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specs.errors import InputError, IntegrityError

INDEX = "model.safetensors.index.json"
ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "F8_E4M3": 1,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a shard; its bytes begin at file offset `begin`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ITEM_BYTES[self.dtype]


def shard_files(checkpoint: Path) -> list[Path]:
    """The checkpoint's safetensors files in order; one that the index names and the directory lacks is refused."""
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise InputError("no .safetensors file", str(checkpoint), "only safetensors checkpoints are read")
    index = checkpoint / INDEX
    if index.is_file():
        wanted = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(wanted - {file.name for file in files})
        if missing:
            raise IntegrityError(f"shard {missing[0]} is missing", str(checkpoint), "download the checkpoint again")
    return files


def read_header(file: Path) -> list[Tensor]:
    """The shard's tensors in file order."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            raise IntegrityError("shard is cut short", str(file), "download the checkpoint again")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        if entry["dtype"] not in ITEM_BYTES:
            raise InputError(f"{name} has dtype {entry['dtype']}", str(file), f"supported: {', '.join(ITEM_BYTES)}")
        tensor = Tensor(name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        if tensor.begin + tensor.num_bytes > size:
            raise IntegrityError(f"shard is cut short at {name}", str(file), "download the checkpoint again")
        tensors.append(tensor)
    return sorted(tensors, key=lambda tensor: tensor.begin)


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, list[Tensor], int]:
    """(header, tensors with offsets, file size) of a new shard; widest types first, so that every tensor is aligned."""
    ordered = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor[1]])
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in ordered:
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    placed = [Tensor(n, d, tuple(s), start + entries[n]["data_offsets"][0]) for n, d, s in ordered]
    return struct.pack("<Q", len(text)) + text, placed, start + position


def read_float(file: Path, tensor: Tensor) -> float:
    """The value of an F32 scalar."""
    with file.open("rb") as stream:
        stream.seek(tensor.begin)
        return float(struct.unpack("<f", stream.read(4))[0])


def read_into(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from the file at `offset`."""
    done = 0
    while done < len(buffer):
        got = os.preadv(fd, [buffer[done:]], offset + done)
        if not got:
            raise IntegrityError("file ends early", f"descriptor {fd}", "it changed while it was read")
        done += got


def write_from(fd: int, buffer: memoryview, offset: int) -> None:
    """Write all of `buffer` to the file at `offset`."""
    done = 0
    while done < len(buffer):
        done += os.pwrite(fd, buffer[done:], offset + done)
