"""The training loop: AdamW over unrolled chains, stopped by steps or by the clock, resumable at the step.

After the first step and every ~20 s the head, the optimizer and the clock go to `.scratch`; after a kill -9 the run
goes on at that step with the same data order. Several processes share each batch and add their gradients, so that their
number changes nothing but the time; the first one writes. (DistributedDataParallel needs a module's forward; the
unroller reads the weights.) Refuses to hold features: it asks for a batch and forgets it.
Run it: nothing to run; `python -m pytest tests/tasks/test_train_draft.py`.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tasks.job import Progress
from tasks.train_draft import data
from tasks.train_draft.features import FeatureStore
from tasks.train_draft.place import Place
from tasks.train_draft.unroll import Batch, Unroller

CHECKPOINT_SECONDS = 20.0
DECAY = 0.9  # weight of each further step of the chain, modelopt's recipe
WARMUP_SHARE, FINAL_SHARE = 0.03, 0.03


@dataclass
class State:
    """Where training is; all of it survives a kill."""

    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Trainer:
    """Trains the head of one converted model on one set of sequences."""

    model: Any
    store: FeatureStore
    sequences: list[data.Sequence]
    spec: Mapping[str, Any]  # draft.training
    scratch: Path
    place: Place = Place()
    checkpoint_seconds: float = CHECKPOINT_SECONDS

    def __post_init__(self) -> None:
        reuse_memory()
        self.unroller = Unroller(self.model.eagle_module, int(self.spec["ttt_steps"]))
        self.batches = data.make_batches(self.sequences, int(self.spec["batch_size"]), int(self.spec["seed"]))
        self.total = len(self.batches) * int(self.spec["epochs"])
        self.parameters = dict(self.model.eagle_module.named_parameters())
        for parameter in self.parameters.values():
            parameter.requires_grad_(True).grad = torch.zeros_like(parameter)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=self.spec["learning_rate"], weight_decay=0.0)
        frozen = (self.model.model.embed_tokens.weight, self.model.lm_head.weight)
        self.embedding, self.lm_head = (weight.detach().float() for weight in frozen)
        self.state = State()

    def run(self, progress: Progress, after_step: Callable[[State], None] = lambda state: None) -> State:
        """Trains to the end of the steps or of `max_seconds`, whichever is first."""
        self._resume()
        self.place.copy(parameter.data for parameter in self.parameters.values())
        budget = self.spec.get("max_seconds") or math.inf
        self.clock, saved = time.monotonic(), -math.inf  # saved at once: a disk that cannot hold it says so now
        while self.state.step < self.total and self.state.seconds < budget:
            share = max(self.state.step / self.total, self.state.seconds / budget)
            row = self._step(share)
            self.state.curve.append(row)
            progress(share, 1.0, f"step {self.state.step}/{self.total} loss {row['loss']:.3f} hit {row['acc_1']:.0%}")
            if self.place.writes and self.clock - saved > self.checkpoint_seconds:
                self._save()
                saved = self.clock = time.monotonic()
            after_step(self.state)
        if self.place.writes:
            self._save()
        return self.state

    def _step(self, share: float) -> dict[str, float]:
        """One optimizer step on the batch of this step: a function of seed and step, not of the number of processes."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.spec["learning_rate"] * schedule(share)
        index = data.batch_at(self.state.step, len(self.batches), int(self.spec["seed"]))
        whole = [self.sequences[i] for i in self.batches[index]]
        counts = [sum(max(0, s.chains - step) for s in whole) for step in range(self.unroller.steps)]
        numbers = torch.zeros(len(counts) + 2, device=self.place.device)  # loss, right guesses of each step, seconds
        if mine := self.place.share(whole):
            batch = assemble(mine, self.store.get(f"batch-{index:06d}", mine), self.embedding)
            loss, numbers[1:-1] = self.unroller.loss(batch, *teach(self.model, self.lm_head, batch), DECAY, counts)
            loss.backward()
            numbers[0] = loss.detach()
        self.place.add(p.grad for p in self.parameters.values() if p.grad is not None)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        now = time.monotonic()
        numbers[-1] = now - self.clock if self.place.writes else 0.0  # one clock, or they would not stop together
        self.place.add([numbers])
        mean, *right, seconds = numbers.tolist()
        self.state.step, self.state.seconds, self.clock = self.state.step + 1, self.state.seconds + seconds, now
        rates = {f"acc_{i + 1}": hits / max(counts[i], 1) for i, hits in enumerate(right)}
        return {"step": float(self.state.step), "loss": mean, **rates}

    def _save(self) -> None:
        tensors = {f"weight.{name}": p.detach().contiguous() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value.contiguous()
        tensors["rng"] = torch.get_rng_state()
        meta = {
            "step": self.state.step,
            "seconds": self.state.seconds,
            "curve": self.state.curve,
            "spec": dict(self.spec),
        }
        temporary = self.scratch / "trainer.tmp"
        save_file(tensors, temporary, metadata={"state": json.dumps(meta)})
        os.replace(temporary, self.scratch / "trainer.safetensors")

    def _resume(self) -> None:
        path = self.scratch / "trainer.safetensors"
        if not path.exists():
            return
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()["state"])
        tensors = load_file(path)
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[f"weight.{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
            self.optimizer.state[parameter] = {key: tensors[f"{key}.{name}"].clone() for key in keys}
            for key in keys[1:]:  # AdamW keeps its step on the CPU
                self.optimizer.state[parameter][key] = self.optimizer.state[parameter][key].to(parameter.device)
        torch.set_rng_state(tensors["rng"])
        self.state = State(meta["step"], meta["seconds"], meta["curve"])


def schedule(share: float) -> float:
    """Learning-rate factor at a share of the run: linear warm-up, then a cosine to a few percent."""
    if share < WARMUP_SHARE:
        return (share + WARMUP_SHARE / 10) / (WARMUP_SHARE * 1.1)
    left = (share - WARMUP_SHARE) / (1 - WARMUP_SHARE)
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * min(left, 1.0)))


