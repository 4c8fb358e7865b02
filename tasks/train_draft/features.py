"""The frozen target's hidden states, computed once per batch and kept as shards on disk.

From the second epoch on the target never runs again: its forward pass is most of an online step. The disk is bounded:
what the budget does not hold is computed online, each epoch. No shard is dropped for a newer one: an epoch reads each
once, in an order of its own, so that one is worth as much as another. Refuses to see gradients.
Run it: nothing to run; `python -m pytest tests/tasks/test_train_draft.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from engine_plugins.ops.allreduce_rmsnorm.reference import rmsnorm
from tasks.train_draft import data

CPU = torch.device("cpu")


def default_capture_layers(num_layers: int) -> list[int]:
    """The record's choice: near the start, the middle and the end; layer outputs counted from 0."""
    return sorted({1, max(0, num_layers // 2 - 1), max(0, num_layers - 4)})


class Capture:
    """Runs the target and keeps the outputs of `layers` and of the final norm."""

    def __init__(self, target: Any, layers: Sequence[int]) -> None:
        self.target, self.layers = target, list(layers)
        self._seen: dict[int, torch.Tensor] = {}
        for i in self.layers:
            target.model.layers[i].register_forward_hook(self._keep(i))
        for module in target.modules():
            if type(module).__name__ == "Llama4TextMoe" and module.top_k == 1:
                module.forward = _routed_once(module)

    def _keep(self, layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            self._seen[layer] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    @torch.no_grad()
    def run(self, token_ids_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, L, 3H] and the last hidden state after the final norm [B, L, H]."""
        self._seen.clear()
        norm = self.target.model.norm.weight  # where the head is
        last = self.target.model(input_ids=token_ids_BL.to(norm.device), use_cache=False).last_hidden_state
        return torch.cat([self._seen[i].to(norm.device) for i in self.layers], -1).float(), last.float()

    @property
    def recorded(self) -> list[int]:
        return sorted(self._seen)


class ServedCapture:
    """The same of a quantized checkpoint, with its activations and KV cache rounded as the engine rounds them.

    It is the engine's reference in FP32 on the CPU, whatever device the head trains on.
    """

    def __init__(self, checkpoint: Path, layers: Sequence[int]) -> None:
        from engine_plugins.native.reference import ReferenceModel

        self.target, self.layers = ReferenceModel.from_checkpoint(checkpoint), list(layers)
        self.recorded = sorted(self.layers)

    @torch.no_grad()
    def run(self, token_ids_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, L, 3H] and the last hidden state after the final norm [B, L, H]."""
        features, last = [], []
        for ids_L in token_ids_BL.tolist():
            outputs = self.target.forward(ids_L)[1]
            features.append(torch.cat([outputs[i] for i in self.layers], -1))
            last.append(rmsnorm(outputs[-1], self.target.norm, self.target.config.rms_norm_eps))
        return torch.stack(features), torch.stack(last)


def _routed_once(moe: Any) -> Any:
    """Llama 4's MoE with each token through its one expert; transformers sends every token through all of them."""

    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = hidden.reshape(-1, moe.hidden_dim)
        logits = torch.nn.functional.linear(flat, moe.router.weight)
        best, chosen = logits.max(-1)
        scaled = flat * torch.sigmoid(best)[:, None]
        out = moe.shared_expert(flat)
        for expert in range(moe.num_experts):
            rows = (chosen == expert).nonzero().squeeze(-1)
            gate, up = (scaled[rows] @ moe.experts.gate_up_proj[expert]).chunk(2, -1)
            out.index_add_(0, rows, (up * moe.experts.act_fn(gate)) @ moe.experts.down_proj[expert])
        return out, logits

    return forward


class FeatureStore:
    """Features of batches of sequences; `get` reads the shard or computes and writes it."""

    def __init__(
        self, capture: Capture | ServedCapture, path: Path, budget_gib: float, device: torch.device = CPU
    ) -> None:
        self.capture, self.path, self.budget, self.device = capture, path, budget_gib * 2**30, device
        path.mkdir(parents=True, exist_ok=True)
        self.used = sum(shard.stat().st_size for shard in path.glob("*.safetensors"))
        self.computed = 0

    def get(self, name: str, sequences: Sequence[data.Sequence]) -> dict[str, torch.Tensor]:
        """`features` [B, T, 3H] and `teacher` [B, R, H] in FP32 on `device`, zero where a sequence has no row."""
        shard = self.path / f"{name}.safetensors"
        if shard.exists():
            tensors = load_file(shard, device=str(self.device))
        else:
            tensors = {key: value.bfloat16() for key, value in self.compute(sequences).items()}
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            if self.used + size <= self.budget:
                self.used += size
                temporary = shard.with_suffix(".tmp")
                save_file(tensors, temporary)
                os.replace(temporary, shard)  # a kill leaves a whole shard or none
        return {key: value.to(self.device, torch.float32) for key, value in tensors.items()}

    def compute(self, sequences: Sequence[data.Sequence]) -> dict[str, torch.Tensor]:
        """The target's forward pass on these sequences; FP32, on `device`."""
        self.computed += 1
        longest = max(len(s.token_ids) for s in sequences)
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence.token_ids)] = torch.tensor(sequence.token_ids)
        features, last = (tensor.to(self.device) for tensor in self.capture.run(ids))
        teacher = last.new_zeros(len(sequences), max(s.chains for s in sequences), last.shape[-1])
        for i, sequence in enumerate(sequences):
            start, rows = sequence.prompt_tokens, sequence.chains
            teacher[i, :rows] = last[i, start : start + rows]
        return {"features": features[:, : longest - 2].contiguous(), "teacher": teacher}
