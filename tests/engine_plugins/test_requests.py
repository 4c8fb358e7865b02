"""Requests' lives: limits, stop conditions, cancellation, text. Run: `pytest tests/engine_plugins/test_requests.py`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine_plugins.native.bundle import build_bundle
from engine_plugins.native.engine import Engine, SamplingParams
from engine_plugins.native.tokenizer import ChatTokenizer, TextStream
from specs.errors import InputError
from tests.engine_plugins.models import save_llama4, tokens

REAL_TOKENIZER = Path(__file__).parents[2] / "specs" / "models" / "tiny-llama4"


@pytest.fixture(scope="session")
def talking_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the tiny model's real tokenizer and chat template."""
    root = tmp_path_factory.mktemp("talking")
    save_llama4(root / "model", vocab_size=1024, num_hidden_layers=4)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(REAL_TOKENIZER / name, root / "model" / name)
    build_bundle(root / "model", root / "bundle", max_seq_len=256, max_batch_size=2)
    return root / "bundle"


def test_a_prompt_too_long_is_refused_with_the_limit(bundles: Path, open_engine: Callable[..., Engine]) -> None:
    with pytest.raises(InputError, match=r"256 tokens.*at most 255"):
        open_engine(bundles / "tiny").submit(tokens(256))


@pytest.mark.parametrize("prompt", [[], [512], [-1]])
def test_a_prompt_that_cannot_be_served_is_refused(
    bundles: Path, prompt: list[int], open_engine: Callable[..., Engine]
) -> None:
    with pytest.raises(InputError):
        open_engine(bundles / "tiny").submit(prompt)


