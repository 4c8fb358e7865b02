"""modelopt's DFlash beside EAGLE-3: the same answers and hidden states, the same seconds of training, the same judge.

A DFlash draft guesses a block in one pass: its first token is known, the others are masks; the target's hidden states
enter every layer as keys and values. It is trained by modelopt's own module, forward and loss in a bare loop. Refuses
to serve it: no engine here does. EAGLE-3's figures are those of `draft_cpu.py ours`, whose `prepare` comes first.
Run it: `python infra/bench_reports/dflash_cpu.py WORK SOURCE ANSWERS HELD_OUT [--seconds N] [--rate R]`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from draft_cpu import BATCH, RATE, padded, report

BLOCK = 4  # the known token and three drafts
LAYERS = 3  # modelopt wants one per captured layer; one pass of three costs about three passes of EAGLE-3's one
MASK_TOKEN = 1015  # the tiny model's padding: no answer says it


def convert(source: Path) -> tuple[Any, Any]:
    """(modelopt's DFlash model around the target, what records the target's hidden states)."""
    import modelopt.torch.speculative as speculative
    from transformers import AutoModelForCausalLM

    from tasks.train_draft import features, head

    target = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    config, decoder = target.config, target.model.layers
    layers = features.default_capture_layers(config.num_hidden_layers)
    capture = features.Capture(target, layers)
    config.num_orig_hidden_layers = config.num_hidden_layers
    architecture = {
        "num_hidden_layers": LAYERS,
        "target_layer_ids": layers,
        "intermediate_size": head.intermediate_size({}, config),
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
    }
    options = {
        "dflash_offline": True,
        "dflash_block_size": BLOCK,
        "dflash_mask_token_id": MASK_TOKEN,
        "dflash_use_torch_compile": False,
        "dflash_architecture_config": architecture,
    }
    speculative.convert(target, [("dflash", options)])
    target.model.layers = decoder  # modelopt drops them; the judge's features need them
    with torch.no_grad():
        target.dflash_module.norm.weight.copy_(target.model.norm.weight)  # our head starts from it too
    return target, capture


def train(model: Any, sequences: list[Any], rows: list[Any], seconds: float, rate: float) -> tuple[int, int, float]:
    """AdamW on modelopt's loss over our batches and schedule; (steps, tokens, seconds)."""
    from tasks.train_draft import data, trainer

    trainer.reuse_memory()
    batches = data.make_batches(sequences, BATCH, 0)
    for sequence, row in zip(sequences, rows, strict=True):
        row["mask"] = (torch.arange(len(row["ids"])) >= sequence.prompt_tokens).long()  # every token of the answer
    parameters = [p.requires_grad_(True) for p in model.dflash_module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    model.train()
    began, step, tokens = time.monotonic(), 0, 0
    while (spent := time.monotonic() - began) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = rate * trainer.schedule(spent / seconds)
        chosen = [rows[i] for i in batches[data.batch_at(step, len(batches), 0)]]
        longest = max(len(row["ids"]) for row in chosen)
        # It starts blocks only where a whole one fits: one block more, so that the last answer tokens are learned too.
        model(**padded(chosen, (longest // BLOCK + 2) * BLOCK)).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, tokens = step + 1, tokens + sum(len(row["ids"]) for row in chosen)
    return step, tokens, spent


@torch.no_grad()
def length(model: Any, capture: Any, held: list[Any]) -> float:
    """Acceptance length of its blocks' three drafts, rounded as it would be served."""
    from tasks.acceptance import acceptance_frame, acceptance_metrics
    from tasks.train_draft import acceptance

    for parameter in model.dflash_module.parameters():
        parameter.copy_(parameter.bfloat16())
    answers = []
    for sequence in held:
        ids, start, chains = torch.tensor([sequence.token_ids]), sequence.prompt_tokens, sequence.chains
        features, _ = capture.run(ids)
        said = blocks(model, ids, features, torch.arange(start, start + chains)).argmax(-1)
        right = [
            (said[: chains - step, step] == ids[0, start + 1 + step : start + 1 + chains]).tolist()
            for step in range(BLOCK - 1)
        ]
        answers.append((sequence.domain, acceptance.replay(right, BLOCK - 1)))
    return acceptance_metrics(acceptance_frame(answers, BLOCK - 1))["acceptance.length"]


def blocks(model: Any, ids: torch.Tensor, features: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Logits [N, 3, V] of the block that starts at each anchor, all in one pass, as in training."""
    count, anchors_1N = len(anchors), anchors[None]
    keep = torch.ones_like(anchors_1N, dtype=torch.bool)
    mask = model._build_draft_attention_mask(ids.shape[1], anchors_1N, keep, count, features.dtype, ids.device)
    hidden = model.dflash_module(
        noise_embedding=model._build_noise_embedding(ids, anchors_1N, keep, count),
        target_hidden=features,
        position_ids=model._build_position_ids(ids.shape[1], anchors_1N, ids.device),
        attention_mask=mask,
    )
    return model._base_model_lm_head(hidden).view(count, BLOCK, -1)[:, 1:]


@torch.no_grad()
def alone(model: Any, capture: Any, sequence: Any) -> float:
    """Relative difference of a block among others to the block by itself, on the features an engine would have."""
    ids, anchor = torch.tensor([sequence.token_ids]), sequence.prompt_tokens + sequence.chains // 2
    features, _ = capture.run(ids)
    among = blocks(model, ids, features, torch.arange(sequence.prompt_tokens, anchor + 1))[-1]
    block = torch.full((1, BLOCK), MASK_TOKEN)
    block[0, 0] = ids[0, anchor]
    hidden = model.dflash_module(
        noise_embedding=model._base_model_embeddings(block),
        target_hidden=capture.run(ids[:, :anchor])[0],
        position_ids=torch.arange(anchor + BLOCK)[None],
    )
    by_itself = model._base_model_lm_head(hidden)[0, 1:]
    return float((among - by_itself).norm() / by_itself.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("work", "source", "answers", "held_out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=RATE)
    given = parser.parse_args()
    from tasks.train_draft import data

    sequences, _ = data.split(data.read_answers(given.answers / "answers.jsonl", 256))
    held = data.read_answers(given.held_out / "answers.jsonl", 256)
    torch.manual_seed(0)
    model, capture = convert(given.source)
    rows = torch.load(given.work / "rows.pt")
    step, tokens, spent = train(model, sequences, rows, given.seconds, given.rate)
    accepted = length(model, capture, held)
    parameters = sum(p.numel() for p in model.dflash_module.parameters())
    print(json.dumps({"parameters": parameters, "block_alone_differs_by": alone(model, capture, held[0])}))
    report(f"dflash, rate {given.rate:g}", step, tokens, spent, accepted)


if __name__ == "__main__":
    main()
