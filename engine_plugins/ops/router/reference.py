"""Reference of router in plain torch fp32.

What it refuses to be: fast. Run it: `python -m pytest tests/engine_plugins`.
Legend: M rows, K inputs, E experts.
"""

from __future__ import annotations

import torch


def router(x_MK: torch.Tensor, weight_EK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`top1` of the logits x W^T."""
    return top1(x_MK @ weight_EK.T)


def top1(logits_ME: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen expert [M] (the lowest index wins a tie) and sigmoid of its logit [M]."""
    best_M = logits_ME.argmax(dim=-1)
    return best_M, torch.sigmoid(logits_ME.gather(1, best_M[:, None]).squeeze(1))
