"""Looking inside what is served: are its weights the source's, and does its draft fit its target?

  scale_errors   served over source, least squares, per tensor and per expert, on a sample of rows. FP8 leaves it
                 within a percent of 1; a scale that was lost, doubled or swapped does not
  draft_fit      the head on the served answers, teacher-forced through the reference model, with the layers it captures
                 and with others nearby, position by position: a head fits the layers it was trained on, or those right
                 beside them. And how much its output layer resembles the target's, from which
                 it once started

It refuses to judge: `judge.py` and `diagnosis.py` do. The draft's fit needs a native bundle.

Run: `python -m tasks.validate.probe BUNDLE SOURCE` prints the tensors that are furthest from the source.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SAMPLE_ROWS = 16
NEAR = (1, -1, 2, -2)  # layers by which a capture is tried elsewhere: one off is the likeliest
BEYOND_NOISE = 4.0  # standard errors; a dozen captures are tried, and none may win by luck once in a thousand builds


@dataclass(frozen=True)
class ScaleError:
    """One weight, or one expert of it: `ratio` is served over source."""

    name: str
    ratio: float

    @property
    def percent(self) -> float:
        return 100 * abs(self.ratio - 1)


@dataclass(frozen=True)
class DraftFit:
    """Over the positions of the answers: shares of right guesses, and cross-entropy to the target's distribution."""

    layers: tuple[int, ...]
    agreement: float
    best_layers: tuple[int, ...]
    best_agreement: float
    gain_nats: float  # by which `best_layers` fit better than `layers`, less noise; negative when they do not
    output_similarity: float  # mean cosine of the head's output rows and the target's


def scale_errors(bundle: Path, source: Path) -> list[ScaleError]:
    """Every weight that both have, the worst first."""
    from engine_plugins.native.checkpoint import Tensors

    reference = Tensors(source)
    found = [
        ScaleError(f"{name}{f', expert {number}' if many else ''}", ratio)
        for name, served in _served(bundle)
        if name in reference
        for theirs in [_sample(reference, name)]
        for many in [served.ndim == 3]
        for number, ratio in enumerate(_ratios(served, theirs))
    ]
    return sorted(found, key=lambda error: -error.percent)


def _ratios(served: np.ndarray, source: np.ndarray) -> list[float]:
    pairs = zip(served, source, strict=True) if served.ndim == 3 else [(served, source)]
    return [float((a * b).sum() / max(float((b * b).sum()), 1e-30)) for a, b in pairs]


def _sample(tensors: Any, name: str) -> np.ndarray:
    """The first rows, of each expert where there are several; FP8 with its scale."""
    from engine_plugins.native.checkpoint import E4M3_TO_FLOAT

    raw, dtype = tensors.raw(name), tensors.dtype(name)
    raw = raw[:, :SAMPLE_ROWS] if raw.ndim == 3 else raw[:SAMPLE_ROWS]
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    values = E4M3_TO_FLOAT[raw] if dtype == "F8_E4M3" else raw.astype(np.float32)
    scale = f"{name}_scale" if f"{name}_scale" in tensors else f"{name}_weight_scale"
    if scale in tensors:
        given = tensors.float32(scale).reshape(-1)
        values = values * (given.reshape(-1, 1, 1) if values.ndim == 3 and given.size > 1 else given[0])
    return values


def _served(bundle: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, sample) of the served matrices: a native bundle unpacked, or a TensorRT-LLM bundle's checkpoint."""
    if (bundle / "checkpoint").is_dir():
        from engine_plugins.native.checkpoint import Tensors

        tensors = Tensors(bundle / "checkpoint")
        yield from ((name, _sample(tensors, name)) for name in tensors.names() if tensors.raw(name).ndim >= 2)
        return
    from engine_plugins.native.bundle import load_bundle
    from engine_plugins.native.reference_backend import unpack_target

    weights = unpack_target(load_bundle(bundle, verify=False))
    for name in weights.names():
        values = weights.float32(name)
        if values.ndim >= 2:
            yield name, values[:, :SAMPLE_ROWS] if values.ndim == 3 else values[:SAMPLE_ROWS]


