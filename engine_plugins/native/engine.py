"""The engine's front: requests in, tokens out, a continuous batch over slots.

What it is: admission, chunked prefill, one backend call per cycle for all running slots, stop conditions, counters.
What it refuses to be: a server (server.py), or a place for arithmetic: that is one C++ call per cycle, GIL released.
Run it: `python -m engine_plugins.native.bench --bundle DIR`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine_plugins.native.backend import Backend, Prefill, open_backend
from engine_plugins.native.bundle import load_bundle
from engine_plugins.native.slots import Slots
from engine_plugins.native.tokenizer import ChatTokenizer, TextStream
from specs.errors import InputError


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. temperature 0 is greedy; `seed` None means a fresh one per request."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def check(self) -> None:
        """Raise InputError for values that make no sense."""
        if self.max_tokens < 1:
            raise InputError(f"max_tokens={self.max_tokens}", "max_tokens", "at least 1")
        if not 0.0 <= self.temperature <= 100.0:
            raise InputError(f"temperature={self.temperature}", "temperature", "0 (greedy) to 100")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p={self.top_p}", "top_p", "above 0, at most 1")


class Event(NamedTuple):
    """What one cycle brought to one request: its new tokens (none when only the end is new) and new text."""

    request_id: int
    token_ids: tuple[int, ...]
    finish_reason: str | None = None  # "stop", "length", "cancelled", "error" (the logits are not numbers)
    text: str = ""


@dataclass(frozen=True)
class Completion:
    """A finished request. `accepted_by_position[i]` counts cycles whose draft i+1 was accepted; `cycles` those
    with drafts."""

    token_ids: list[int]
    text: str
    finish_reason: str
    accepted_by_position: list[int]
    cycles: int


@dataclass
class Request:
    """A request's life: waiting, prefilling (0 < slot position), decoding, finished."""

    id: int
    prompt_ids: list[int]
    params: SamplingParams
    accepted_by_position: list[int]
    stream: TextStream
    output_ids: list[int] = field(default_factory=list)
    cycles: int = 0
    slot: int = -1
    prefilled: int = 0
    reused: int = 0  # prompt tokens whose cache another request had computed
    decoding: bool = False
    cancelled: bool = False
    finish_reason: str | None = None
    submitted: float = field(default_factory=time.perf_counter)

    @property
    def text(self) -> str:
        """Text given out so far."""
        return self.stream.text


