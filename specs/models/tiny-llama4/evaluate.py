"""Greedy held-out accuracy and expert usage of a checkpoint, with transformers' own Llama 4; the model card's numbers.

Refuses to be a benchmark harness: exact match of the last `Answer: ` line, one greedy sample per problem.

    python specs/models/tiny-llama4/evaluate.py DIR [--limit 16]
"""

import argparse
import json
import sys
import time
from pathlib import Path

import corpus
import torch
from fast_forward import hidden_states
from torch import Tensor
from transformers import AutoTokenizer, Llama4ForCausalLM, PreTrainedTokenizerFast

BATCH = 32
LONG_GROUPS = 32


def load_problems(model_dir: Path, limit: int) -> list[corpus.Problem]:
    """The first `limit` held-out problems of each domain."""
    rows = [corpus.Problem(**json.loads(line)) for line in (model_dir / "heldout.jsonl").read_text().splitlines()]
    return [row for domain in corpus.DOMAINS for row in [row for row in rows if row.domain == domain][:limit]]


def render(tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@torch.inference_mode()
def generate(
    model: Llama4ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], max_new: int
) -> list[str]:
    """Greedy answers. Rows of equal length share a batch: chunk borders are absolute, so padding would move them."""
    rendered = [tokenizer.encode(render(tokenizer, prompt), add_special_tokens=False) for prompt in prompts]
    answers: dict[int, str] = {}
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(rendered):
        by_length.setdefault(len(ids), []).append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), BATCH):
            batch = indices[start : start + BATCH]
            ids = torch.tensor([rendered[index] for index in batch])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new, do_sample=False)
            texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            answers.update(zip(batch, texts, strict=True))
    return [answers[index] for index in range(len(prompts))]


@torch.inference_mode()
def expert_shares(
    model: Llama4ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[corpus.Problem]
) -> Tensor:
    """Share of held-out tokens each expert sees: [MoE layers, experts]."""
    sums, tokens = 0, 0
    for problem in problems:
        text = f"{render(tokenizer, problem.prompt)}{problem.answer}<|eot|>"
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])[:, : model.config.attention_chunk_size]
        _, stats = hidden_states(model, ids)
        sums, tokens = sums + torch.stack(stats.shares) * ids.shape[1], tokens + ids.shape[1]
    return sums / tokens


def logits_gap(model: Llama4ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Largest difference in FP32 between the training forward and transformers', over a conversation of 512 tokens."""
    problems = corpus.draw_unique("gap", 2, True)
    text = "".join(render(tokenizer, problem.prompt) + problem.answer + "<|eot|>" for problem in problems)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)[:512]])
    exact = Llama4ForCausalLM(model.config).float()
    exact.load_state_dict(model.state_dict())
    with torch.inference_mode():
        fast = exact.lm_head(hidden_states(exact, ids)[0])
        return (exact(ids).logits - fast).abs().max().item()


def evaluate(model_dir: Path, limit: int = 64) -> dict:
    """Everything the model card states about quality."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = Llama4ForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    problems = load_problems(model_dir, limit)
    started = time.monotonic()
    singles = generate(model, tokenizer, [problem.prompt for problem in problems], 128)
    accuracy = {}
    for domain in corpus.DOMAINS:
        scored = [(text, problem) for text, problem in zip(singles, problems, strict=True) if problem.domain == domain]
        for text, problem in [pair for pair in scored if corpus.extract_target(pair[0]) != pair[1].target][:2]:
            print(f"--- wrong: {problem.id}\n{problem.prompt}\n>>> {text!r}\n", file=sys.stderr)
        accuracy[domain] = sum(corpus.extract_target(text) == problem.target for text, problem in scored) / len(scored)
    shares = expert_shares(model, tokenizer, problems)
    return {
        "accuracy": accuracy,
        "long_accuracy": long_accuracy(model, tokenizer, problems),
        "expert_shares": [[round(share, 3) for share in layer] for layer in shares.tolist()],
        "logits_gap": logits_gap(model, tokenizer),
        "seconds": round(time.monotonic() - started),
    }


def long_accuracy(
    model: Llama4ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[corpus.Problem]
) -> float:
    """Share of right answers inside numbered requests of four problems, one per domain: over 150 tokens each."""
    columns = [[problem for problem in problems if problem.domain == domain][:LONG_GROUPS] for domain in corpus.DOMAINS]
    groups = [list(group) for group in zip(*columns, strict=True)]
    texts = generate(model, tokenizer, [corpus.merge_problems(group)[0] for group in groups], 512)
    right = 0
    for text, group in zip(texts, groups, strict=True):
        found = corpus.ANSWER_PATTERN.findall(text)
        right += sum(a == problem.target for a, problem in zip(found, group, strict=False))
    return right / (len(groups) * len(columns))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--limit", type=int, default=64, help="problems per domain")
    args = parser.parse_args()
    print(json.dumps(evaluate(args.model_dir, args.limit), indent=1))
