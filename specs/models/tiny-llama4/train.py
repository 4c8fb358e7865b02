"""Trains the tiny Llama 4 from nothing but a seed: tokenizer, weights, prompts, one Hugging Face directory.

Everything that makes Llama 4 Maverick itself is here and used: dense and MoE layers alternate, top-1 sigmoid routing
on the expert's input, a shared expert, NoPE with attention temperature every fourth layer, chunks on the others.
Refuses to be a general trainer: one corpus, one shape, CPU.

    python specs/models/tiny-llama4/train.py --out FIRST
    python specs/models/tiny-llama4/train.py --start FIRST --out DIR --seed 1 --steps 2400 --learning-rate 1e-3 \
        --domains code code math facts extract
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
from torch import Tensor
from train_tokenizer import VOCAB_SIZE, save_tokenizer, train_tokenizer
from transformers import AutoTokenizer, GenerationConfig, Llama4ForCausalLM, Llama4TextConfig, PreTrainedTokenizerFast

# Lengths and how often each is drawn. Short rows learn the tasks, long ones to reach back past one chunk of 128.
LENGTHS = {128: 0.55, 256: 0.25, 512: 0.12, 1024: 0.08}
PROMPT_WEIGHT = 0.1  # prompts are mostly noise to predict, but some of it teaches the language
BALANCE_WEIGHT = 0.01
EMBEDDING_STD = 0.3  # a token's identity must not drown in what the first layers add to it
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

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, domains: list[str]) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(f"rows {seed}")
        self.turns = corpus.draw_turns(self.rng, domains)

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


def build_optimizer(model: Llama4ForCausalLM, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW; decay on the matrices only.

    Muon was tried: without QK norm, as in Maverick, it drives attention logits past 100, and copying is hardly learnt.
    """
    matrices = [param for param in model.parameters() if param.ndim >= 2]
    vectors = [param for param in model.parameters() if param.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def learning_rate_factor(step: int, steps: int, warmup: int = 100) -> float:
    """Warm-up, then a cosine down to one hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def save_checkpoint(model: Llama4ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """A complete Hugging Face directory in BF16; a half-written file never appears under its final name."""
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


@torch.no_grad()
def initialize_for_copying(model: Llama4ForCausalLM) -> None:
    """Starts with attention that copies what it looks at, and with some heads that look at what equals themselves.

    From an ordinary start it takes more than ten million tokens until names are copied out of the prompt, because what
    a head moves and what the output layer reads have to find each other first (Trockman and Kolter 2023, mimetic).
    """
    config, embedding = model.config, model.model.embed_tokens.weight
    embedding.normal_(std=EMBEDDING_STD)
    model.lm_head.weight.copy_(embedding * (config.initializer_range / EMBEDDING_STD))
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        attention = layer.self_attn
        by_head = attention.v_proj.weight.view(config.num_key_value_heads, config.head_dim, -1)
        attention.o_proj.weight.copy_(by_head.repeat_interleave(group, dim=0).flatten(0, 1).T)
        queries = attention.q_proj.weight.view(config.num_key_value_heads, group, config.head_dim, -1)
        queries[:, 0] = attention.k_proj.weight.view(config.num_key_value_heads, config.head_dim, -1)


def load_start(start: Path | None, seed: int) -> tuple[PreTrainedTokenizerFast, Llama4ForCausalLM]:
    """A new tokenizer and random weights, or those of an earlier round; FP32 either way."""
    torch.manual_seed(seed)
    if start:
        model = Llama4ForCausalLM.from_pretrained(start, dtype=torch.float32)
        return AutoTokenizer.from_pretrained(start), model
    tokenizer = train_tokenizer(seed)
    model = Llama4ForCausalLM(build_config(tokenizer)).float()
    initialize_for_copying(model)
    return tokenizer, model


def train(args: argparse.Namespace) -> dict:
    """One round of training; returns the numbers that the model card states."""
    tokenizer, model = load_start(args.start, args.seed)
    optimizer = build_optimizer(model, args.learning_rate)
    batches = RowWriter(tokenizer, args.seed, args.domains).batches(args.batch_tokens)
    started, running = time.monotonic(), None
    for step in range(args.steps):
        ids, weights = next(batches)
        loss, balance, shares = compute_loss(model, ids, weights)
        (loss + BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_factor(step, args.steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 25 == 0 or step == args.steps - 1:
            seconds = time.monotonic() - started
            least = min(share.min().item() for share in shares)
            print(f"step {step:5d}  loss {running:.4f}  balance {balance.item():.3f}  least expert {least:.3f}  "
                  f"{(step + 1) * args.batch_tokens / seconds:.0f} tokens/s  {seconds:.0f} s", flush=True)  # fmt: skip
        if (step + 1) % args.save_every == 0 or step == args.steps - 1:
            save_checkpoint(model, tokenizer, args.out)
    seconds = time.monotonic() - started
    speed = round(args.steps * args.batch_tokens / seconds)
    return {
        "steps": args.steps,
        "seed": args.seed,
        "seconds": round(seconds),
        "tokens_per_second": speed,
        "loss": running,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="continue from this checkpoint with a new learning-rate cycle")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument(
        "--domains", nargs="+", default=list(corpus.DOMAINS), help="name one twice to see it twice as often"
    )
    parser.add_argument("--save-every", type=int, default=1000)
    print(json.dumps(train(parser.parse_args())))


if __name__ == "__main__":
    main()
