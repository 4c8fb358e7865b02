"""The compiled step's arithmetic: against the reference, across instruction sets, batches and threads.

Run: `pytest tests/engine_plugins/test_engine_numbers.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine_plugins.native.engine import Engine, SamplingParams
from engine_plugins.native.reference import ReferenceModel
from specs.errors import IntegrityError
from tests.engine_plugins.models import save_draft, tokens


@pytest.mark.parametrize("name", ["tiny", "scout", "llama3"])
def test_logits_agree_with_the_reference(
    models: Path, bundles: Path, name: str, open_engine: Callable[..., Engine]
) -> None:
    model = ReferenceModel.from_checkpoint(models / name)
    model.cache_bfloat16 = True
    ids = tokens(200)
    assert np.abs(open_engine(bundles / name).logits(ids) - model.logits(ids)).max() < 5e-3


def test_logits_agree_with_transformers(models: Path, bundles: Path, open_engine: Callable[..., Engine]) -> None:
    """Up to the BF16 cache, which transformers in fp32 does not have."""
    from transformers import Llama4ForCausalLM

    theirs = Llama4ForCausalLM.from_pretrained(models / "tiny", dtype=torch.float32, attn_implementation="eager").eval()
    ids = tokens(200)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    ours = open_engine(bundles / "tiny").logits(ids)
    assert np.abs(ours - expected).mean() < 0.02
    assert (ours.argmax(1) == expected.argmax(1)).mean() > 0.97


@pytest.mark.parametrize("isa", ["avx512", "avx512_bf16"])
@pytest.mark.parametrize("quantized", [False, True])
def test_every_instruction_set_gives_the_same_bits(
    bundles: Path, fp8_bundle: Path, isa: str, quantized: bool, open_engine: Callable[..., Engine]
) -> None:
    ids, bundle = tokens(150), fp8_bundle if quantized else bundles / "tiny"
    narrow = open_engine(bundle, isa="avx2").logits(ids)
    try:
        wide = open_engine(bundle, isa=isa)
    except IntegrityError:
        pytest.skip(f"this CPU has no {isa}")
    assert wide.counters()["isa"] == isa
    assert np.array_equal(narrow, wide.logits(ids))


@pytest.mark.parametrize("name", ["tiny", "scout", "llama3", "fp8"])
def test_fusion_does_not_change_a_bit(
    bundles: Path, fp8_bundle: Path, name: str, open_engine: Callable[..., Engine]
) -> None:
    ids, bundle = tokens(150), fp8_bundle if name == "fp8" else bundles / name
    fused, apart = open_engine(bundle), open_engine(bundle, fused=False)
    assert np.array_equal(fused.logits(ids), apart.logits(ids))
    if name in ("tiny", "fp8"):
        assert np.array_equal(fused.hidden(ids), apart.hidden(ids))


def test_the_fused_path_really_ran(bundles: Path, open_engine: Callable[..., Engine]) -> None:
    """Five joins a layer, one for the head and one for the choice; apart, each operator and each expert has its own."""
    phases = {}
    for fused in (True, False):
        engine = open_engine(bundles / "tiny", speculate=False, fused=fused)
        engine.generate([[5]], SamplingParams(max_tokens=20, ignore_eos=True))
        counters = engine.counters()
        phases[fused] = counters["phases"] / counters["cycles"]
    layers = 8
    assert phases[True] == 5 * layers + 2
    assert phases[False] > 3 * phases[True]


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_threads_do_not_change_a_bit(bundles: Path, threads: int, open_engine: Callable[..., Engine]) -> None:
    ids = tokens(150)
    assert np.array_equal(
        open_engine(bundles / "tiny", threads=threads).logits(ids), open_engine(bundles / "tiny").logits(ids)
    )


def test_a_row_does_not_depend_on_how_many_run_with_it(bundles: Path, open_engine: Callable[..., Engine]) -> None:
    """Logits of a prefix, which ends in tiles of other sizes, equal the whole text's."""
    engine, ids = open_engine(bundles / "tiny"), tokens(70)
    whole = engine.logits(ids)
    for size in (1, 2, 3, 5, 17, 33, 69):
        assert np.array_equal(engine.logits(ids[:size]), whole[:size]), size


def test_draft_logits_agree_with_the_reference(models: Path, bundles: Path, open_engine: Callable[..., Engine]) -> None:
    model = ReferenceModel.from_checkpoint(models / "tiny", models / "draft")
    model.cache_bfloat16 = True
    ids = tokens(100)
    _, outputs = model.forward(ids)
    expected = model.draft.forward(ids[1:], model.draft.combine(outputs)[:-1])[0].numpy()
    assert np.abs(open_engine(bundles / "tiny").draft_logits(ids) - expected).max() < 2e-2


def test_captured_features_are_layer_outputs(models: Path, bundles: Path, open_engine: Callable[..., Engine]) -> None:
    """{1, n/2-1, n-4}, zero-based outputs: off by one here is the classic acceptance killer."""
    ids = tokens(40)
    _, outputs = ReferenceModel.from_checkpoint(models / "tiny").forward(ids)
    hidden = open_engine(bundles / "tiny").hidden(ids, [1, 3, 4])
    for column, layer in enumerate((1, 3, 4)):
        assert np.abs(hidden[:, column] - outputs[layer].numpy()).mean() < 1e-2


@pytest.mark.parametrize("twice", [False, True])
def test_draft_reference_agrees_with_modelopts_head(models: Path, tmp_path: Path, twice: bool) -> None:
    """modelopt's HF forward normalizes the hidden state twice; told so, we compute the same; told not to, we do not."""
    from modelopt.torch.speculative.plugins.modeling_eagle import EagleModule
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    draft = save_draft(tmp_path / "draft", twice=twice)
    model = ReferenceModel.from_checkpoint(models / "tiny", draft)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=1,
        intermediate_size=120,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    for key, value in {
        "use_last_layernorm": True,
        "use_aux_hidden_state": True,
        "eagle_aux_hidden_state_layer_ids": [1, 3, 4],
        "draft_vocab_size": 256,
        "has_lm_head": True,
        "eagle_decoder_type": "llama",
    }.items():
        setattr(config, key, value)
    config._attn_implementation = "eager"
    theirs = EagleModule(config, LlamaDecoderLayer)
    theirs._maybe_init_rope()
    names = {
        f"layers.0.{k}" if k.startswith(("self_attn", "mlp", "input_l", "hidden_n", "post_")) else k: v
        for k, v in model.draft.weights.items()
    }
    theirs.load_state_dict({f"{k}.weight": v for k, v in names.items()}, strict=False)
    ids, features = tokens(20), torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    mask = torch.full((20, 20), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        after_norm, before_norm, _ = theirs(features[None], model.embed[torch.tensor(ids)][None], mask)
        expected = theirs.lm_head(after_norm)[0]
    logits, hidden = model.draft.forward(ids, features)
    assert torch.allclose(logits, expected, atol=1e-4) == twice
    assert torch.allclose(hidden, before_norm[0], atol=1e-4) == twice


def test_sampled_output_is_the_same_on_any_number_of_threads(
    bundles: Path, prompts: list[list[int]], open_engine: Callable[..., Engine]
) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.9, seed=7, ignore_eos=True)
    one = open_engine(bundles / "tiny", threads=1).generate(prompts, params)
    many = open_engine(bundles / "tiny", threads=4).generate(prompts, params)
    assert [c.token_ids for c in one] == [c.token_ids for c in many]
