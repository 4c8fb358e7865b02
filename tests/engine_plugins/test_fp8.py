"""FP8 as modelopt means it: grid, scales, cache. Run: `pytest tests/engine_plugins/test_fp8.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine_plugins.native.engine import Engine, SamplingParams
from engine_plugins.native.reference import ReferenceModel
from engine_plugins.ops.formats import fake_quantize_e4m3
from tests.engine_plugins.models import tokens


def test_fake_quantize_saturates_and_rounds_to_even() -> None:
    x = torch.tensor([1000.0, -1000.0, 1.0625, 1.1875, 2.0**-10, 3 * 2.0**-10, 0.0])
    expected = torch.tensor([448.0, -448.0, 1.0, 1.25, 0.0, 2.0**-8, 0.0])
    assert torch.equal(fake_quantize_e4m3(x, 1.0), expected)


@pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn.o_proj", "feed_forward.shared_expert.down_proj"])
def test_exported_layer_computes_what_modelopt_computed(fp8_checkpoint: Path, part: str) -> None:
    calls = torch.load(fp8_checkpoint / "fake.pt", weights_only=True)["calls"]
    given, expected = calls[f"model.layers.1.{part}"]
    layer = ReferenceModel.from_checkpoint(fp8_checkpoint).layers[1]
    linear = {"self_attn.q_proj": layer["q"], "self_attn.o_proj": layer["o"]}.get(part, layer["mlp"][2])
    rows = given.reshape(-1, given.shape[-1])
    difference = (linear(rows) - expected.reshape(len(rows), -1)).abs()
    assert difference.mean() < 1e-4  # a rare tie of rounding; a wrong scale gives 1e-2


def test_experts_take_one_scale_for_all(fp8_checkpoint: Path) -> None:
    given, expected = torch.load(fp8_checkpoint / "fake.pt", weights_only=True)["calls"][
        "model.layers.1.feed_forward.experts"
    ]
    experts = ReferenceModel.from_checkpoint(fp8_checkpoint).layers[1]["experts"]
    rows = given.shape[0] // len(experts)
    for index, (gate, up, down) in enumerate(experts):
        x = given[index * rows : (index + 1) * rows]
        ours = down(torch.nn.functional.silu(gate(x)) * up(x))
        assert (ours - expected[index * rows : (index + 1) * rows]).abs().mean() < 1e-4


def test_attention_rounds_keys_and_values(fp8_checkpoint: Path) -> None:
    """A whole attention call of modelopt's model, cache rounding included, on a local and a global layer."""
    calls = torch.load(fp8_checkpoint / "fake.pt", weights_only=True)["calls"]
    model = ReferenceModel.from_checkpoint(fp8_checkpoint)
    for index in (0, 3):
        given, expected = calls[f"model.layers.{index}.self_attn"]
        difference = (model._attention(index, given[0]) - expected[0]).abs()
        assert difference.mean() < 1e-4  # a tie in rounding may fall either way; a missing rounding gives 1e-2


def test_engine_agrees_with_the_reference(
    fp8_checkpoint: Path, fp8_bundle: Path, open_engine: Callable[..., Engine]
) -> None:
    """Short texts: one value that falls on the other side of a tie changes everything after it, so most must be
    exact."""
    engine, model = open_engine(fp8_bundle), ReferenceModel.from_checkpoint(fp8_checkpoint)
    worst = [
        np.abs(engine.logits(ids) - model.logits(ids)).max() for ids in (tokens(6, seed) for seed in range(40, 60))
    ]
    assert np.median(worst) < 1e-4
    assert max(worst) < 1.0


def test_engine_agrees_with_modelopts_model(
    fp8_checkpoint: Path, fp8_bundle: Path, open_engine: Callable[..., Engine]
) -> None:
    record = torch.load(fp8_checkpoint / "fake.pt", weights_only=True)
    ours = torch.from_numpy(open_engine(fp8_bundle).logits(record["ids"]))
    theirs = record["logits"]
    kl = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1)
    assert kl[:2].max() < 1e-5  # before the first tie falls the other way
    assert kl.mean() < 0.02


def test_fp8_speculation_does_not_change_greedy_output(
    fp8_bundle: Path, prompts: list[list[int]], open_engine: Callable[..., Engine]
) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    fast = open_engine(fp8_bundle).generate(prompts, params)
    slow = open_engine(fp8_bundle, speculate=False).generate(prompts, params)
    assert [c.token_ids for c in fast] == [c.token_ids for c in slow]
