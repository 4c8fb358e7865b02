"""Build and open a native bundle: weights in kernel layout, the compiled step, the tokenizer, and their digests.

What it is: `build_bundle` (needs a C++ compiler; without one the bundle says so and runs on the reference) and
`load_bundle`,
which refuses a bundle that was changed, built for another CPU, or written by another schema.
What it refuses to be: a quantizer. BF16 stays BF16, FP8 stays FP8, with the checkpoint's own scales.
Run it: `python -m engine_plugins.native.bundle CHECKPOINT OUT [--draft DIR] [--draft-tokens 3]`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine_plugins.native import compiler
from engine_plugins.native.checkpoint import (
    DraftConfig,
    ModelConfig,
    Tensors,
    draft_config_from_dict,
    model_config_from_dict,
    read_draft_config,
    read_model_config,
)
from engine_plugins.native.layout import write_safetensors
from engine_plugins.native.packing import pack_draft, pack_target
from specs.errors import InputError, IntegrityError

SCHEMA = 1
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `library` is None when it was built without a compiler."""

    path: Path
    record: dict[str, Any]
    config: ModelConfig
    draft: DraftConfig | None
    draft_tokens: int
    max_seq_len: int
    max_batch_size: int
    quantized: bool
    library: Path | None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _check_limits(
    config: ModelConfig, draft_tokens: int, max_seq_len: int, max_batch_size: int, has_draft: bool
) -> None:
    if config.head_dim % 16 or config.head_dim > 256:
        raise InputError(
            f"head_dim {config.head_dim} is outside the contract", "attention_decode", "16..256, a multiple of 16"
        )
    if config.hidden_size % 16:
        raise InputError(
            f"hidden_size {config.hidden_size} is outside the contract", "gemm_low_latency", "a multiple of 16"
        )
    if not 0 <= draft_tokens <= 15:
        raise InputError(f"draft_tokens={draft_tokens} is outside the contract", "verify", "0..15")
    if draft_tokens and not has_draft:
        raise InputError(
            "draft_tokens > 0 needs a draft", "engine.draft_tokens", "give a draft or set draft_tokens to 0"
        )
    if max_seq_len < 2 or max_seq_len > config.max_position_embeddings:
        raise InputError(
            f"max_seq_len={max_seq_len} does not fit the model",
            "engine.max_seq_len",
            f"2..{config.max_position_embeddings}",
        )
    if not 1 <= max_batch_size <= 256:
        raise InputError(f"max_batch_size={max_batch_size} is outside the contract", "engine.max_batch_size", "1..256")


