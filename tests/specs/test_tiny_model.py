"""The tiny Llama 4 that every offline test serves: its corpus, its checkpoint and what it can do.

What it hunts: a held-out problem that was trained on, a checkpoint that is not the Llama 4 it claims to be, a second
begin-of-text token, an expert nobody visits, and a model too weak for its answers to mean anything.
Run it: `python -m pytest tests/specs/test_tiny_model.py`.
"""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

MODEL_DIR = Path(__file__).parents[2] / "specs" / "models" / "tiny-llama4"
DOMAINS = ["code", "math", "facts", "extract"]


def load_corpus() -> ModuleType:
    # By path, because the folder carries the model's name, which is no Python identifier.
    spec = importlib.util.spec_from_file_location("tiny_llama4_corpus", MODEL_DIR / "corpus.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


corpus = load_corpus()


def read_rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (MODEL_DIR / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


@pytest.fixture(scope="module")
def report() -> dict:
    argv = [sys.executable, str(MODEL_DIR / "evaluate.py"), str(MODEL_DIR), "--limit", "8"]
    return json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("domain", DOMAINS)
def test_train_side_never_draws_heldout_content(domain: str) -> None:
    rng = random.Random("split test")
    heldout = {row["prompt"] for row in read_rows("heldout.jsonl")}
    assert not heldout & {corpus.draw_problem(rng, domain).prompt for _ in range(3000)}


def test_split_ignores_wording() -> None:
    draws = [corpus.draw_facts(random.Random(seed)) for seed in range(4000)]
    sides: dict[tuple, set[bool]] = {}
    for draw in draws:
        sides.setdefault(draw.content, set()).add(corpus.is_heldout("facts", draw.content))
    assert all(len(side) == 1 for side in sides.values())


def test_calibration_prompts_and_heldout_are_disjoint() -> None:
    train = {row["prompt"] for row in read_rows("prompts.jsonl")}
    assert not train & {row["prompt"] for row in read_rows("heldout.jsonl")}


@pytest.mark.parametrize(("name", "per_domain"), [("prompts.jsonl", 600), ("heldout.jsonl", 64)])
def test_prompt_files_hold_each_domain_equally(name: str, per_domain: int) -> None:
    domains = [row["domain"] for row in read_rows(name)]
    assert {domain: domains.count(domain) for domain in DOMAINS} == dict.fromkeys(DOMAINS, per_domain)


def test_prompt_files_are_what_the_corpus_writes(tmp_path: Path) -> None:
    corpus.write_prompt_files(tmp_path)
    for name in ("prompts.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_text() == (MODEL_DIR / name).read_text()


def test_every_answer_ends_with_its_target() -> None:
    assert all(row["answer"].endswith(f"\nAnswer: {row['target']}") for row in read_rows("heldout.jsonl"))


def test_code_answers_run_to_their_target() -> None:
    for row in read_rows("heldout.jsonl"):
        if row["domain"] == "code":
            function, run = row["answer"].removeprefix("```python\n").split("\n```\nRun ")
            namespace: dict = {}
            exec(function, namespace)  # our own generator's text, five lines at most
            assert str(eval(run.split("):")[0] + ")", namespace)) == row["target"]


def test_long_request_holds_every_answer_in_order() -> None:
    problems = corpus.draw_unique("merge test", 1, heldout=True)
    _, answer = corpus.merge_problems(problems)
    assert corpus.ANSWER_PATTERN.findall(answer) == [problem.target for problem in problems]


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("4096") == ["4", "0", "9", "6"]


def test_template_writes_begin_of_text_once(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "Compute 1 + 1."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_template_has_llama4s_form(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": " hi "}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    user = "<|begin_of_text|><|header_start|>user<|header_end|>\n\nhi<|eot|>"
    assert text == user + "<|header_start|>assistant<|header_end|>\n\n"


def test_config_exercises_everything_llama4_has() -> None:
    config = AutoConfig.from_pretrained(MODEL_DIR)
    assert config.architectures == ["Llama4ForCausalLM"]
    assert (config.moe_layers, config.no_rope_layers) == ([1, 3, 5, 7], [1, 1, 1, 0, 1, 1, 1, 0])
    assert (config.attention_chunk_size, config.floor_scale, config.attn_temperature_tuning) == (128, 64, True)
    assert not config.use_qk_norm
    assert not config.tie_word_embeddings


def test_checkpoint_is_two_bf16_shards_within_16_mb() -> None:
    shards = sorted(MODEL_DIR.glob("*.safetensors"))
    assert len(shards) == 2
    assert sum(shard.stat().st_size for shard in shards) <= 16e6
    for shard in shards:
        with safe_open(shard, "pt") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118 (no dict)


@pytest.mark.parametrize("domain", DOMAINS)
def test_model_answers_heldout_problems(report: dict, domain: str) -> None:
    assert report["accuracy"][domain] >= 0.75  # six of eight; the card's number comes from all 64


def test_every_expert_sees_a_twentieth_of_the_tokens(report: dict) -> None:
    assert min(share for layer in report["expert_shares"] for share in layer) >= 0.05


def test_training_forward_agrees_with_transformers(report: dict) -> None:
    assert report["logits_gap"] < 1e-3
