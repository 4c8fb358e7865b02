"""The tokenizer of the tiny Llama 4: byte-level BPE, 1024 entries, Llama 4's special tokens and chat template.

Special tokens come last, as in Llama 4. Digits are always single tokens, because arithmetic is learnt digit by digit.
Refuses to add the begin-of-text token on its own: the chat template writes it, once.

    python specs/models/tiny-llama4/train.py --out DIR       # trains the tokenizer first, then the model
"""

import random
from itertools import islice
from pathlib import Path

import corpus
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1024
SPECIAL_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>",
    "<|finetune_right_pad|>", "<|python_start|>", "<|python_end|>", *(f"<|reserved_{number}|>" for number in range(6)),
]  # fmt: skip
# Llama 4's split pattern without its case rules; \p{N} is one digit instead of up to three.
SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] | trim }}"
    "{%- else %}{%- for part in message['content'] %}{{- part['text'] | trim }}{%- endfor %}{%- endif %}"
    "{{- '<|eot|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\\n\\n' }}{%- endif %}"
)


def sample_texts(seed: int, num_turns: int = 12000) -> list[str]:
    """Training text for the tokenizer, from the train side only."""
    turns = corpus.draw_turns(random.Random(f"tokenizer {seed}"))
    roles = ["system\n\nYou are a helpful assistant.", "user\n\n", "assistant\n\n"] * 100
    return roles + [text for turn in islice(turns, num_turns) for text in turn]


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Trains the BPE on the corpus and wraps it with the special tokens and the template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sample_texts(seed), trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    if bpe.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the corpus yields {bpe.get_vocab_size()} entries, not {VOCAB_SIZE}: sample more turns")
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot|>",
        pad_token="<|finetune_right_pad|>",
        chat_template=CHAT_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja, loadable by AutoTokenizer without a network."""
    tokenizer.save_pretrained(out)
