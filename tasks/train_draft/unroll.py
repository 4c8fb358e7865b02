"""The training-time test of EAGLE-3, written for CPUs: every draft chain of a batch unrolled, answer rows only.

It computes what modelopt's `HFEagleModel.forward` computes on the same `EagleModule` weights (a test holds them
together), without its waste: no rows for prompt or padding, no attention over masked keys, the embedding's half of
q/k/v once.
Measured beside it: see infra/bench_reports. It refuses to know about data, optimizers or files.
Run it: `python -m pytest tests/tasks/test_train_draft.py`.

A chain starts at row r: it knows the target's features up to position p-1+r (p = prompt length) and the token after it.
Step s of chain r sits at position p-1+r+s, eats its own hidden state of step s-1 and the true token at p+r+s, and
predicts the token at p+r+s+1. Its keys are the features up to p-1+r and its own steps 1..s, which share the row index
r.
Legend: B sequences, T feature rows, R chains, H hidden, V draft vocabulary, N query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences with the target's features; row a of the answer tensors is answer token a."""

    features_BTC: torch.Tensor  # captured layers' outputs, concatenated
    embeds_BTH: torch.Tensor  # embedding of the token after each feature row
    teacher_BRH: torch.Tensor  # the target's last hidden state (normed) at answer tokens 0..n-2
    tokens_BR: torch.Tensor  # target token ids 1..n-1 of the answer: what step 0 of chain r must say
    prompt_B: torch.Tensor  # p
    chains_B: torch.Tensor  # n-1

    def valid(self, step: int) -> torch.Tensor:
        """[B, R-step] which chains have a token left to predict at `step`."""
        rows = torch.arange(self.tokens_BR.shape[1] - step, device=self.chains_B.device)
        return rows < (self.chains_B[:, None] - step)


