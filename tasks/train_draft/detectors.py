"""What makes a draft head quietly useless, one small function per fault; each raises IntegrityError naming it.

An acceptance length near 1 has its usual causes, and they are here. They refuse to repair anything.
Each has a test that injects its fault: `python -m pytest tests/tasks/test_train_draft_detectors.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specs.errors import IntegrityError

FEATURE_TOLERANCE = 0.02  # relative; features are stored in BF16
SERVED_TOLERANCE = 0.15  # relative; FP8 moves the tiny model's hidden states by 0.04 to 0.07, a layer by 0.27 and more
COVERAGE = 0.95  # of answer tokens that a compressed vocabulary must be able to say
AGREEMENT = 0.9  # of answer tokens; the BF16 source of the tiny FP8 target says all of them
ENGINE_TOLERANCE = 0.002  # relative L2 of logits, both in FP32 from the same BF16 weights; measured: 1e-6


def check_template(trained: str, served: str) -> None:
    """A head is only good on the chat template it was trained on."""
    if trained != served:
        raise IntegrityError(
            f"the answers were written through template {trained[:12]}, the model is served with {served[:12]}",
            "chat_template.jinja",
            "run synthesize again with the served template",
        )


def check_capture_layers(wanted: Sequence[int], recorded: Sequence[int], num_layers: int) -> None:
    """The layers whose outputs were recorded are the spec's; HF's `hidden_states[i+1]` is the output of layer i."""
    if list(recorded) != list(wanted):
        raise IntegrityError(
            f"features come from layers {list(recorded)}, the spec asks for {list(wanted)}",
            "draft.capture_layers",
            "layer ids count outputs from 0; transformers' hidden_states index is one more",
        )
    if len(wanted) != 3 or not all(0 <= layer < num_layers for layer in wanted):
        raise IntegrityError(
            f"{list(wanted)} are not three layers of {num_layers}", "draft.capture_layers", "e.g. 1, n/2-1, n-4"
        )


def check_features(
    recorded: torch.Tensor,
    hidden_states: Sequence[torch.Tensor],
    layers: Sequence[int],
    tolerance: float = FEATURE_TOLERANCE,
) -> None:
    """Recorded features [T, 3H] against transformers' own hidden states ([T, H] each, embeddings first)."""
    parts = recorded.float().chunk(len(layers), -1)
    for layer, part in zip(layers, parts, strict=True):
        theirs = hidden_states[layer + 1].float()
        difference = float((part - theirs).norm() / theirs.norm())
        if not difference <= tolerance:
            raise IntegrityError(
                f"the features of layer {layer} differ from the layer's output by {difference:.2g} (relative)",
                f"layer {layer}",
                "the capture is off by a layer or a position",
            )


def check_loss_mask(token_ids: Sequence[int], mask: Sequence[int], answer_ids: Sequence[int], name: str) -> None:
    """What the mask makes the head guess must be the answer from its second token on: the first is the target's own."""
    guessed = [token_ids[i + 1] for i, used in enumerate(mask) if used and i + 1 < len(token_ids)]
    if len(mask) != len(token_ids) or sum(mask) != len(guessed) or guessed != list(answer_ids[1:]):
        raise IntegrityError(
            "the loss mask does not cover the answer", name, "mask position i trains the guess of token i+1"
        )


def check_prompt_end(ends: set[int], answer: str) -> None:
    """Every prompt ends with the template's own last token; if not, prompt and answer were cut at the wrong place."""
    if len(ends) != 1:
        raise IntegrityError(
            f"prompts end with {len(ends)} different tokens {sorted(ends)[:5]}", answer, "re-run synthesize"
        )


def check_vocabulary(d2t: Sequence[int] | torch.Tensor, vocab_size: int) -> None:
    """`target = draft + d2t[draft]` must be an injection into the target's vocabulary, in ascending order."""
    offsets = torch.as_tensor(d2t, dtype=torch.int64)
    targets = torch.arange(len(offsets)) + offsets
    if len(torch.unique(targets)) != len(targets):
        raise IntegrityError("two draft tokens mean the same target token", "d2t", "rebuild the draft vocabulary")
    if len(targets) and (int(targets.min()) < 0 or int(targets.max()) >= vocab_size):
        raise IntegrityError(
            f"d2t points outside the vocabulary of {vocab_size}", "d2t", "rebuild the draft vocabulary"
        )
    if not torch.equal(targets, targets.sort().values):
        raise IntegrityError("d2t is not ascending", "d2t", "engines search it; rebuild the draft vocabulary")


def check_coverage(share: float, size: int) -> None:
    """A token outside the draft's vocabulary is never drafted: each of them ends a cycle."""
    if not share >= COVERAGE:
        raise IntegrityError(
            f"a draft vocabulary of {size} says {share:.1%} of the held-back answers, the limit is {COVERAGE:.0%}",
            "draft.vocab_size",
            "raise it; null takes the target's",
        )


def check_backbone(said: torch.Tensor, answers: torch.Tensor) -> float:
    """The model whose hidden states are recorded must be the one that answered: what it `said` [T], teacher-forced."""
    share = float((said == answers).float().mean())
    if not share >= AGREEMENT:
        raise IntegrityError(
            f"the target would have said {share:.1%} of the answers' tokens itself, the limit is {AGREEMENT:.0%}",
            "answers.jsonl",
            "another checkpoint wrote them, or this one is damaged; run synthesize again",
        )
    return share


def check_engine(trainer: torch.Tensor, engine: torch.Tensor, where: str, tolerance: float = ENGINE_TOLERANCE) -> float:
    """Draft logits of the trainer and of the engine's reference on the same teacher-forced tokens."""
    difference = float((trainer - engine).norm() / trainer.norm().clamp_min(1e-30))
    if not difference <= tolerance:
        raise IntegrityError(
            f"trainer and engine disagree on the draft's logits by {difference:.2g} (relative), limit {tolerance:.2g}",
            where,
            "norms, positions or capture layers are not the engine's; its acceptance would be near 1",
        )
    return difference
