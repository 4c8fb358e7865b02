"""BF16 shards in, FP8 shards out, given every scale: chunk by chunk, so that no model is too large for any machine.

A few threads each read a chunk, cast it and write it where it belongs; a packed tensor of 128 experts is just more
chunks. Memory is threads x 24 MiB, whatever the checkpoint. A shard appears under its name when it is complete and on
disk, so that a killed run goes on at the next one. Refuses NaN, a scale without a tensor, and a disk too small.
Run it: `python -m tasks.quantize.convert SOURCE OUT CALIBRATION_JSON` (the file a quantize build keeps in `.scratch`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specs.errors import IntegrityError, StoreError
from tasks.job import Progress
from tasks.quantize.cast import E4M3_MAX, Loss, caster
from tasks.quantize.coverage import scale_name
from tasks.quantize.detectors import TensorRow, check_finite
from tasks.quantize.shards import INDEX, Tensor, lay_out, read_header, read_into, shard_files, write_from

CHUNK_BYTES = 16 << 20
THREADS = min(8, 2 * (os.cpu_count() or 1))  # half of them wait for the disk
Rename = Callable[[str], str]
_buffers = threading.local()


@dataclass(frozen=True)
class Piece:
    """One tensor on its way: `scale` is None for what is copied as it is."""

    source: Tensor
    target: Tensor
    scale: float | None


def scan(checkpoint: Path, progress: Progress, rename: Rename = str) -> dict[str, float]:
    """Largest magnitude of every tensor, read once; the tensors with NaN or Inf are refused by name."""
    found: dict[str, float] = {}
    files = shard_files(checkpoint)
    total = sum(file.stat().st_size for file in files)
    done = 0
    with ThreadPoolExecutor(THREADS) as pool:
        for file in files:
            tensors = read_header(file)
            for tensor in tensors:
                found.setdefault(rename(tensor.name), 0.0)
            with _opened(file, os.O_RDONLY) as fd:
                for tensor, amax in _each(pool, functools.partial(_scan_chunk, fd), _chunks(tensors)):
                    name = rename(tensor.name)
                    found[name] = amax if math.isnan(amax) else max(found[name], amax)
            done += file.stat().st_size
            progress(done, total, "scan")
    check_finite((name for name, amax in found.items() if not math.isfinite(amax)), checkpoint.name)
    return found


def convert(
    source: Path, out: Path, scales: Mapping[str, float], scratch: Path, progress: Progress, rename: Rename = str
) -> list[TensorRow]:
    """Write the FP8 shards of `source` and their index into `out`; returns the row of every quantized weight.

    `scales` maps exported scale names (`...q_proj.weight_scale`, `...k_proj.k_scale`) to values; a weight is quantized
    when its weight scale is there. `rename` turns the source's tensor names into the exported ones.
    """
    files = shard_files(source)
    plans = {file: _plan(file, scales, rename) for file in files}
    placed = {tensor.name for pieces, extra, _, _ in plans.values() for tensor in (*extra, *(p.target for p in pieces))}
    orphans = sorted(set(scales) - placed)
    if orphans:
        raise IntegrityError("the checkpoint has no tensor for this scale", orphans[0], "was another model calibrated?")
    _check_space(out, sum(size for file, (*_, size) in plans.items() if not (out / file.name).is_file()))
    rows: list[TensorRow] = []
    scratch.mkdir(parents=True, exist_ok=True)
    total, done = sum(file.stat().st_size for file in files), 0
    with ThreadPoolExecutor(THREADS) as pool:
        for file in files:
            rows += _convert_shard(file, out / file.name, plans[file], scales, scratch, pool)
            done += file.stat().st_size
            progress(done, total, "convert")
    _write_index(out, {t.name: f.name for f, (ps, ex, _, _) in plans.items() for t in (*ex, *(p.target for p in ps))})
    return rows


Plan = tuple[list[Piece], list[Tensor], bytes, int]  # pieces, scale tensors, header, file size


def _plan(file: Path, scales: Mapping[str, float], rename: Rename) -> Plan:
    wanted: list[tuple[str, str, tuple[int, ...]]] = []
    sources = {rename(tensor.name): tensor for tensor in read_header(file)}
    for name, tensor in sources.items():
        mine = _scales_of(name, scales)
        quantized = scale_name(name, "weight") in mine
        wanted.append((name, "F8_E4M3" if quantized else tensor.dtype, tensor.shape))
        wanted += [(scale, "F32", ()) for scale in mine]
    header, targets, size = lay_out(wanted)
    pieces = [Piece(sources[t.name], t, scales.get(scale_name(t.name, "weight"))) for t in targets if t.name in sources]
    return pieces, [t for t in targets if t.name not in sources], header, size


def _scales_of(weight: str, scales: Mapping[str, float]) -> list[str]:
    """The scales that live beside a weight: its own, its input's, and K's or V's when it makes them."""
    stem = weight.removesuffix(".weight")
    names = [scale_name(weight, "weight"), scale_name(weight, "input"), f"{stem}.k_scale", f"{stem}.v_scale"]
    return [name for name in names if name in scales]