class Engine:
    """One bundle, ready to generate. With many running slots fewer tokens are drafted (slots * (1 + drafts) <=
    row_budget). `fused=False` runs the target's operators one by one (cpp/unfused.h), for comparison. `device="cuda"`
    runs on a GPU, which knows neither `threads`, `isa`, `row_budget` nor `fused`.
    `submit` and `cancel` may be called from any thread; `step` from one at a time."""

    PREFILL_CHUNK = 128

    def __init__(
        self,
        bundle_path: Path | str,
        *,
        threads: int | None = None,
        speculate: bool = True,
        forced_acceptance: float | None = None,
        verify_digests: bool = True,
        isa: str | None = None,
        row_budget: int = 16,
        fused: bool = True,
        device: str = "cpu",
    ) -> None:
        self.bundle = load_bundle(Path(bundle_path), verify=verify_digests)
        self.config = self.bundle.config
        self.draft_tokens = self.bundle.draft_tokens if speculate else 0
        if forced_acceptance is not None and not 1.0 <= forced_acceptance <= self.draft_tokens + 1:
            raise InputError(f"forced_acceptance={forced_acceptance}", "engine", f"1 to {self.draft_tokens + 1}")
        self.forced_acceptance = forced_acceptance
        self.backend: Backend = open_backend(
            self.bundle,
            draft_tokens=self.draft_tokens,
            prefill_rows=self.PREFILL_CHUNK,
            threads=threads,
            forced_acceptance=forced_acceptance,
            isa=isa,
            row_budget=row_budget,
            fused=fused,
            device=device,
        )
        self.tokenizer = ChatTokenizer(self.bundle.path)
        self.max_seq_len = self.bundle.max_seq_len
        self._eos = frozenset(self.config.eos_token_ids)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._slots = Slots(self.bundle.max_batch_size)
        self._requests: dict[int, Request] = {}
        self._next_id, self._some_cancelled = 0, False
        self._lock = threading.Lock()
        self._seeds = np.random.SeedSequence()
        self._totals = {
            "tokens": 0,
            "prompt_tokens": 0,
            "steps": 0,
            "step_seconds": 0.0,
            "requests": 0,
            "reused_tokens": 0,
        }

    # ---- text
    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation through the model's chat template."""
        return self.tokenizer.encode_chat(messages)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(ids)

    # ---- requests
    @property
    def num_waiting(self) -> int:
        """Requests without a slot yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """True while `step` has something to do."""
        return bool(self._waiting or self._running)

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams | None = None) -> Request:
        """Queue a prompt; raises InputError when it cannot be served. The answer may be cut at max_seq_len
        ("length")."""
        params = params or SamplingParams()
        params.check()
        prompt = [int(t) for t in prompt_ids]
        if not prompt:
            raise InputError("the prompt is empty", "prompt", "send at least one token")
        if len(prompt) >= self.max_seq_len:
            raise InputError(
                f"the prompt has {len(prompt)} tokens",
                "prompt",
                f"at most {self.max_seq_len - 1} fit max_seq_len={self.max_seq_len}; shorten it",
            )
        if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
            raise InputError(
                "a prompt token id is outside the vocabulary", "prompt", f"0..{self.config.vocab_size - 1}"
            )
        with self._lock:
            self._next_id += 1
            request = Request(
                self._next_id, prompt, params, [0] * self.draft_tokens, TextStream(self.tokenizer, params.stop)
            )
            self._requests[request.id] = request
            self._waiting.append(request)
            self._totals["requests"] += 1
        return request

    def cancel(self, request_id: int) -> None:
        """End a request at the next step; its slot is freed. Unknown or finished ids are ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            request.cancelled = self._some_cancelled = True

    def step(self) -> list[Event]:
        """Admit, run one cycle for every running slot, and tell what happened. Empty when there is nothing to do."""
        started = time.perf_counter()
        events = self._drop_cancelled() if self._some_cancelled else []
        if self._waiting:
            self._admit()
        if not self._running:
            return events
        prefills: list[Prefill] = []
        budget = self.PREFILL_CHUNK
        for request in self._running:
            if not request.decoding and budget > 0:
                budget -= self._plan_prefill(request, prefills, budget)
        decoding = [r for r in self._running if r.decoding]
        results = self.backend.cycle(prefills, [r.slot for r in decoding])
        events += [self._take(request, *result) for request, result in zip(decoding, results, strict=False)]
        self._running = [r for r in self._running if r.finish_reason is None]
        self._totals["steps"] += 1
        self._totals["step_seconds"] += time.perf_counter() - started
        return events

    def _drop_cancelled(self) -> list[Event]:
        events = []
        with self._lock:
            self._some_cancelled = False
            for request in [r for r in (*self._running, *self._waiting) if r.cancelled]:
                if request.slot >= 0:
                    self._running.remove(request)
                else:
                    self._waiting.remove(request)
                self._finish(request, "cancelled")
                events.append(Event(request.id, (), "cancelled"))
        return events

    def _admit(self) -> None:
        with self._lock:
            while self._waiting and self._slots.free:
                request = self._waiting.popleft()
                placed = self._slots.take(request.prompt_ids)
                if placed.source != placed.slot:
                    self.backend.copy_prefix(placed.source, placed.slot, placed.reused)
                request.slot, request.reused, request.prefilled = placed.slot, placed.reused, placed.reused
                self._totals["reused_tokens"] += placed.reused
                self._running.append(request)

    def _plan_prefill(self, request: Request, prefills: list[Prefill], budget: int) -> int:
        """Add this request's next piece; all but the prompt's last token. Then it decodes, in this same cycle."""
        rows = min(budget, len(request.prompt_ids) - 1 - request.prefilled)
        if rows > 0:
            begin = request.prefilled
            prefills.append((request.slot, begin, request.prompt_ids[begin : begin + rows + 1]))
            request.prefilled += rows
            self._slots.hold(request.slot, request.prompt_ids[: request.prefilled + 1])
        if request.prefilled == len(request.prompt_ids) - 1:
            p = request.params
            seed = p.seed if p.seed is not None else int(self._seeds.spawn(1)[0].generate_state(1, np.uint64)[0])
            self.backend.start(request.slot, request.prefilled, request.prompt_ids[-1], p.temperature, p.top_p, seed)
            request.decoding = True
            self._totals["prompt_tokens"] += len(request.prompt_ids)
        return rows

    def _take(self, request: Request, tokens: Sequence[int], proposed: int) -> Event:
        params, reason = request.params, None
        limit = min(params.max_tokens, self.max_seq_len - len(request.prompt_ids)) - len(request.output_ids)
        kept = tokens if len(tokens) <= limit else tokens[:limit]
        if not (params.ignore_eos or self._eos.isdisjoint(kept)):
            end = next(i for i, t in enumerate(kept) if t in self._eos)
            kept, reason = kept[: end + 1], "stop"
        if not tokens:
            reason = "error"
        if reason is None and len(kept) == limit:
            reason = "length"
        request.output_ids.extend(kept)
        if proposed == self.draft_tokens > 0:  # fewer under load or at the end of the cache: not a sample of acceptance
            request.cycles += 1
            for i in range(min(len(kept), len(tokens) - 1)):
                request.accepted_by_position[i] += 1
        delta = request.stream.push(kept, reason is not None)
        if request.stream.stopped:
            reason = "stop"
        self._totals["tokens"] += len(kept)
        if reason:
            self._finish(request, reason)
        return Event(request.id, tuple(kept), reason, delta)

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        self._requests.pop(request.id, None)
        if request.slot >= 0:
            known = request.prompt_ids[: request.prefilled + 1] + request.output_ids
            self._slots.give_back(request.slot, () if reason == "error" else known)
            request.slot = -1

    # ---- conveniences
    def generate(self, prompts: Iterable[Sequence[int]], params: SamplingParams | None = None) -> list[Completion]:
        """Run prompts to their end, as a batch, and return them in order. Not for use while another thread steps."""
        requests = [self.submit(p, params) for p in prompts]
        while any(r.finish_reason is None for r in requests):
            self.step()
        return [
            Completion(r.output_ids, r.text, str(r.finish_reason), r.accepted_by_position, r.cycles) for r in requests
        ]

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Teacher-forced logits [T, V] fp32. Needs an idle engine (it borrows a slot)."""
        return self._forced(token_ids, "logits")

    def hidden(self, token_ids: Sequence[int], layers: Sequence[int] | None = None) -> np.ndarray:
        """Residual stream after each capture layer [T, 3, H]; `layers` must be the bundle's capture layers, in
        order."""
        captured = list(self.bundle.draft.capture_layers) if self.bundle.draft else []
        if layers is not None and list(layers) != captured:
            raise InputError(f"layers {list(layers)} are not captured", "hidden", f"this bundle captures {captured}")
        flat = self._forced(token_ids, "hidden")
        return flat.reshape(len(flat), len(captured), self.config.hidden_size)

    def draft_logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Draft logits [T-1, draft V]: row i saw features up to i and token i+1, and predicts token i+2."""
        return self._forced(token_ids, "draft")

    def _forced(self, token_ids: Sequence[int], what: str) -> np.ndarray:
        if not self._slots.free:
            raise InputError("every slot is taken", what, "wait for the engine to be idle")
        if not 0 < len(token_ids) <= self.max_seq_len:
            raise InputError(f"{len(token_ids)} tokens", what, f"1..{self.max_seq_len}")
        return self.backend.forced(self._slots.borrow(), list(token_ids), what)

    def counters(self) -> dict[str, Any]:
        """Totals since start: tokens, cycles, seconds per operator group, acceptance by position, what runs
        underneath."""
        return {
            **self._totals,
            **self.backend.counters(),
            "forced_acceptance": self.forced_acceptance,
            "draft_tokens": self.draft_tokens,
            "running": self.num_running,
            "waiting": self.num_waiting,
        }

    def close(self) -> None:
        """Stop the backend's threads and free its memory."""
        self.backend.close()
