"""Random checkpoints with the tiny Llama 4's architecture, for tests that need its shapes and not its knowledge.

Refuses to be a fixture with state: each call writes into the directory it is given.
Run it: `python -m pytest tests/tasks`.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

DOMAINS = ("code", "extract", "facts", "math")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m['role'] }}<|end|>{{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|end|>{% endif %}"
)


def llama4_config(**changes: object) -> Llama4TextConfig:
    """Four layers, dense and MoE, one of them without RoPE."""
    values = dict(
        vocab_size=256, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=16, num_key_value_heads=2,
        intermediate_size=96, intermediate_size_mlp=128, num_local_experts=4, num_experts_per_tok=1,
        interleave_moe_layer_step=2, attention_chunk_size=32, attn_temperature_tuning=True, floor_scale=16,
        attn_scale=0.1,
        use_qk_norm=False, tie_word_embeddings=False, max_position_embeddings=512, rope_theta=10000.0,
        bos_token_id=0, eos_token_id=3, pad_token_id=4, initializer_range=0.08,
    )  # fmt: skip
    config = Llama4TextConfig(**{**values, **changes})
    config.architectures = ["Llama4ForCausalLM"]
    return config


def write_checkpoint(path: Path, config: object = None, seed: int = 0) -> Path:
    """A BF16 checkpoint with tokenizer and chat template."""
    torch.manual_seed(seed)
    config = config or llama4_config()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    write_tokenizer(path)
    return path


def write_llama3(path: Path) -> Path:
    """A dense Llama 3 shape."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, max_position_embeddings=256, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    return write_checkpoint(path, config)


def write_multimodal(path: Path) -> Path:
    """Llama 4 with a vision tower: the `language_model.` prefix, and parts that must stay unquantized."""
    vision = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=28, patch_size=14,
        vision_output_dim=64, projector_input_dim=64, projector_output_dim=64,
    )  # fmt: skip
    config = Llama4Config(text_config=llama4_config().to_dict(), vision_config=vision)
    config.architectures = ["Llama4ForConditionalGeneration"]
    torch.manual_seed(0)
    Llama4ForConditionalGeneration(config).bfloat16().save_pretrained(path)
    write_tokenizer(path)
    return path


def rename_newer(path: Path) -> Path:
    """The multimodal checkpoint's tensors under the names of transformers' newer layout."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    older = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_model.": "model.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    renamed = {
        next(new + name.removeprefix(old) for old, new in older.items() if name.startswith(old)): tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_tokenizer(path: Path) -> None:
    """One token per printable character."""
    special = ["<|begin|>", "<|header|>", "<|end|>", "<|eot|>", "<|pad|>", "<|unk|>"]
    vocab = {token: i for i, token in enumerate([*special, *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|eot|>", pad_token="<|pad|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|header|>", "<|end|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)


def write_prompts(path: Path, per_domain: int = 12) -> Path:
    """A prompts file with four domains."""
    rows = [
        {"id": f"{domain}-{i}", "domain": domain, "prompt": f"{domain} problem {i * i}: what is {i} + {i % 7}?"}
        for i in range(per_domain)
        for domain in DOMAINS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