@torch.no_grad()
def assemble(
    sequences: Sequence[data.Sequence], features: Mapping[str, torch.Tensor], embedding: torch.Tensor
) -> Batch:
    """Sequences and their features as the tensors that the unroller wants, on the embedding's device."""
    longest = features["features"].shape[1]
    rows = features["teacher"].shape[1]
    next_ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    tokens = torch.zeros(len(sequences), rows, dtype=torch.long)
    for i, sequence in enumerate(sequences):
        ids, start = torch.tensor(sequence.token_ids), sequence.prompt_tokens
        count = min(longest, len(ids) - 1)
        next_ids[i, :count] = ids[1 : count + 1]
        tokens[i, : sequence.chains] = ids[start + 1 : start + 1 + sequence.chains]
    return Batch(
        features["features"],
        torch.nn.functional.embedding(next_ids.to(embedding.device), embedding),
        features["teacher"],
        tokens.to(embedding.device),
        torch.tensor([s.prompt_tokens for s in sequences], device=embedding.device),
        torch.tensor([s.chains for s in sequences], device=embedding.device),
    )


@torch.no_grad()
def teach(model: Any, lm_head: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The target's distribution at each answer token [B, R, V] in the draft's vocabulary, and its argmax [B, R]."""
    logits = batch.teacher_BRH @ lm_head.T
    if hasattr(model.eagle_module, "d2t"):
        d2t = model.eagle_module.d2t
        logits = logits[..., torch.arange(len(d2t), device=d2t.device) + d2t]
    return logits.softmax(-1), logits.argmax(-1)


def reuse_memory() -> None:
    """Keep freed tensors: by default glibc returns big ones to the kernel, and each step pays for the pages again."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        return  # not glibc: slower, nothing else
