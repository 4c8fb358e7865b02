"""Text in, token ids out, and back: the bundle's tokenizer and chat template.

What it is: a thin layer over `tokenizers` and the checkpoint's own Jinja template, rendered in a sandbox.
What it refuses to be: a template of its own; what the model was trained with is what is served.
Run it: `python -c "from engine_plugins.native.tokenizer import ChatTokenizer; ..."`; the engine owns one.
"""

from __future__ import annotations

import codecs
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specs.errors import InputError


def _raise(message: str) -> None:
    raise InputError(message, "chat template", "check the order and roles of the messages")


class _Pieces(dict[int, bytes]):
    """The bytes of each token of a byte-level vocabulary, special tokens empty; looked up once per token id."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # GPT-2: these bytes stand for themselves
        moved = [byte for byte in range(0x100) if byte not in set(kept)]
        self._byte = {chr(byte): byte for byte in kept} | {chr(0x100 + i): byte for i, byte in enumerate(moved)}

    def __missing__(self, token: int) -> bytes:
        text = "" if token in self._special else self._tokenizer.id_to_token(token) or ""
        try:
            piece = bytes(self._byte[character] for character in text)
        except KeyError:  # an added token may hold what the alphabet does not
            piece = text.encode()
        self[token] = piece
        return piece


class ChatTokenizer:
    """Tokenizer and chat template of a model directory. `available` is False when the directory has none."""

    def __init__(self, directory: Path) -> None:
        self.where = str(directory)
        self.available = (directory / "tokenizer.json").exists()
        self._template = None
        self.pieces: _Pieces | None = None  # None: the text of a token depends on its neighbours
        if not self.available:
            return
        from tokenizers import Tokenizer, decoders

        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        if isinstance(self._tokenizer.decoder, decoders.ByteLevel):
            self.pieces = _Pieces(self._tokenizer)
        config_file = directory / "tokenizer_config.json"
        config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
        self._variables = {name: self._content(config.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
        jinja_file = directory / "chat_template.jinja"
        source = jinja_file.read_text(encoding="utf-8") if jinja_file.exists() else config.get("chat_template")
        if isinstance(source, str):
            self._template = self._compile(source)

    @staticmethod
    def _content(token: Any) -> str:
        return (token.get("content") if isinstance(token, dict) else token) or ""

    @staticmethod
    def _compile(source: str) -> Any:
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        env.globals["raise_exception"] = _raise
        env.globals["strftime_now"] = lambda fmt: datetime.datetime.now().strftime(fmt)
        env.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        return env.from_string(source)

    def _need(self) -> None:
        if not self.available:
            raise InputError(
                "the bundle has no tokenizer", self.where, "send token ids, or build from a checkpoint with one"
            )

    def render_chat(self, messages: Sequence[dict[str, Any]]) -> str:
        """The prompt text of a conversation, ready for the assistant's turn."""
        self._need()
        if self._template is None:
            raise InputError("the checkpoint has no chat template", self.where, "use /v1/completions")
        if not messages:
            raise InputError("messages is empty", "messages", "send at least one message")
        return self._template.render(messages=list(messages), add_generation_prompt=True, tools=None, **self._variables)

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation; the template writes its own special tokens."""
        return self._tokenizer.encode(self.render_chat(messages), add_special_tokens=False).ids

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain text, with the tokenizer's own special tokens (such as BOS)."""
        self._need()
        return self._tokenizer.encode(text).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        self._need()
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


class TextStream:
    """Turns growing token lists into text deltas: holds back half a character and what may become a stop string.

    A byte-level vocabulary costs a look-up per token; any other is decoded again from a few tokens before."""

    WINDOW = 6  # tokens re-read at least, so that merges and spaces at the seam come out as in one piece

    def __init__(self, tokenizer: ChatTokenizer, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, [s for s in stop if s]
        self._pieces, self._half = tokenizer.pieces, b""  # half: bytes of a character that is not complete
        self._ids: list[int] = []
        self._start, self._before = 0, ""  # the text of ids[start:] that has been read out already
        self._held = ""
        self.text = ""  # what was given out
        self.stopped = False

    def push(self, token_ids: Sequence[int], final: bool) -> str:
        """Text that is certain after these tokens; sets `stopped` when a stop string appeared (text ends before it)."""
        if self._pieces is not None:
            pieces = self._pieces
            given = self._half + b"".join([pieces[token] for token in token_ids])
            delta, used = codecs.utf_8_decode(given, "replace", final)
            self._half = given[used:]
        elif self._tokenizer.available:
            delta = self._decode_window(token_ids, final)
        else:
            return ""
        if self._stop:
            delta = self._before_stop(delta, final)
        self.text += delta
        return delta

    def _decode_window(self, token_ids: Sequence[int], final: bool) -> str:
        self._ids.extend(token_ids)
        after = self._tokenizer.decode(self._ids[self._start :])
        if after.endswith("\ufffd") and not final:
            return ""
        delta, self._before = after[len(self._before) :], after
        if len(self._ids) - self._start > 3 * self.WINDOW:
            self._start = len(self._ids) - self.WINDOW
            self._before = self._tokenizer.decode(self._ids[self._start :])
        return delta

    def _before_stop(self, delta: str, final: bool) -> str:
        self._held += delta
        cut = min((i for i in (self._held.find(s) for s in self._stop) if i >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            delta, self._held = self._held[:cut], ""
            return delta
        keep = 0 if final else self._partial_stop()
        delta, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return delta

    def _partial_stop(self) -> int:
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest
