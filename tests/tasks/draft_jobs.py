"""What the tests of train_draft share: a random target's answers, the stage's job on them, its trainer.

Refuses to hold a test. Used by `test_train_draft.py` and `test_train_draft_parallel.py`.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from engine_plugins.native.reference import ReferenceModel
from tasks.job import Job
from tasks.prompts import template_sha256
from tasks.train_draft import data, features, head, place, trainer
from tests.tasks.random_checkpoints import DOMAINS

TRAINING = {"epochs": 1, "hidden_states_gib": 1.0, "learning_rate": 1e-3, "batch_size": 4, "ttt_steps": 3, "seed": 3,
            "max_seconds": None, "sequence_length": 64}  # fmt: skip
PER_DOMAIN = 6
ALONE = place.Place()


@cache
def answered(source: Path) -> list[dict[str, object]]:
    """Prompts of random tokens and the target's own greedy answers, as synthesize records them."""
    rng = random.Random(0)
    target = ReferenceModel.from_checkpoint(source)
    rows: list[dict[str, object]] = []
    for i in range(PER_DOMAIN * len(DOMAINS)):
        prompt = [0, *(rng.randrange(6, 90) for _ in range(rng.randrange(5, 12))), 2]
        answer: list[int] = []
        for _ in range(rng.randrange(5, 15)):
            answer.append(int(target.logits([*prompt, *answer])[-1].argmax()))
        domain = DOMAINS[i % len(DOMAINS)]
        rows.append({"id": f"{domain}-{i}", "domain": domain, "prompt_token_ids": prompt, "answer_token_ids": answer})
    return rows


def write_answers(path: Path, source: Path, template: str = "") -> Path:
    path.mkdir()
    rows = answered(source)
    (path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "summary.json").write_text(json.dumps({"chat_template_sha256": template or template_sha256(source)}))
    return path


def make_job(
    source: Path,
    answers: Path,
    out: Path,
    more: dict[str, Path] | None = None,
    golden: dict[str, list[float]] | None = None,
    **draft: object,
) -> Job:
    out.mkdir(parents=True, exist_ok=True)
    inputs = {"download": source, "quantize": source, "synthesize": answers, **(more or {})}
    spec = {"method": "eagle3", "capture_layers": [0, 1, 2], "vocab_size": None, "target": "source",
            "training": TRAINING, "data": {}, **draft}  # fmt: skip
    held_to = {"acceptance": {"golden": golden or {}, "tolerance": 0.05}}
    return Job("train_draft", {"name": "t", "draft": spec, "validate": held_to}, out, inputs, out)


def make_model(source: Path, steps: int = 3) -> tuple[object, features.Capture]:
    target = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    capture = features.Capture(target, [0, 1, 2])
    decoder = target.model.layers
    torch.manual_seed(0)
    model = head.convert(target, [0, 1, 2], 96, steps, None)
    target.model.layers = decoder
    return model, capture


def make_trainer(
    source: Path, answers: Path, scratch: Path, where: place.Place = ALONE, **spec: object
) -> trainer.Trainer:
    model, capture = make_model(source)
    scratch.mkdir(parents=True, exist_ok=True)
    store = features.FeatureStore(capture, scratch / f"features-{where.rank}", 1.0)
    sequences = data.read_answers(answers / "answers.jsonl", 64)
    return trainer.Trainer(model, store, sequences, {**TRAINING, **spec}, scratch, where, checkpoint_seconds=0.0)