def build_bundle(
    checkpoint: Path,
    out: Path,
    *,
    draft: Path | None = None,
    draft_tokens: int = 0,
    max_seq_len: int = 2048,
    max_batch_size: int = 16,
    plugins: Sequence[str] = (),
) -> dict[str, Any]:
    """Write a bundle into `out` (created) and return its record. `plugins` names ops that must be compiled in."""
    started = time.perf_counter()
    checkpoint, out = Path(checkpoint), Path(out)
    config = read_model_config(checkpoint)
    draft_config = read_draft_config(Path(draft), config) if draft else None
    draft_tokens = draft_tokens if draft else 0
    _check_limits(config, draft_tokens, max_seq_len, max_batch_size, draft is not None)
    unknown = sorted(set(plugins) - set(compiler.OPS))
    if unknown:
        raise InputError(f"unknown plugin {unknown[0]!r}", "engine.plugins", f"known: {', '.join(compiler.OPS)}")
    (out / "plugins").mkdir(parents=True, exist_ok=True)
    tensors = Tensors(checkpoint)
    weights, matrices = pack_target(config, tensors)
    write_safetensors(out / "weights.safetensors", weights, {"kilotok": "target, kernel layout"})
    if draft_config:
        draft_weights, draft_matrices = pack_draft(draft_config, Tensors(Path(str(draft))), config)
        write_safetensors(out / "draft.safetensors", draft_weights, {"kilotok": "draft, kernel layout"})
        matrices.update(draft_matrices)
    for name in TOKENIZER_FILES:
        if (checkpoint / name).exists():
            shutil.copyfile(checkpoint / name, out / name)
    packed_seconds = time.perf_counter() - started
    library = compiler.compile_library(out / "plugins")
    record = {
        "kilotok_bundle": SCHEMA,
        "backend": "native" if library else "reference",
        "machine": platform.machine(),
        "isa": list(compiler.ISA_FLAGS) if library else [],
        "sources": compiler.source_digest(),
        "plugins": list(plugins),
        "quantized": any(n.endswith(".input_scale") for n in weights),
        "model": config.to_dict(),
        "draft": draft_config.to_dict() if draft_config else None,
        "draft_tokens": draft_tokens,
        "max_seq_len": max_seq_len,
        "max_batch_size": max_batch_size,
        "matrices": matrices,
    }
    record["files"] = {
        str(f.relative_to(out)): {"sha256": _sha256(f), "size": f.stat().st_size}
        for f in sorted(out.rglob("*"))
        if f.is_file() and f.name != "bundle.json" and ".scratch" not in f.parts
    }
    (out / "bundle.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return {**record, "seconds": {"pack": packed_seconds, "compile": time.perf_counter() - started - packed_seconds}}


def load_bundle(path: Path, *, verify: bool = True) -> Bundle:
    """Open a bundle; raises IntegrityError or InputError with what is wrong. `verify` rehashes every file."""
    path = Path(path)
    where = str(path)
    try:
        record = json.loads((path / "bundle.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError("no bundle.json", where, "build one with `python -m engine_plugins.native.bundle`") from error
    except ValueError as error:
        raise IntegrityError(f"bundle.json is not JSON ({error})", where, "build the bundle again") from error
    if record.get("kilotok_bundle") != SCHEMA:
        raise IntegrityError(f"bundle schema {record.get('kilotok_bundle')!r} is not {SCHEMA}", where, "build it again")
    if record["machine"] != platform.machine():
        raise IntegrityError(
            f"built for {record['machine']}, this machine is {platform.machine()}",
            where,
            "build the bundle on this architecture",
        )
    for name, entry in record["files"].items():
        file = path / name
        if not file.exists() or file.stat().st_size != entry["size"]:
            raise IntegrityError(f"{name} is missing or has another size", where, "copy or build the bundle again")
        if verify and _sha256(file) != entry["sha256"]:
            raise IntegrityError(f"{name} does not match its sha256", where, "copy or build the bundle again")
    library = path / "plugins" / compiler.LIBRARY if record["backend"] == "native" else None
    if library is None:
        warnings.warn("this bundle was built without a C++ compiler: the slow reference engine serves it", stacklevel=2)
    elif not compiler.cpu_supported():
        raise IntegrityError(
            "this CPU lacks AVX2, FMA or F16C",
            where,
            "use a CPU made after 2013, or delete the plugins and rebuild without a compiler to run the reference",
        )
    draft = draft_config_from_dict(record["draft"]) if record["draft"] else None
    return Bundle(
        path,
        record,
        model_config_from_dict(record["model"]),
        draft,
        record["draft_tokens"],
        record["max_seq_len"],
        record["max_batch_size"],
        record["quantized"],
        library,
    )


def main() -> None:
    """Command line of `build_bundle`."""
    parser = argparse.ArgumentParser(description="Build a native bundle.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--draft-tokens", type=int, default=3)
    parser.add_argument("--max-seq-len", type=int, default=2048)
    parser.add_argument("--max-batch-size", type=int, default=16)
    args = parser.parse_args()
    record = build_bundle(
        args.checkpoint,
        args.out,
        draft=args.draft,
        draft_tokens=args.draft_tokens,
        max_seq_len=args.max_seq_len,
        max_batch_size=args.max_batch_size,
    )
    print(json.dumps({k: record[k] for k in ("backend", "isa", "quantized", "draft_tokens", "seconds")}))


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
