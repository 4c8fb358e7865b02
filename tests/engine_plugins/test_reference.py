"""The reference agrees with transformers on every layer type. Run: `pytest tests/engine_plugins/test_reference.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine_plugins.native.reference import ReferenceModel
from tests.engine_plugins.models import tokens


@pytest.mark.parametrize("name", ["tiny", "scout", "llama3"])
def test_agrees_with_transformers(models: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        models / name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = tokens(100)  # three chunks, six temperature steps
    with torch.no_grad():
        expected = theirs(torch.tensor([ids]), output_hidden_states=True)
    logits, outputs = ReferenceModel.from_checkpoint(models / name).forward(ids)
    assert torch.allclose(logits, expected.logits[0], atol=2e-5)
    for i, output in enumerate(outputs[:-1]):  # transformers lists the last one after its norm
        assert torch.allclose(output, expected.hidden_states[i + 1][0], atol=2e-5), f"layer {i}"


def test_chunked_attention_forgets_across_a_chunk(models: Path) -> None:
    """With only RoPE layers below it, position 32 must not see position 31."""
    model = ReferenceModel.from_checkpoint(models / "tiny")
    ids = tokens(40)
    changed = [ids[0] ^ 1, *ids[1:]]
    (_, one), (_, two) = model.forward(ids), model.forward(changed)
    assert not torch.equal(one[2][5], two[2][5])
    assert torch.equal(one[2][35], two[2][35])  # layers 0..2 are local
    assert not torch.equal(one[3][35], two[3][35])  # layer 3 is NoPE: global
