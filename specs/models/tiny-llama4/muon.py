"""Muon: momentum whose update is orthogonalised, for the matrices of the tiny Llama 4 (Jordan et al. 2024).

At this size it needs about half the tokens AdamW needs, and a 2-core machine has few tokens to give.
Refuses vectors, embeddings and the output head: those stay with AdamW.
"""

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic's coefficients from the Muon report


def orthogonalize(gradient: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix by Newton-Schulz in bfloat16; a leading dimension is a batch of experts."""
    a, b, c = NEWTON_SCHULZ
    x = gradient.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled so that one learning rate suits every matrix shape."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        if any(param.ndim < 2 for param in params):
            raise ValueError("Muon takes matrices only: give vectors to AdamW")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                momentum.lerp_(param.grad, 1 - group["momentum"])
                update = orthogonalize(param.grad.lerp(momentum, group["momentum"])).to(param.dtype)
                # Rows over columns: keeps the update's effect on the output the same for tall and wide matrices.
                scale = max(1.0, param.shape[-2] / param.shape[-1]) ** 0.5
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update, alpha=-group["lr"] * scale)
