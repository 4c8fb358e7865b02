"""Read a model directory: its shape (config.json) and its tensors (safetensors), without torch.

What it is: one frozen `ModelConfig` for Llama 4 text decoders (and Llama-3-like dense ones), one `DraftConfig` for
EAGLE-3 heads, and `Tensors`, a lazy map from tensor name to numpy that knows BF16 and FP8.
What it refuses to be: a model, or a reader of anything that must be unpickled.
Run it: `python -m engine_plugins.native.checkpoint CHECKPOINT_DIR` prints the shape and every tensor.
"""

from __future__ import annotations

import json
import struct
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specs.errors import InputError, IntegrityError

STORAGE = {
    "F8_E4M3": np.uint8,
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def _e4m3_table() -> np.ndarray:
    code = np.arange(256)
    sign = np.where(code & 0x80, -1.0, 1.0)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    value[(code & 0x7F) == 0x7F] = np.nan
    return (sign * value).astype(np.float32)


E4M3_TO_FLOAT = _e4m3_table()


@dataclass(frozen=True)
class ModelConfig:
    """The target's shape. Sizes in elements; `rope_inv_freq` has head_dim/2 entries (rope scaling already applied)."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    intermediate_size: int  # routed and shared experts
    intermediate_size_mlp: int  # dense layers
    num_experts: int
    moe_layers: tuple[int, ...]
    rope_layers: tuple[bool, ...]  # False: NoPE, attends to everything
    attention_chunk_size: int  # 0: RoPE layers attend to everything
    attn_temperature_tuning: bool
    floor_scale: float
    attn_scale: float
    use_qk_norm: bool
    rope_interleaved: bool  # Llama 4: pairs (2i, 2i+1); Llama 3: halves
    rope_inv_freq: tuple[float, ...]
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dict; `model_config_from_dict` is its inverse."""
        return asdict(self)


@dataclass(frozen=True)
class DraftConfig:
    """An EAGLE-3 head's shape. `normalize_hidden_twice` follows modelopt's HF forward, which applies input_layernorm to
    the hidden state before hidden_norm; TensorRT-LLM applies hidden_norm alone."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    vocab_size: int
    draft_vocab_size: int
    capture_layers: tuple[int, ...]
    rope_inv_freq: tuple[float, ...]
    normalize_hidden_twice: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dict; `draft_config_from_dict` is its inverse."""
        return asdict(self)


def _tuples(record: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}


def model_config_from_dict(record: dict[str, Any]) -> ModelConfig:
    """Inverse of `ModelConfig.to_dict` after a trip through JSON."""
    return ModelConfig(**_tuples(record))


def draft_config_from_dict(record: dict[str, Any]) -> DraftConfig:
    """Inverse of `DraftConfig.to_dict` after a trip through JSON."""
    return DraftConfig(**_tuples(record))


def rope_inv_freq(config: dict[str, Any], head_dim: int, default_theta: float) -> tuple[float, ...]:
    """Inverse frequencies, with Llama 3's long-context scaling when the config asks for it (the only scaling we
    know)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or default_theta
    kind = rope.get("rope_type") or rope.get("type") or "default"
    exponents = np.arange(0, head_dim, 2, dtype=np.int64).astype(np.float32) / np.float32(head_dim)
    freq = (np.float32(1.0) / np.power(np.float32(theta), exponents, dtype=np.float32)).astype(np.float32)
    if kind == "default":
        return tuple(float(f) for f in freq)
    if kind != "llama3":
        raise InputError(
            f"rope_type {kind!r} is not supported", "config.json", "use a model with default or llama3 RoPE"
        )
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    old_context = rope["original_max_position_embeddings"]
    wavelength = 2 * np.pi / freq
    smooth = (old_context / wavelength - low) / (high - low)
    scaled = np.where(wavelength > old_context / low, freq / factor, freq)
    medium = (wavelength >= old_context / high) & (wavelength <= old_context / low)
    scaled = np.where(medium, (1 - smooth) * freq / factor + smooth * freq, scaled)
    return tuple(float(f) for f in scaled.astype(np.float32))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path.name} is missing", str(path.parent), "point to a Hugging Face model directory"
        ) from error
    except ValueError as error:
        raise IntegrityError(f"{path.name} is not JSON ({error})", str(path.parent), "download it again") from error


def _as_tuple(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)


def _common_fields(config: dict[str, Any], eos: Any) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "rms_norm_eps": config.get("rms_norm_eps", 1e-5),
        "intermediate_size": config["intermediate_size"],
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        "eos_token_ids": tuple(sorted(set(_as_tuple(config.get("eos_token_id")) + _as_tuple(eos)))),
        "bos_token_id": config.get("bos_token_id"),
    }


def _llama3_fields(config: dict[str, Any], layers: int, head_dim: int) -> dict[str, Any]:
    return {
        "intermediate_size_mlp": config["intermediate_size"],
        "num_experts": 0,
        "moe_layers": (),
        "rope_layers": (True,) * layers,
        "attention_chunk_size": 0,
        "attn_temperature_tuning": False,
        "floor_scale": 8192.0,
        "attn_scale": 0.1,
        "use_qk_norm": False,
        "rope_interleaved": False,
        "rope_inv_freq": rope_inv_freq(config, head_dim, 10000.0),
    }


def _llama4_fields(config: dict[str, Any], layers: int, head_dim: int) -> dict[str, Any]:
    step, interval = config.get("interleave_moe_layer_step", 1), config.get("no_rope_layer_interval", 4)
    moe = config.get("moe_layers")
    rope = config.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(layers)]
    return {
        "intermediate_size_mlp": config.get("intermediate_size_mlp", 16384),
        "num_experts": config.get("num_local_experts", 16),
        "moe_layers": tuple(moe) if moe is not None else tuple(range(step - 1, layers, step)),
        "rope_layers": tuple(bool(r) for r in rope[:layers]),
        "attention_chunk_size": config.get("attention_chunk_size") or 0,
        "attn_temperature_tuning": bool(config.get("attn_temperature_tuning", True)),
        "floor_scale": float(config.get("floor_scale", 8192)),
        "attn_scale": float(config.get("attn_scale", 0.1)),
        "use_qk_norm": bool(config.get("use_qk_norm", True)),
        "rope_interleaved": True,
        "rope_inv_freq": rope_inv_freq(config, head_dim, 500000.0),
    }


def read_model_config(directory: Path) -> ModelConfig:
    """config.json of a Llama4ForCausalLM, Llama4ForConditionalGeneration (its text part) or LlamaForCausalLM."""
    config = _read_json(directory / "config.json")
    algorithm = (config.get("quantization_config") or {}).get("quant_algo")
    if algorithm not in (None, "FP8"):
        raise InputError(
            f"a checkpoint in {algorithm} is not supported", str(directory), "the native engine runs BF16 and FP8"
        )
    if "text_config" in config:
        text = config["text_config"]
        config = {**text, "eos_token_id": config.get("eos_token_id", text.get("eos_token_id"))}
    kind = config.get("model_type", "")
    where = str(directory)
    if kind not in ("llama4_text", "llama4", "llama"):
        raise InputError(f"model_type {kind!r} is not supported", where, "the native engine runs llama4 and llama")
    if config.get("attention_bias"):
        raise InputError("attention_bias is not supported", where, "use a model without attention biases")
    if kind != "llama" and config.get("num_experts_per_tok", 1) != 1:
        raise InputError("only top-1 routing is supported", where, "use a Llama 4 model")
    generation = directory / "generation_config.json"
    common = _common_fields(config, _read_json(generation).get("eos_token_id") if generation.exists() else None)
    family = _llama3_fields if kind == "llama" else _llama4_fields
    return ModelConfig(**common, **family(config, common["num_layers"], common["head_dim"]))


def read_draft_config(directory: Path, target: ModelConfig) -> DraftConfig:
    """config.json of an EAGLE-3 draft; capture layers default to {1, n/2-1, n-4} (layer outputs, zero-based)."""
    config = _read_json(directory / "config.json")
    eagle = config.get("eagle_config") or {}
    layers = target.num_layers
    captures = config.get("eagle3_layers_to_capture") or eagle.get("eagle_aux_hidden_state_layer_ids")
    captures = captures or sorted({1, max(0, layers // 2 - 1), max(0, layers - 4)})
    if config["hidden_size"] != target.hidden_size:
        raise InputError(
            "the draft's hidden_size differs from the target's", str(directory), "train it for this target"
        )
    if config.get("num_hidden_layers", 1) != 1:
        raise InputError("only one-layer EAGLE-3 heads are supported", str(directory), "set num_hidden_layers to 1")
    if max(captures) >= layers or len(captures) != 3:
        raise InputError(
            f"capture layers {captures} do not fit {layers} layers", str(directory), "name three layer outputs"
        )
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return DraftConfig(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rms_norm_eps=config.get("rms_norm_eps", 1e-5),
        vocab_size=config["vocab_size"],
        draft_vocab_size=config.get("draft_vocab_size") or config["vocab_size"],
        capture_layers=tuple(captures),
        rope_inv_freq=rope_inv_freq(config, head_dim, 10000.0),
        normalize_hidden_twice=bool(eagle.get("use_input_layernorm_in_first_layer", False)),
    )


class Tensors:
    """Every tensor of a directory's safetensors files, memory-mapped; names without the vision wrapper's prefixes."""

    def __init__(self, directory: Path) -> None:
        self.where = str(directory)
        self._index: dict[str, tuple[Path, str, tuple[int, ...], int, int]] = {}
        self._maps: dict[Path, np.memmap] = {}
        files = sorted(directory.glob("*.safetensors")) if directory.is_dir() else [directory]
        if not files:
            raise InputError("no .safetensors file", self.where, "only safetensors checkpoints are read")
        index = directory / "model.safetensors.index.json"
        if index.exists():
            wanted = set(_read_json(index)["weight_map"].values())
            missing = sorted(wanted - {f.name for f in files})
            if missing:
                raise IntegrityError(f"shard {missing[0]} is missing", self.where, "download the checkpoint again")
        for file in files:
            self._read_header(file)

    def _read_header(self, file: Path) -> None:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length + 8 > size:
                raise IntegrityError(f"{file.name} is cut short", self.where, "download it again")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if 8 + length + end > size:
                raise IntegrityError(f"{file.name} is cut short at {name}", self.where, "download it again")
            for prefix in ("model.language_model.", "language_model.model.", "language_model."):
                if name.startswith(prefix):
                    name = ("" if prefix == "language_model." else "model.") + name[len(prefix) :]
                    break
            self._index[name] = (file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, 8 + length + end)

    def __contains__(self, name: str) -> bool:
        return name in self._index

    def names(self) -> list[str]:
        """Sorted tensor names."""
        return sorted(self._index)

    def dtype(self, name: str) -> str:
        """safetensors dtype, such as BF16 or F8_E4M3."""
        return self._index[name][1]

    def raw(self, name: str) -> np.ndarray:
        """The stored bits: BF16 as uint16, FP8 as uint8, other types as themselves."""
        if name not in self._index:
            raise IntegrityError(
                f"tensor {name} is missing", self.where, "the checkpoint is incomplete; download it again"
            )
        file, dtype, shape, begin, end = self._index[name]
        if dtype not in STORAGE:
            raise InputError(f"tensor {name} has dtype {dtype}", self.where, f"supported: {', '.join(STORAGE)}")
        if file not in self._maps:
            self._maps[file] = np.memmap(file, dtype=np.uint8, mode="r")
        return self._maps[file][begin:end].view(STORAGE[dtype]).reshape(shape)

    def float32(self, name: str) -> np.ndarray:
        """The values as float32 (FP8 without its scale)."""
        raw, dtype = self.raw(name), self.dtype(name)
        if dtype == "F8_E4M3":
            return E4M3_TO_FLOAT[raw]
        if dtype == "BF16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32)

    def scalar(self, name: str, default: float | None = None) -> float | None:
        """One float, or the default when the tensor is absent."""
        return float(self.float32(name).reshape(-1)[0]) if name in self._index else default


def main() -> None:
    """Print what a checkpoint holds."""
    directory = Path(sys.argv[1])
    print(json.dumps(read_model_config(directory).to_dict(), indent=1))
    tensors = Tensors(directory)
    for name in tensors.names():
        print(f"{name:70s} {tensors.dtype(name):8s} {list(tensors.raw(name).shape)}")


if __name__ == "__main__":
    main()