class RmsNorm(torch.autograd.Function):
    """Llama's RMSNorm with its gradient by hand: three passes over memory instead of eleven."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        normed, inverse, weight = ctx.saved_tensors
        flat_grad, flat_normed = grad.reshape(-1, grad.shape[-1]), normed.reshape(-1, grad.shape[-1])
        weight_grad = (flat_grad * flat_normed).sum(0)
        scaled = grad * weight
        mean = (scaled * normed).mean(-1, keepdim=True)
        return torch.addcmul(scaled, normed, mean, value=-1).mul_(inverse), weight_grad, None


class SoftCrossEntropy(torch.autograd.Function):
    """sum(w * -target . log_softmax(logits)); the gradient is (softmax - target) * w, for targets that sum to one."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        log_probs = torch.log_softmax(logits, -1)
        ctx.save_for_backward(log_probs, target, weight)
        return -torch.einsum("...v,...v,...->", log_probs, target, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        log_probs, target, weight = ctx.saved_tensors
        return log_probs.exp().sub_(target).mul_((weight * grad)[..., None]), None, None


class Unroller:
    """Runs the chains of one modelopt `EagleModule` (one Llama layer, eagle3 inputs)."""

    def __init__(self, eagle: Any, steps: int) -> None:
        self.eagle, self.layer, self.steps = eagle, eagle.layers[0], steps
        attention = self.layer.self_attn
        self.head_dim = attention.head_dim
        self.num_kv = attention.k_proj.out_features // self.head_dim
        self.group = attention.q_proj.out_features // self.head_dim // self.num_kv
        self.scaling = attention.scaling
        eagle._maybe_init_rope(device=eagle.fc.weight.device)

    def logits(self, batch: Batch) -> list[torch.Tensor]:
        """Draft logits [B, R-s, V] of step s for every chain, s = 0 .. steps-1."""
        layer, attention = self.layer, self.layer.self_attn
        rows, width = batch.tokens_BR.shape[1], batch.embeds_BTH.shape[-1]
        device = batch.prompt_B.device
        q_e, q_h = attention.q_proj.weight.split(width, 1)
        kv_e, kv_h = torch.cat((attention.k_proj.weight, attention.v_proj.weight)).split(width, 1)
        cos, sin = self._rope(batch)
        answer_BR = batch.prompt_B[:, None] - 1 + torch.arange(rows, device=device)
        answer_BR = answer_BR.clamp(max=batch.embeds_BTH.shape[1] - 1)

        embeds_BTH = self._norm(batch.embeds_BTH, layer.input_layernorm)
        fused_BTH = batch.features_BTC @ self.eagle.fc.weight.T
        normed_BTH = self._norm(fused_BTH, layer.hidden_norm)
        embeds_kv = embeds_BTH @ kv_e.T
        keys, values = self._split_kv(embeds_kv + normed_BTH @ kv_h.T)
        positions = torch.arange(keys.shape[2], device=device)
        keys = self._rotate(keys, cos[positions], sin[positions])
        bias_BR1T = self._bias(answer_BR, positions)

        hidden_BRH = _take(fused_BTH, answer_BR)
        normed_BRH = _take(normed_BTH, answer_BR)
        embeds_q, embeds_kv = _take(embeds_BTH @ q_e.T, answer_BR), _take(embeds_kv, answer_BR)
        chain: list[tuple[torch.Tensor, torch.Tensor]] = []
        out = []
        for step in range(self.steps):
            count = rows - step
            if step:
                hidden_BRH = hidden_BRH[:, :count]
                normed_BRH = self._norm(hidden_BRH, layer.hidden_norm)
            at = answer_BR[:, :count] + step
            query = self._heads(embeds_q[:, step:] + normed_BRH @ q_h.T, self.num_kv * self.group)
            query = self._rotate(query, cos[at][:, None], sin[at][:, None])
            if step:
                key, value = self._split_kv(embeds_kv[:, step:] + normed_BRH @ kv_h.T)
                chain = [(k[:, :, :count], v[:, :, :count]) for k, v in chain]
                chain.append((self._rotate(key, cos[at][:, None], sin[at][:, None]), value))
            mixed = self._attend(query, keys, values, bias_BR1T[:, :, :count], chain)
            hidden_BRH = self._mlp(hidden_BRH + mixed @ attention.o_proj.weight.T)
            out.append(self._norm(hidden_BRH, self.eagle.norm) @ self.eagle.lm_head.weight.T)
        return out

    def loss(
        self, batch: Batch, targets: torch.Tensor, correct: torch.Tensor, decay: float, counts: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """modelopt's loss, sum over steps of decay**s times mean soft cross entropy; hits [steps], the right guesses.

        targets: [B, R, V] the teacher at answer tokens; correct: [B, R] its argmax, in the draft vocabulary; counts:
        guesses of each step that the mean is over, more than this batch's own when it is a share of a larger one.
        """
        total = torch.zeros((), device=targets.device)
        hits = torch.zeros(self.steps, device=targets.device)
        for step, logits in enumerate(self.logits(batch)):
            valid = batch.valid(step)
            weight = valid / (counts[step] + 1e-5)
            total = total + SoftCrossEntropy.apply(logits, targets[:, step:], weight) * decay**step
            right = (logits.detach().argmax(-1) == correct[:, step:]) & valid
            hits[step] = right.sum()
        return total, hits

    def _rope(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        last = batch.embeds_BTH.shape[1] + self.steps
        cos, sin = self.eagle.rotary_emb(batch.embeds_BTH, torch.arange(last, device=batch.embeds_BTH.device)[None])
        return cos[0], sin[0]

    def _bias(self, answer_BR: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        seen = positions <= answer_BR[:, :, None]
        return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))[:, None]

    def _norm(self, x: torch.Tensor, norm: Any) -> torch.Tensor:
        return RmsNorm.apply(x, norm.weight, norm.variance_epsilon)

    def _heads(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

    def _split_kv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = x.chunk(2, -1)
        return self._heads(key, self.num_kv), self._heads(value, self.num_kv)

    def _rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def _attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        bias_BR1T: torch.Tensor,
        chain: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        batch, _, rows, _ = query.shape
        grouped = (query * self.scaling).reshape(batch, self.num_kv, self.group * rows, self.head_dim)
        scores = (grouped @ keys.transpose(2, 3)).view(batch, self.num_kv, self.group, rows, -1)
        scores = scores + bias_BR1T[:, :, None]
        split = grouped.view(batch, self.num_kv, self.group, rows, self.head_dim)
        own = [(split * key[:, :, None]).sum(-1, keepdim=True) for key, _ in chain]
        weights = torch.cat((scores, *own), -1).softmax(-1)
        length = keys.shape[2]
        mixed = weights[..., :length].reshape(batch, self.num_kv, self.group * rows, length) @ values
        mixed = mixed.view(batch, self.num_kv, self.group, rows, self.head_dim)
        for i, (_, value) in enumerate(chain):
            mixed = mixed + weights[..., length + i, None] * value[:, :, None]
        return mixed.permute(0, 3, 1, 2, 4).reshape(batch, rows, -1)

    def _mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        mlp, x = self.layer.mlp, self._norm(hidden, self.layer.post_attention_layernorm)
        gated = F.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
        return hidden + gated @ mlp.down_proj.weight.T


def _take(x_BTH: torch.Tensor, rows_BR: torch.Tensor) -> torch.Tensor:
    return torch.gather(x_BTH, 1, rows_BR[..., None].expand(-1, -1, x_BTH.shape[-1]))