def _convert_shard(
    file: Path, target: Path, plan: Plan, scales: Mapping[str, float], scratch: Path, pool: ThreadPoolExecutor
) -> list[TensorRow]:
    pieces, extra, header, size = plan
    made_of = [file.stat().st_size, file.stat().st_mtime_ns, [[p.target.name, p.scale] for p in pieces]]
    digest = hashlib.sha256(json.dumps([made_of, [scales[t.name] for t in extra]]).encode()).hexdigest()
    record = scratch / f"{file.name}.json"
    if target.is_file() and record.is_file():
        known = json.loads(record.read_text())
        if known["digest"] == digest:
            return [TensorRow(**row) for row in known["rows"]]
    part = target.with_suffix(".part")
    by_source = {piece.source.name: piece for piece in pieces}
    losses = {piece.target.name: Loss() for piece in pieces}
    bad: set[str] = set()
    with _opened(file, os.O_RDONLY) as reader, _opened(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as writer:
        os.posix_fallocate(writer, 0, size)
        write_from(writer, memoryview(header), 0)
        for tensor in extra:
            write_from(writer, memoryview(np.float32(scales[tensor.name]).tobytes()), tensor.begin)
        in_file_order = sorted((piece.source for piece in pieces), key=lambda tensor: tensor.begin)
        jobs = ((by_source[tensor.name], start, stop) for tensor, start, stop in _chunks(in_file_order))
        for piece, loss in _each(pool, functools.partial(_convert_chunk, reader, writer), jobs):
            losses[piece.target.name].add(loss)
            if not math.isfinite(loss.signal):
                bad.add(piece.target.name)
        check_finite(sorted(bad), file.name)
        os.fsync(writer)
    rows = [_row(piece, losses[piece.target.name]) for piece in pieces if piece.scale is not None]
    record.write_text(json.dumps({"digest": digest, "rows": [asdict(row) for row in rows]}))
    os.replace(part, target)
    return rows


def _chunks(tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, int, int]]:
    """(tensor, first byte, last byte) in file order, so that reads run through the file."""
    for tensor in tensors:
        for start in range(0, tensor.num_bytes, CHUNK_BYTES):
            yield tensor, start, min(start + CHUNK_BYTES, tensor.num_bytes)


def _each(pool: ThreadPoolExecutor, work: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Results in order; nobody still works on the files when this ends, also when it ends in an error."""
    futures = [pool.submit(work, *job) for job in jobs]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


def _read_chunk(fd: int, tensor: Tensor, start: int, stop: int) -> np.ndarray:
    """The bytes, in this thread's own buffer."""
    if not hasattr(_buffers, "source"):
        _buffers.source = np.empty(CHUNK_BYTES, np.uint8)
        _buffers.target = np.empty(CHUNK_BYTES // 2, np.uint8)
    raw = _buffers.source[: stop - start]
    read_into(fd, raw.data, tensor.begin + start)
    return raw


def _scan_chunk(fd: int, tensor: Tensor, start: int, stop: int) -> tuple[Tensor, float]:
    return tensor, caster().amax(_read_chunk(fd, tensor, start, stop), tensor.dtype)


def _convert_chunk(reader: int, writer: int, piece: Piece, start: int, stop: int) -> tuple[Piece, Loss]:
    raw = _read_chunk(reader, piece.source, start, stop)
    if piece.scale is None:
        write_from(writer, raw.data, piece.target.begin + start)
        return piece, Loss(signal=caster().amax(raw, piece.source.dtype))
    width = piece.source.num_bytes // piece.source.num_elements
    target = _buffers.target[: len(raw) // width]
    loss = caster().cast(raw, piece.source.dtype, piece.scale, target)
    write_from(writer, target.data, piece.target.begin + start // width)
    return piece, loss


def _row(piece: Piece, loss: Loss) -> TensorRow:
    scale = float(piece.scale or 0.0)
    sqnr = 10 * math.log10(loss.signal / loss.noise) if loss.signal > 0 and loss.noise > 0 else 199.0
    share = loss.clipped / max(piece.source.num_elements, 1)
    return TensorRow(piece.target.name, "weight", scale, scale * E4M3_MAX, sqnr, share)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        gib = 1 << 30
        raise StoreError(
            f"the FP8 checkpoint needs {needed / gib:.1f} GiB and {free / gib:.1f} GiB are free",
            str(out),
            "`kilotok gc`, or a store on a larger disk",
        )


def _write_index(out: Path, weight_map: dict[str, str]) -> None:
    if len(set(weight_map.values())) < 2:
        return  # one shard needs no index
    total = sum(tensor.num_bytes for file in set(weight_map.values()) for tensor in read_header(out / file))
    body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (out / INDEX).write_text(json.dumps(body, indent=2) + "\n")


def main(argv: list[str]) -> None:
    """Convert with the scales of an earlier calibration."""
    source, out, calibration = map(Path, argv)
    out.mkdir(parents=True, exist_ok=True)
    rows = convert(source, out, json.loads(calibration.read_text())["scales"], out / ".scratch", Progress())
    print(f"{len(rows)} tensors quantized, {min(row.sqnr_db for row in rows):.1f} dB SQNR in the worst")


if __name__ == "__main__":
    main(sys.argv[1:])
