"""Token ids in, text out, as the tokens come: never half a character, never the start of a stop string.

A byte-level token may end inside a UTF-8 character; its text is held back until the rest has come. Text that could
be the start of a stop string is held back too, until it is or is not one.

It refuses to know a tokenizer: it is given `decode(ids) -> str` and relies on nothing but that appending tokens
appends text, except for a last, unfinished character.

Run it: `python -m pytest tests/engine_plugins/test_server_text.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what a decoder puts where the bytes are no character, or not yet one
MAX_WINDOW_TOKENS = 64  # bytes that never become a character are given up as U+FFFD after this many tokens


class TextStream:
    """The text of one completion. `push` returns what may be sent now; `stopped`: a stop string was found."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._window: list[int] = []  # the last sent tokens, then the unsent ones
        self._context = 0  # how many tokens of the window are sent whole: their text joins words for the decoder
        self._sent = 0  # characters of the window's text that are out
        self._held = ""  # could be the start of a stop string
        self.stopped = False

    def push(self, token_ids: Sequence[int], final: bool = False) -> str:
        """Text that these tokens finished. With `final`, everything that is still held back."""
        if self.stopped:
            return ""
        text = self._detokenize(token_ids, final)
        return self._until_stop(text, final) if self._stop else text

    def _detokenize(self, token_ids: Sequence[int], final: bool) -> str:
        window = self._window
        window.extend(token_ids)
        text = self._decode(window)
        whole = final or not text.endswith(UNFINISHED) or len(window) - self._context > MAX_WINDOW_TOKENS
        stable = text if whole else text.rstrip(UNFINISHED)
        new = stable[self._sent :]
        if not whole:
            self._sent = max(self._sent, len(stable))
            return new
        del window[: self._context]  # slide: the new tokens become the context of the next ones
        self._context = len(window)
        self._sent = len(self._decode(window))
        return new

    def _until_stop(self, text: str, final: bool) -> str:
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if final else max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :] if keep else ""
        return text[: len(text) - keep] if keep else text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
