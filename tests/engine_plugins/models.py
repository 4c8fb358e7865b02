"""Random models for the engine's tests: small enough for a second, with every layer type. Run: imported by
conftest.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 8,
    "intermediate_size": 72,
    "intermediate_size_mlp": 136,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 32,
    "attn_temperature_tuning": True,
    "floor_scale": 16,
    "attn_scale": 0.1,
    "use_qk_norm": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "eos_token_id": [2],
    "bos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}


def randomize(model: torch.nn.Module) -> None:
    """Norms that are not all ones, routers that choose clearly."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif "router" in name:
                parameter.mul_(4)


def save_llama4(path: Path, *, fp32_linears: bool = False, **changes: Any) -> Path:
    """A random Llama4ForCausalLM checkpoint. `fp32_linears` leaves what will be quantized in fp32: BF16 values
    often sit on
    an exact tie of the FP8 grid, where modelopt's export and its fake quantization round differently."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    model = Llama4ForCausalLM(Llama4TextConfig(**{**TINY, **changes})).eval()
    randomize(model)
    if fp32_linears:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "_proj" not in name:
                    parameter.copy_(parameter.bfloat16())
    else:
        model = model.to(torch.bfloat16)
    model.save_pretrained(path)
    return path


def save_llama3(path: Path) -> Path:
    """A random dense Llama with half-rotation RoPE and llama3 scaling."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=3,
        intermediate_size=136,
        max_position_embeddings=512,
        rope_parameters=rope,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    randomize(model)
    model.save_pretrained(path)
    return path


def save_draft(
    path: Path, *, draft_vocab: int = 256, twice: bool = False, target: dict[str, Any] = TINY, sharp: float = 3.0
) -> Path:
    """A random EAGLE-3 head in TensorRT-LLM's layout."""
    generator = torch.Generator().manual_seed(3)
    H, heads, kv, D, inter = target["hidden_size"], 4, 2, 16, 120
    path.mkdir(parents=True, exist_ok=True)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(torch.bfloat16)

    def norm() -> torch.Tensor:
        return (1 + 0.2 * torch.randn(H, generator=generator)).to(torch.bfloat16)

    tensors = {
        "fc.weight": weight(H, 3 * H),
        "norm.weight": norm(),
        "lm_head.weight": weight(draft_vocab, H) * sharp,
        **{f"midlayer.{n}.weight": norm() for n in ("input_layernorm", "hidden_norm", "post_attention_layernorm")},
        "midlayer.self_attn.q_proj.weight": weight(heads * D, 2 * H),
        "midlayer.self_attn.k_proj.weight": weight(kv * D, 2 * H),
        "midlayer.self_attn.v_proj.weight": weight(kv * D, 2 * H),
        "midlayer.self_attn.o_proj.weight": weight(H, heads * D),
        "midlayer.mlp.gate_proj.weight": weight(inter, H),
        "midlayer.mlp.up_proj.weight": weight(inter, H),
        "midlayer.mlp.down_proj.weight": weight(H, inter),
    }
    if draft_vocab < target["vocab_size"]:
        ids = torch.randperm(target["vocab_size"], generator=generator)[:draft_vocab].sort().values
        tensors["d2t"] = ids - torch.arange(draft_vocab)
    save_file(tensors, path / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": H,
        "intermediate_size": inter,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": D,
        "num_hidden_layers": 1,
        "vocab_size": target["vocab_size"],
        "draft_vocab_size": draft_vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "eagle_config": {"use_input_layernorm_in_first_layer": twice},
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def tokens(count: int, seed: int = 0, vocab: int = 512) -> list[int]:
    """Random token ids, none of them special."""
    return np.random.default_rng(seed).integers(3, vocab, count).tolist()


def save_fp8(source: Path, out: Path) -> Path:
    """A BF16 checkpoint in modelopt's FP8 layout, KV included, by a plain rule: weights by their largest value, one
    input scale for all. Where modelopt is not installed it gives the engines something to agree on."""
    import shutil

    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {}
    for name, value in load_file(source / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = value
            continue
        stem, dot = (name.removesuffix(".weight"), ".") if name.endswith(".weight") else (name, "_")
        scale = value.float().abs().max() / 448
        tensors[name] = (value.float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{stem}{dot}weight_scale"] = scale
        tensors[f"{stem}{dot}input_scale"] = torch.tensor(0.015)
        if stem.endswith(("k_proj", "v_proj")):
            tensors[f"{stem}.{stem[-6]}_scale"] = torch.tensor(0.02)
    save_file(tensors, out / "model.safetensors")
    return out