def draft_fit(bundle: Path, dialogues: Iterable[tuple[str, str]]) -> DraftFit | None:
    """The head of a native bundle on (prompt, answer) pairs; None when there is no head or nothing to read."""
    if not (bundle / "draft.safetensors").is_file():
        return None
    from tokenizers import Tokenizer

    from engine_plugins.native.bundle import load_bundle
    from engine_plugins.native.reference import DraftReference, ReferenceModel
    from engine_plugins.native.reference_backend import unpack_draft, unpack_target
    from engine_plugins.native.tokenizer import ChatTokenizer

    opened = load_bundle(bundle, verify=False)
    assert opened.draft is not None
    model = ReferenceModel(opened.config, unpack_target(opened))
    head = DraftReference(opened.draft, unpack_draft(opened), model)
    chat, plain = ChatTokenizer(bundle), Tokenizer.from_file(str(bundle / "tokenizer.json"))
    own = tuple(opened.draft.capture_layers)
    tried = nearby(own, opened.config.num_layers)
    read = []
    for prompt, answer in dialogues:
        asked = chat.encode_chat([{"role": "user", "content": prompt}])
        said = plain.encode(answer, add_special_tokens=False).ids
        if len(said) > 2:
            read.append(_read(model, head, [*asked, *said], len(asked), tried))
    return _fit(own, tried, np.concatenate(read, axis=2), _similarity(head, model)) if read else None


def _fit(own: tuple[int, ...], tried: list[tuple[int, ...]], read: np.ndarray, similarity: float) -> DraftFit:
    """`read` is [capture, (right, loss), position]; `own` is the first capture."""
    right = read[:, 0].mean(axis=1)
    if len(tried) == 1:  # so few layers that there is no other capture
        return DraftFit(own, float(right[0]), own, float(right[0]), 0.0, similarity)
    gains = read[:1, 1] - read[1:, 1]  # paired by position: the same text through every capture
    mean, noise = gains.mean(axis=1), _noise(gains)
    sure = mean > noise
    top = int(np.where(sure, mean, -np.inf).argmax() if sure.any() else (mean - noise).argmax())
    behind = gains[top] - gains
    level = sure & (behind.mean(axis=1) <= _noise(behind))  # a small head hardly uses some of its layers
    best = int(level.argmax()) if level.any() else top  # the first of them is the likeliest mistake
    gain = float(mean[best] - noise[best])
    return DraftFit(own, float(right[0]), tried[best + 1], float(right[best + 1]), gain, similarity)


def _noise(paired: np.ndarray) -> np.ndarray:
    return BEYOND_NOISE * paired.std(axis=1) / paired.shape[1] ** 0.5


def nearby(layers: tuple[int, ...], depth: int) -> list[tuple[int, ...]]:
    """The capture as it is; then, the likeliest mistake first, as a whole some layers off, and with one layer off."""
    moved = [tuple(layer + step for layer in layers) for step in NEAR]
    moved += [(*layers[:at], layers[at] + step, *layers[at + 1 :]) for at in range(len(layers)) for step in NEAR]
    inside = [tried for tried in moved if all(0 <= layer < depth for layer in tried) and len(set(tried)) == len(layers)]
    return list(dict.fromkeys([layers, *inside]))


def _read(model: Any, head: Any, tokens: Sequence[int], prompt: int, tried: list[tuple[int, ...]]) -> np.ndarray:
    """[capture, (right, loss), position]. Row i of the head sees token i+1 and guesses token i+2, which row i+1 of the
    target decides.
    """
    import torch

    logits, outputs = model.forward(tokens)
    wanted_TV = torch.softmax(logits[1:-1][prompt - 2 :][:, head.to_target], dim=-1)
    said = logits[1:-1][prompt - 2 :].argmax(-1)
    rows = []
    for layers in tried:
        features = torch.cat([outputs[layer] for layer in layers], dim=-1) @ head.weights["fc"].T
        guessed_TV = head.forward(tokens[1:], features[:-1])[0][:-1][prompt - 2 :]
        right = (head.to_target[guessed_TV.argmax(-1)] == said).float()
        rows.append(torch.stack([right, -(wanted_TV * torch.log_softmax(guessed_TV, dim=-1)).sum(-1)]))
    return torch.stack(rows).numpy()


def _similarity(head: Any, model: Any) -> float:
    import torch.nn.functional as F

    return float(F.cosine_similarity(head.lm_head, model.lm_head[head.to_target], dim=-1).mean())


def main() -> None:
    for error in scale_errors(Path(sys.argv[1]), Path(sys.argv[2]))[:10]:
        print(f"{error.ratio:9.4f}  {error.name}")


if __name__ == "__main__":
    main()
