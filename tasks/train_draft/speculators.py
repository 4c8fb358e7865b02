"""A trained head in speculators' layout, which vLLM serves: the same weights under its names, with the embedding.

Layers are counted as transformers counts hidden states there, the embedding first: one more than TensorRT-LLM's ids.
Refuses to train, and to need speculators: the layout is its 0.9's, and the bench loads what comes out with it.
Run it: `python -m tasks.train_draft.speculators DRAFT SOURCE OUT`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from engine_plugins.native.checkpoint import Tensors

NUM_DRAFTS = 3
_LAYER = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
    "vocab_size", "max_position_embeddings", "hidden_act", "rope_theta",
)  # fmt: skip


def export(draft: Path, source: Path, out: Path, verifier: str = "") -> None:
    """config.json and model.safetensors in `out`; `verifier` is the target's name there, `source`'s path by default."""
    config = json.loads((draft / "config.json").read_text())
    tensors = {
        name.replace("midlayer.", "layers.0."): tensor
        for name, tensor in load_file(draft / "model.safetensors").items()
    }
    embedding = torch.from_numpy(Tensors(source).float32("model.embed_tokens.weight").copy())
    tensors["embed_tokens.weight"] = embedding.bfloat16()
    if "d2t" in tensors:
        known = torch.zeros(config["vocab_size"], dtype=torch.bool)
        known[torch.arange(len(tensors["d2t"])) + tensors["d2t"]] = True
        tensors["t2d"] = known
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    described = describe(config, verifier or str(source), json.loads((source / "config.json").read_text()))
    (out / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def describe(config: dict[str, Any], verifier: str, target: dict[str, Any]) -> dict[str, Any]:
    """speculators' config of a head that TensorRT-LLM's `config` describes."""
    layer = {name: config[name] for name in _LAYER if config.get(name) is not None}
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": config["draft_vocab_size"],
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]],
        "transformer_layer_config": {
            "model_type": "llama", "num_hidden_layers": 1, "attention_bias": False, "mlp_bias": False,
            "tie_word_embeddings": False, **layer,
        },
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": NUM_DRAFTS}],
            "verifier": {"name_or_path": verifier, "architectures": target.get("architectures") or []},
        },
        "torch_dtype": "bfloat16",
    }  # fmt: skip


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
