"""Every detector of the train_draft stage fires on the fault it is for, and is quiet without it."""

from __future__ import annotations

import pytest
import torch

from specs.errors import IntegrityError
from tasks.train_draft import data, detectors, head, vocabulary

STATES = [torch.full((5, 4), float(i)) + torch.arange(4) for i in range(1, 10)]  # embeddings, then 8 layers


def features(layers: list[int]) -> torch.Tensor:
    return torch.cat([STATES[layer + 1] for layer in layers], -1)


def test_features_of_the_right_layers_pass() -> None:
    detectors.check_capture_layers([1, 3, 4], [1, 3, 4], 8)
    detectors.check_features(features([1, 3, 4]), STATES, [1, 3, 4])


def test_capture_layers_off_by_one_in_the_ids() -> None:
    with pytest.raises(IntegrityError, match=r"\[2, 4, 5\].*\[1, 3, 4\]"):
        detectors.check_capture_layers([1, 3, 4], [2, 4, 5], 8)


def test_capture_layers_off_by_one_in_the_tensors() -> None:
    """The fault: hidden_states[i] taken for the output of layer i."""
    with pytest.raises(IntegrityError, match="layer 1"):
        detectors.check_features(features([0, 2, 3]), STATES, [1, 3, 4])


def test_capture_layers_that_do_not_exist() -> None:
    with pytest.raises(IntegrityError, match="not three layers of 8"):
        detectors.check_capture_layers([1, 3, 8], [1, 3, 8], 8)


PROMPT, ANSWER = [1, 2, 3, 4], [10, 11, 12, 9]


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_loss_mask_off_by_one(shift: int) -> None:
    mask = list(data.answer_mask(len(PROMPT), len(ANSWER)))
    shifted = [mask[(i - shift) % len(mask)] for i in range(len(mask))]
    if shift == 0:
        detectors.check_loss_mask(PROMPT + ANSWER, shifted, ANSWER, "code-1")
        return
    with pytest.raises(IntegrityError, match="loss mask") as error:
        detectors.check_loss_mask(PROMPT + ANSWER, shifted, ANSWER, "code-1")
    assert error.value.where == "code-1"


def test_prompt_and_answer_cut_at_the_wrong_place() -> None:
    detectors.check_prompt_end({77}, "answers.jsonl")
    with pytest.raises(IntegrityError, match="2 different tokens"):
        detectors.check_prompt_end({77, 10}, "answers.jsonl")


def test_another_chat_template() -> None:
    detectors.check_template("a" * 64, "a" * 64)
    with pytest.raises(IntegrityError, match="template"):
        detectors.check_template("a" * 64, "b" * 64)


def test_a_chosen_vocabulary_is_sound() -> None:
    d2t = vocabulary.choose([[5, 5, 9, 2], [9, 7]], 4, 16)
    detectors.check_vocabulary(d2t, 16)
    assert (torch.arange(4) + d2t).tolist() == [2, 5, 7, 9]
    assert vocabulary.covered_share([[5, 9, 1]], d2t) == pytest.approx(2 / 3)


def test_a_vocabulary_larger_than_what_was_seen_is_filled_up() -> None:
    assert (torch.arange(3) + vocabulary.choose([[2]], 3, 8)).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("targets", "message"), [([2, 2, 7], "same target"), ([2, 5, 16], "outside"), ([5, 2, 7], "ascending")]
)
def test_d2t_that_is_no_bijection(targets: list[int], message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        detectors.check_vocabulary(torch.tensor(targets) - torch.arange(3), 16)


def test_another_backbone() -> None:
    answers = torch.arange(100)
    assert detectors.check_backbone(answers.where(answers > 4, -1), answers) == pytest.approx(0.95)
    with pytest.raises(IntegrityError, match="would have said 85.0%"):
        detectors.check_backbone(answers.where(answers > 14, -1), answers)


def test_a_vocabulary_that_leaves_too_much_unsaid() -> None:
    detectors.check_coverage(0.98, 32)
    with pytest.raises(IntegrityError, match="94.0%"):
        detectors.check_coverage(0.94, 32)


def test_served_hidden_states_are_near_the_sources_and_not_those_of_the_next_layer() -> None:
    noisy = features([1, 3, 4]) * 1.1
    detectors.check_features(noisy, STATES, [1, 3, 4], detectors.SERVED_TOLERANCE)
    with pytest.raises(IntegrityError, match="layer 1"):
        detectors.check_features(features([0, 2, 3]), STATES, [1, 3, 4], 0.1)


def test_engine_that_normalises_twice() -> None:
    """The fault modelopt 0.47 has: the head's logits move by more than the tolerance."""
    torch.manual_seed(0)
    hidden, weight, head_weight = torch.randn(6, 32), torch.rand(32) + 0.5, torch.randn(50, 32)
    norm = lambda x: x * x.square().mean(-1, keepdim=True).rsqrt() * weight  # noqa: E731
    once, twice = norm(hidden) @ head_weight.T, norm(norm(hidden)) @ head_weight.T
    assert detectors.check_engine(once, once + 1e-4, "code-1") < 1e-3
    with pytest.raises(IntegrityError, match="disagree"):
        detectors.check_engine(once, twice, "code-1")


def shapes(hidden: int = 8, vocab: int = 16) -> dict[str, tuple[int, ...]]:
    result = {f"{name}.weight": (hidden, hidden) for name in head.REQUIRED}
    result.update({"fc.weight": (hidden, 3 * hidden), "lm_head.weight": (vocab, hidden)})
    result["midlayer.self_attn.q_proj.weight"] = (hidden, 2 * hidden)
    return result


LAYOUT = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 16, "vocab_size": 16, "hidden_size": 8}


def test_layout_of_tensorrt_llm() -> None:
    head.check_layout(LAYOUT, shapes())
    head.check_layout({**LAYOUT, "vocab_size": 99}, {**shapes(), "d2t": (16,)})


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        ({**LAYOUT, "draft_vocab_size": None}, shapes()),
        ({**LAYOUT, "architectures": ["LlamaForCausalLM"]}, shapes()),
        ({**LAYOUT, "vocab_size": 99}, shapes()),
        (LAYOUT, {**shapes(), "layers.0.mlp.up_proj.weight": (8, 8)}),
        (LAYOUT, {**shapes(), "fc.weight": (8, 16)}),
    ],
)
def test_layout_that_tensorrt_llm_would_misread(config: dict, tensors: dict) -> None:
    with pytest.raises(IntegrityError):
        head.check_layout(config, tensors)
