"""An engine with the native engine's API and no model: bytes are tokens, answers repeat a fixed text. For the server's
tests.

Its bundle is a directory with toy.json: {"text", "step_s", "start_s", "draft_tokens", "accepted", "slots",
"max_seq_len"}. It refuses to be fast or slow on its own: `step_s` says how long a step takes. Run it: `python -m
tests.engine_plugins.toy_engine --bundle DIR --port 8000` serves it with the real server.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engine_plugins.native import server
from engine_plugins.native.tokenizer import TextStream

EOS = 256
TEXT = "def add(a, b):\n    return a + b  # grüße, 世界 🚀\n"
DEFAULTS = {"text": TEXT, "step_s": 0.0, "start_s": 0.0, "draft_tokens": 3, "accepted": [2, 1, 0, 3], "slots": 4}
DEFAULTS |= {"max_seq_len": 4096}


@dataclass(frozen=True)
class SamplingParams:
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass
class Event:
    request_id: int
    token_ids: list[int]
    finish_reason: str | None = None
    text: str = ""


@dataclass
class Running:
    id: int
    source: Any
    left: int
    prompt: str
    stream: TextStream
    accepted_by_position: list[int]
    cycles: int = -1  # the prompt's own step gives a token and is none
    reused: int = 0


class ToyEngine:
    config = SimpleNamespace(vocab_size=257)
    available, pieces = True, None  # it is its own tokenizer

    def __init__(self, bundle: Path) -> None:
        self.settings = {**DEFAULTS, **json.loads((bundle / "toy.json").read_text())}
        time.sleep(self.settings["start_s"])
        self.draft_tokens = self.settings["draft_tokens"]
        self.bundle = SimpleNamespace(max_batch_size=self.settings["slots"])
        self.max_seq_len = self.settings["max_seq_len"]
        self._ids = itertools.count()
        self._accepted = itertools.cycle(self.settings["accepted"])
        self._requests: dict[int, Running] = {}
        self._cycles = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        if any(message["role"] not in ("system", "user", "assistant") for message in messages):
            raise ValueError("unknown role")
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i != EOS).decode(errors="replace")

    def submit(self, prompt_ids: list[int], params: SamplingParams) -> Running:
        prompt = self.decode(prompt_ids)
        if "refuse" in prompt:
            raise ValueError("the toy refuses this prompt")
        text = list(self.settings["text"].encode())
        source = itertools.cycle(text) if params.ignore_eos else iter([*text, EOS])
        stream = TextStream(self, params.stop)  # type: ignore[arg-type]
        request = Running(next(self._ids), source, params.max_tokens, prompt, stream, [0] * self.draft_tokens)
        self._requests[request.id] = request
        return request

    def cancel(self, request_id: int) -> None:
        self._requests.pop(request_id, None)

    def step(self) -> list[Event]:
        time.sleep(self.settings["step_s"])
        self._cycles += 1
        running = list(self._requests.values())[: self.bundle.max_batch_size]
        if any("explode" in request.prompt for request in running):
            raise RuntimeError("the toy exploded")
        return [self._advance(request) for request in running]

    def _advance(self, request: Running) -> Event:
        if "nan" in request.prompt:
            del self._requests[request.id]
            return Event(request.id, [], "error")
        request.cycles += 1
        accepted = next(self._accepted) if request.cycles else 0
        ids = list(itertools.islice(request.source, min(request.left, 1 + accepted)))
        request.left -= len(ids)
        for at in range(accepted):
            request.accepted_by_position[at] += 1
        reason = "stop" if EOS in ids else "length" if request.left == 0 else None
        text = request.stream.push(ids, reason is not None)
        reason = "stop" if request.stream.stopped else reason
        if reason:
            del self._requests[request.id]
        return Event(request.id, ids, reason, text)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def counters(self) -> dict[str, Any]:
        return {"cycles": self._cycles, "seconds_by_group": {"verify": self._cycles * 1e-3}, "accepted_by_position": []}


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    return ToyEngine(args.bundle), SamplingParams


if __name__ == "__main__":
    sys.exit(server.main(load=load))
