"""Trains the tiny Llama 4 from nothing but a seed: tokenizer, weights, prompts, one Hugging Face directory.

Everything that makes Llama 4 Maverick itself is here and used: dense and MoE layers alternate, top-1 sigmoid routing
on the expert's input, a shared expert, NoPE with attention temperature every fourth layer, chunks on the others.
Refuses to be a general trainer: one corpus, one shape, CPU.

    python specs/models/tiny-llama4/train.py --out DIR
    python specs/models/tiny-llama4/evaluate.py DIR
"""

import argparse
import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import corpus
import torch
import torch.nn.functional as F
from fast_forward import hidden_states
from muon import Muon
from torch import Tensor
from train_tokenizer import VOCAB_SIZE, save_tokenizer, train_tokenizer
from transformers import GenerationConfig, Llama4ForCausalLM, Llama4TextConfig, PreTrainedTokenizerFast

# Lengths and how often each is drawn. Short rows learn the tasks, long ones to reach back past one chunk of 128.
LENGTHS = {128: 0.55, 256: 0.25, 512: 0.12, 1024: 0.08}
PROMPT_WEIGHT = 0.1  # prompts are mostly noise to predict, but some of it teaches the language
BALANCE_WEIGHT = 0.01
SHARD_SIZE = "6MB"  # two shards, so that a missing one can be tested


def build_config(tokenizer: PreTrainedTokenizerFast) -> Llama4TextConfig:
    """Maverick's structure in small; chunk and floor scale small enough to matter within 1000 tokens."""
    return Llama4TextConfig(
        architectures=["Llama4ForCausalLM"],
        vocab_size=VOCAB_SIZE, hidden_size=192, intermediate_size=256, intermediate_size_mlp=512,
        num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2, head_dim=32,
        num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=2,
        use_qk_norm=False, attention_chunk_size=128, no_rope_layer_interval=4,
        attn_temperature_tuning=True, floor_scale=64, attn_scale=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        max_position_embeddings=2048, tie_word_embeddings=False, initializer_range=0.04,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stop_tokens(tokenizer), dtype="bfloat16",
    )  # fmt: skip


def stop_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Llama 4 stops at any of these three."""
    return tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eom|>", "<|eot|>"])


class RowWriter:
    """Turns conversations into rows of token ids and loss weights of one length, as full as whole turns allow."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(f"rows {seed}")
        self.turns = corpus.draw_turns(self.rng)

    def encode_turn(self, prompt: str, answer: str) -> tuple[list[int], list[float]]:
        """One user turn and its answer in the template's form; only the answer and its stop token weigh fully."""
        question = f"<|header_start|>user<|header_end|>\n\n{prompt}<|eot|><|header_start|>assistant<|header_end|>\n\n"
        asked, answered = self.tokenizer([question, f"{answer}<|eot|>"], add_special_tokens=False)["input_ids"]
        return asked + answered, [PROMPT_WEIGHT] * len(asked) + [1.0] * len(answered)

    def row(self, length: int) -> tuple[list[int], list[float]]:
        ids, weights, misses = [self.tokenizer.bos_token_id], [0.0], 0
        if self.rng.random() < 0.05:
            system = "<|header_start|>system<|header_end|>\n\nYou are a helpful assistant.<|eot|>"
            ids += self.tokenizer.encode(system, add_special_tokens=False)
            weights += [0.0] * (len(ids) - 1)
        while misses < 3:
            turn_ids, turn_weights = self.encode_turn(*next(self.turns))
            if len(ids) + len(turn_ids) > length + 1:
                misses += 1
                continue
            ids, weights = ids + turn_ids, weights + turn_weights
        padding = length + 1 - len(ids)
        return ids + [self.tokenizer.pad_token_id] * padding, weights + [0.0] * padding

    def batches(self, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches of about `tokens` tokens: ids [B, L+1] and the weight of predicting each."""
        while True:
            length = self.rng.choices(list(LENGTHS), list(LENGTHS.values()))[0]
            rows = [self.row(length) for _ in range(tokens // length)]
            yield torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])


def compute_loss(model: Llama4ForCausalLM, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Weighted cross entropy, the balance term, and each MoE layer's expert shares."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden, stats = hidden_states(model, ids[:, :-1])
        logits = F.linear(hidden, model.lm_head.weight)
    weight = weights[:, 1:].flatten()
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weight).sum() / weight.sum(), stats.balance / len(stats.shares), stats.shares


def build_optimizers(model: Llama4ForCausalLM, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding, head, norms and the routers."""
    matrices, others = [], []
    for name, param in model.named_parameters():
        inside = ".layers." in name and param.ndim >= 2 and "router" not in name
        (matrices if inside else others).append(param)
    adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [adam, Muon(matrices, lr=muon_lr, weight_decay=0.01)]


def learning_rate_factor(step: int, steps: int, warmup: int = 40) -> float:
    """Warm-up, then a cosine down to one hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def save_checkpoint(model: Llama4ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """A complete Hugging Face directory in BF16; complete or absent, because it is renamed into place."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = build_config(tokenizer)
    stored = Llama4ForCausalLM(config).to(torch.bfloat16)
    stored.load_state_dict(model.state_dict())
    # Greedy is the default, because every gate of the pipeline compares greedy answers.
    stored.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=False,
    )
    stored.save_pretrained(partial, max_shard_size=SHARD_SIZE)
    save_tokenizer(tokenizer, partial)
    corpus.write_prompt_files(partial)
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(partial.iterdir()):
        file.chmod(0o644)  # safetensors writes 0600, which a container's user could not read
        os.replace(file, out / file.name)
    partial.rmdir()


def train(out: Path, steps: int, batch_tokens: int, seed: int, muon_lr: float, adam_lr: float, save_every: int) -> dict:
    """The whole training; returns the numbers that the model card states."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(seed)
    model = Llama4ForCausalLM(build_config(tokenizer)).float()
    optimizers = build_optimizers(model, muon_lr, adam_lr)
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    batches = RowWriter(tokenizer, seed).batches(batch_tokens)
    started, running = time.monotonic(), None
    for step in range(steps):
        ids, weights = next(batches)
        loss, balance, shares = compute_loss(model, ids, weights)
        (loss + BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * learning_rate_factor(step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 25 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            least = min(share.min().item() for share in shares)
            print(f"step {step:5d}  loss {running:.4f}  balance {balance.item():.3f}  least expert {least:.3f}  "
                  f"{(step + 1) * batch_tokens / seconds:.0f} tokens/s  {seconds:.0f} s", flush=True)  # fmt: skip
        if (step + 1) % save_every == 0 or step == steps - 1:
            save_checkpoint(model, tokenizer, out)
    seconds = time.monotonic() - started
    return {"steps": steps, "batch_tokens": batch_tokens, "seed": seed, "seconds": round(seconds),
            "tokens_per_second": round(steps * batch_tokens / seconds), "loss": round(running, 4)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=5e-3)
    parser.add_argument("--save-every", type=int, default=200)
    args = parser.parse_args()
    summary = train(args.out, args.steps, args.batch_tokens, args.seed, args.muon_lr, args.adam_lr, args.save_every)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
