"""Lossless sampling on the device: the probabilities both models drew from, and the fused op that decides.

What it is: torch around `verify_sampling`; with no draft to judge that op is an inverse-CDF draw.
What it refuses to be: a source of randomness. The numbers come from the host, one stream per request, as many in every
cycle, so that a request's tokens do not depend on its company.
Run it: `python -m pytest tests/engine_plugins/test_gpu_backend.py`.
Legend: M rows, k drafts, R = k + 1 rows, V vocabulary, W = V + SPARE columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ops = torch.ops.kilotok

SPARE = 16  # columns behind the vocabulary, 16 to keep rows aligned: the target never chooses a token there


def target_probabilities(logits_RV: Tensor, settings_2: Tensor, cut: bool) -> Tensor:
    """fp32 [R, W]: softmax of logits / temperature; `cut` keeps the smallest set that holds top_p."""
    p_RW = torch.softmax(F.pad(logits_RV.float() / settings_2[:1], (0, SPARE), value=float("-inf")), dim=-1)
    if not cut:
        return p_RW
    falling, order = torch.sort(p_RW, dim=-1, descending=True, stable=True)
    kept = falling.masked_fill(falling.cumsum(dim=-1) - falling >= settings_2[1:], 0.0)
    return torch.zeros_like(p_RW).scatter(1, order, kept / kept.sum(dim=-1, keepdim=True))


class GuessBoard:
    """One slot's draft probabilities over the target's vocabulary, from the cycle that drew to the one that judges."""

    def __init__(self, drafts: int, vocab: int, to_target: Tensor | None, device: torch.device) -> None:
        self._q_KW = torch.zeros((drafts, vocab + SPARE), device=device)
        self._nobody_1W = torch.zeros((1, vocab + SPARE), device=device)
        self._nobody_1W[0, vocab] = 1.0
        self._to_target, self._vocab = to_target, vocab
        self._row = torch.arange(drafts, device=device)
        size = len(to_target) if to_target is not None else vocab
        self._no_q, self._no_draft = torch.zeros((0, size), device=device), self._row[:0].clone()

    def verify(self, p_RW: Tensor, drafts_K: Tensor, num_drafts: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens [R], count [1]). A row without a draft judges one in the spare columns, and so draws from p."""
        absent = self._row >= num_drafts
        q_KW = torch.where(absent[:, None], self._nobody_1W, self._q_KW)
        return ops.verify_sampling(p_RW, q_KW, drafts_K.masked_fill(absent, self._vocab), uniform_R)

    def draw(self, logits_1V: Tensor, temperature_1: Tensor, step: int, uniform_1: Tensor) -> Tensor:
        """A draft id [1]; its distribution stays on the board."""
        q_1V = torch.softmax(logits_1V.float() / temperature_1, dim=-1)
        assert self._to_target is not None
        self._q_KW[step].index_copy_(0, self._to_target, q_1V[0])
        return ops.verify_sampling(q_1V, self._no_q, self._no_draft, uniform_1)[0]
