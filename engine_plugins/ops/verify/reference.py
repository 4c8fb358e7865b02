"""Reference of verify in plain numpy.

What it refuses to be: fast. Run it: `python -m pytest tests/engine_plugins`.
Legend: K drafted tokens, V vocabulary. Formula: Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def probabilities(logits_V: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """softmax(logits / temperature), cut to the smallest set of tokens that holds top_p, renormalized."""
    scaled = logits_V.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    if top_p < 1.0:
        order = np.argsort(-p, kind="stable")
        keep = np.cumsum(p[order]) - p[order] < top_p
        p[order[~keep]] = 0.0
        p /= p.sum()
    return p


def draw(p_V: np.ndarray, u: float) -> int:
    """Inverse-CDF sample; u in [0, 1)."""
    return int(min(np.searchsorted(np.cumsum(p_V), u * p_V.sum(), side="right"), len(p_V) - 1))


def verify_greedy(logits_KV: np.ndarray, drafts: Sequence[int]) -> list[int]:
    """Drafts that equal the target's argmax, then the argmax after them. logits_KV has len(drafts) + 1 rows."""
    tokens: list[int] = []
    for row in range(len(drafts) + 1):
        best = int(logits_KV[row].argmax())
        tokens.append(best)
        if row == len(drafts) or best != drafts[row]:
            break
    return tokens


def verify_sampling(
    p_KV: np.ndarray, q_KV: np.ndarray, drafts: Sequence[int], uniform: Callable[[], float]
) -> list[int]:
    """Accept draft i with probability min(1, p/q); at the first rejection sample max(p - q, 0); else one from the
    last p."""
    tokens: list[int] = []
    for i, draft in enumerate(drafts):
        if uniform() * q_KV[i, draft] < p_KV[i, draft]:
            tokens.append(int(draft))
            continue
        residual = np.maximum(p_KV[i] - q_KV[i], 0.0)
        tokens.append(draw(residual if residual.sum() > 0 else p_KV[i], uniform()))
        return tokens
    tokens.append(draw(p_KV[len(drafts)], uniform()))
    return tokens
