"""speculators' layout of a trained head: its names, its count of layers, its vocabulary; loaded by it in the bench."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.train_draft import speculators
from tests.tasks.random_checkpoints import write_checkpoint

TARGETS = [2, 5, 7, 9]  # what the four draft tokens mean
CONFIG = {"hidden_size": 64, "vocab_size": 256, "draft_vocab_size": 4, "num_attention_heads": 4, "head_dim": 16,
          "rope_theta": 10000.0, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 23, 44]}}  # fmt: skip


@pytest.fixture
def exported(tmp_path: Path) -> tuple[dict, dict, dict]:
    """(config, tensors, the source's tensors)."""
    source, draft = write_checkpoint(tmp_path / "source"), tmp_path / "draft"
    draft.mkdir()
    (draft / "config.json").write_text(json.dumps(CONFIG))
    tensors = {"midlayer.hidden_norm.weight": torch.ones(64), "lm_head.weight": torch.rand(4, 64)}
    save_file({**tensors, "d2t": torch.tensor(TARGETS) - torch.arange(4)}, draft / "model.safetensors")
    speculators.export(draft, source, tmp_path / "out", "meta-llama/Llama-4")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    return config, load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")


def test_layers_are_counted_from_the_embedding(exported: tuple[dict, dict, dict]) -> None:
    assert exported[0]["eagle_aux_hidden_state_layer_ids"] == [2, 24, 45]


def test_the_verifier_is_named_and_the_layer_is_llamas(exported: tuple[dict, dict, dict]) -> None:
    config = exported[0]
    assert config["speculators_config"]["verifier"]["name_or_path"] == "meta-llama/Llama-4"
    assert config["transformer_layer_config"]["model_type"] == "llama"
    assert config["transformer_layer_config"]["rope_theta"] == 10000.0


def test_names_and_embedding(exported: tuple[dict, dict, dict]) -> None:
    _, tensors, source = exported
    assert set(tensors) == {"layers.0.hidden_norm.weight", "lm_head.weight", "embed_tokens.weight", "d2t", "t2d"}
    assert torch.equal(tensors["embed_tokens.weight"], source["model.embed_tokens.weight"])


def test_t2d_marks_what_d2t_means(exported: tuple[dict, dict, dict]) -> None:
    assert exported[1]["t2d"].nonzero().squeeze(-1).tolist() == TARGETS