@pytest.mark.parametrize("bad", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_parameters_that_make_no_sense_are_refused(
    bundles: Path, bad: dict, open_engine: Callable[..., Engine]
) -> None:
    with pytest.raises(InputError):
        open_engine(bundles / "tiny").submit([5], SamplingParams(**bad))


def test_more_requests_than_slots_all_finish(bundles: Path, open_engine: Callable[..., Engine]) -> None:
    done = open_engine(bundles / "tiny").generate(
        [tokens(n % 9 + 1, n) for n in range(20)], SamplingParams(max_tokens=9, ignore_eos=True)
    )
    assert [len(c.token_ids) for c in done] == [9] * 20


def test_cancelling_frees_the_slot(bundles: Path, open_engine: Callable[..., Engine]) -> None:
    engine = open_engine(bundles / "tiny")
    running = [engine.submit(tokens(5, n), SamplingParams(max_tokens=200, ignore_eos=True)) for n in range(4)]
    waiting = engine.submit(tokens(5), SamplingParams(max_tokens=5, ignore_eos=True))
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (4, 1)
    engine.cancel(running[0].id)
    events = engine.step()
    assert [e.finish_reason for e in events if e.request_id == running[0].id] == ["cancelled"]
    assert (engine.num_running, engine.num_waiting, waiting.slot >= 0) == (4, 0, True)


def test_cancelling_a_waiting_or_unknown_request_is_safe(bundles: Path, open_engine: Callable[..., Engine]) -> None:
    engine = open_engine(bundles / "tiny")
    request = engine.submit(tokens(5))
    engine.cancel(request.id)
    engine.cancel(12345)
    assert [e.finish_reason for e in engine.step()] == ["cancelled"]
    assert not engine.has_work


def test_eos_ends_and_is_the_last_token(bundles: Path, open_engine: Callable[..., Engine]) -> None:
    engine, prompt = open_engine(bundles / "tiny"), tokens(8)
    free = engine.generate([prompt], SamplingParams(max_tokens=30, ignore_eos=True))[0].token_ids
    engine._eos = frozenset({free[10]})
    done = engine.generate([prompt], SamplingParams(max_tokens=30))[0]
    assert (done.token_ids, done.finish_reason) == (free[: free.index(free[10]) + 1], "stop")


def test_events_add_up_to_the_completion(talking_bundle: Path, open_engine: Callable[..., Engine]) -> None:
    engine = open_engine(talking_bundle)
    request = engine.submit(tokens(8), SamplingParams(max_tokens=40, ignore_eos=True))
    events = []
    while engine.has_work:
        events += engine.step()
    assert [t for e in events for t in e.token_ids] == request.output_ids
    assert "".join(e.text for e in events) == request.text == engine.decode(request.output_ids)


def test_a_stop_string_ends_the_text_before_it(talking_bundle: Path, open_engine: Callable[..., Engine]) -> None:
    engine, prompt = open_engine(talking_bundle), tokens(8)
    text = engine.generate([prompt], SamplingParams(max_tokens=60, ignore_eos=True))[0].text
    stop = text[20:24]
    done = engine.generate([prompt], SamplingParams(max_tokens=60, ignore_eos=True, stop=(stop,)))[0]
    assert (done.text, done.finish_reason) == (text[: text.index(stop)], "stop")


def test_a_stop_string_over_a_token_border_is_never_shown() -> None:
    tokenizer = ChatTokenizer(REAL_TOKENIZER)
    ids = tokenizer.encode("one two STOP three")
    stream, shown = TextStream(tokenizer, ("STOP",)), []
    for token in ids:
        if stream.stopped:
            break
        shown.append(stream.push([token], final=False))
    assert ("".join(shown), stream.stopped) == ("one two ", True)


@pytest.mark.parametrize("byte_level", [True, False])
def test_half_a_character_is_held_back(byte_level: bool) -> None:
    tokenizer = ChatTokenizer(REAL_TOKENIZER)
    if not byte_level:
        tokenizer.pieces = None
    ids = tokenizer.encode("caf\u00e9 \u4f60\u597d \U0001f600!")
    stream, shown = TextStream(tokenizer, ()), []
    for i, token in enumerate(ids):
        shown.append(stream.push([token], final=i == len(ids) - 1))
    assert "\ufffd" not in "".join(shown)
    assert "".join(shown) == tokenizer.decode(ids)


def test_bytes_of_tokens_join_to_what_the_tokenizer_decodes() -> None:
    """Every token, special ones left out, in an order that also makes bytes that are no text."""
    tokenizer = ChatTokenizer(REAL_TOKENIZER)
    ids = [(7 * i) % 1024 for i in range(1024)]
    stream = TextStream(tokenizer, ())
    assert "".join(stream.push([token], final=i == 1023) for i, token in enumerate(ids)) == tokenizer.decode(ids)


def test_chat_goes_through_the_models_template(talking_bundle: Path, open_engine: Callable[..., Engine]) -> None:
    from transformers import AutoTokenizer

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 3?"}]
    theirs = AutoTokenizer.from_pretrained(REAL_TOKENIZER).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert open_engine(talking_bundle).encode_chat(messages) == theirs


def test_a_bundle_without_tokenizer_still_serves_ids(bundles: Path, open_engine: Callable[..., Engine]) -> None:
    engine = open_engine(bundles / "tiny")
    assert len(engine.generate([[5, 6]], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3
    with pytest.raises(InputError, match="no tokenizer"):
        engine.encode("text")


def test_counters_name_the_backend_and_split_the_time(bundles: Path, open_engine: Callable[..., Engine]) -> None:
    engine = open_engine(bundles / "tiny")
    engine.generate([tokens(20)], SamplingParams(max_tokens=50, ignore_eos=True))
    counters = engine.counters()
    assert (counters["backend"], counters["draft_tokens"], counters["tokens"]) == ("native", 3, 50)
    split = counters["seconds_by_group"]
    assert {"qkv", "attention", "o", "dense_mlp", "moe", "lm_head", "norms", "draft", "sampling", "host"} <= set(split)
    assert 0.8 * counters["seconds"] < sum(split.values()) <= 1.05 * counters["seconds"]


def test_logits_that_are_not_numbers_end_the_request_and_free_the_slot(
    models: Path, tmp_path: Path, open_engine: Callable[..., Engine]
) -> None:
    """Finite weights may still overflow: packing cannot see it, the first step does."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(models / "tiny", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["lm_head.weight"].fill_(3e38)
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    build_bundle(
        tmp_path / "model",
        tmp_path / "bundle",
        draft=models / "draft",
        draft_tokens=3,
        max_seq_len=64,
        max_batch_size=1,
    )
    engine = open_engine(tmp_path / "bundle")
    done = engine.generate([tokens(5), tokens(6)], SamplingParams(max_tokens=9))
    assert [(c.token_ids, c.finish_reason) for c in done] == [([], "error")] * 2
