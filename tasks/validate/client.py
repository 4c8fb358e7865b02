"""One request to a speculative endpoint, measured right: what is sent, what came back, and what that means per token.

Definitions (all from the arrival of bytes, tokens counted by the tokenizer over the returned text, never by chunks):
  ttft_ms    first chunk that carries text, after the request was written (ttft_intended_ms: after it was *meant* to be)
  tps_user   output tokens after the first / time after the first. A speculative first chunk can carry several tokens;
             what arrives at one instant has no duration, so "the first" is then the whole first chunk, with the chunks
             that lay ready behind it when it was read: tokens in later chunks / time from there to the last chunk that
             carries text. An answer that was mostly ready by then (finding `burst`: the server or this client was held
             up) has no speed at all.
  e2e_tps    all output tokens / time from sending to the last token
  itl_ms     gap between chunks, spread over the tokens that the gap produced: one value per token
The end-of-sequence token is not in the text: usage.completion_tokens may be one higher. Any other disagreement is a
finding on the request; the tokenizer's count is used and the difference is recorded, never silently adopted.

It refuses to pass anything it could not measure: a stalled, reset, refused or malformed reply is a row with findings.

Run: `python -m tasks.validate.selftest`
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tasks.validate.wire import Address, Connection, HttpReply, RawReply, clock, connect, parse_reply, sse_events

BURST_CHUNKS = 8
READY_S = 50e-6  # a chunk read sooner after the one before was waiting to be read: no cycle is that short
FATAL = frozenset(
    {
        "stall",
        "timeout",
        "reset",
        "connect",
        "malformed_http",
        "malformed_json",
        "invalid_utf8",
        "no_text",
        "throttled",
        "http_error",
        "server_error",
        "truncated_stream",
    }
)
RETRY_STATUS = (429, 503)
# A character that the server cut in two, or a tokenization that is not canonical, moves a count a little; more is a
# lie.
COUNT_TOLERANCE = 0.02

CountTokens = Callable[[str], np.ndarray]


def token_counter(tokenizer_json: Path) -> CountTokens:
    """text -> character end offset of each of its tokens, by the model's own tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count(text: str) -> np.ndarray:
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets
        return np.asarray([end for _, end in offsets], dtype=np.int64)

    return count


@dataclass(frozen=True)
class Limits:
    """Bounds in time and number on what one request may cost. Every wait in the client has one of these."""

    connect_s: float = 5.0
    stall_s: float = 20.0
    total_s: float = 300.0
    retries: int = 3
    retry_after_s: float = 10.0  # longer requests to wait are cut to this


@dataclass(frozen=True)
class Endpoint:
    """What is measured. `api_key` is the secret itself, resolved by the caller, never written anywhere."""

    base_url: str
    model: str
    count: CountTokens
    api_key: str = field(default="", repr=False)
    limits: Limits = field(default_factory=Limits)

    @property
    def address(self) -> Address:
        return Address.parse(self.base_url)

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(frozen=True)
class Ask:
    """One prompt. `extra` is merged into the request body (sampling, forced acceptance, metadata)."""

    id: str
    prompt: str
    domain: str = ""
    max_tokens: int = 256
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self, model: str) -> bytes:
        payload = {
            "model": model,
            "messages": [{"role": "user", "content": self.prompt}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }
        return json.dumps(payload).encode()


@dataclass
class Exchange:
    """A finished request, not yet parsed."""

    ask: Ask
    raw: RawReply
    intended_s: float
    user: int = 0
    retries: int = 0


async def send(endpoint: Endpoint, ask: Ask, link: Link, intended_s: float | None = None, user: int = 0) -> Exchange:
    """Sends one request, again after 429/503 (at most `limits.retries` times, each recorded).

    Never raises for a bad reply.
    """
    address, limits = endpoint.address, endpoint.limits
    request = address.request("POST", "/v1/chat/completions", ask.body(endpoint.model), endpoint.headers())
    started = clock()
    for attempt in range(limits.retries + 1):
        raw = await link.exchange(request)
        wait_s = _retry_after(raw, limits)
        if wait_s is None or attempt == limits.retries:
            break
        await asyncio.sleep(wait_s)
    return Exchange(ask, raw, started if intended_s is None else intended_s, user, attempt)


class Link:
    """One user's keep-alive connection; reconnects when the server closed it between two requests."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.connection: Connection | None = None

    async def open(self) -> str:
        """ "" or the name of what went wrong."""
        if self.connection is not None and not self.connection.closed:
            return ""
        try:
            self.connection = await connect(self.endpoint.address, self.endpoint.limits.connect_s)
        except (OSError, TimeoutError):
            return "connect"
        return ""

    async def exchange(self, request: bytes) -> RawReply:
        limits = self.endpoint.limits
        for attempt in (1, 2):
            fresh = self.connection is None or self.connection.closed
            if error := await self.open():
                return RawReply(sent_s=clock(), error=error)
            assert self.connection is not None
            raw = await self.connection.exchange(request, limits.stall_s, limits.total_s)
            # A kept-alive connection that the server closed while idle loses the request before a byte of the reply.
            if raw.error != "reset" or raw.blob or fresh or attempt == 2:
                break
        return raw

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()


def _retry_after(raw: RawReply, limits: Limits) -> float | None:
    """Seconds to wait before trying again; None when the reply is final."""
    if raw.error or not raw.blob.startswith((b"HTTP/1.1 429", b"HTTP/1.1 503")):
        return None
    asked = parse_reply(raw).headers.get("retry-after", "")
    try:
        return min(max(float(asked), 0.0), limits.retry_after_s)
    except ValueError:
        return 0.5


@dataclass
class Parsed:
    """What the events of one reply said."""

    times_s: list[float] = field(default_factory=list)  # of chunks that carry text
    texts: list[str] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    finish: str = ""
    per_step: float = 0.0  # tokens per engine step, as TensorRT-LLM tells them on its last chunk
    status: int = 0
    mock: dict[str, float] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)


def parse_exchange(exchange: Exchange) -> Parsed:
    """Reads the bytes. Every irregularity becomes a finding by name."""
    parsed = Parsed()
    if exchange.raw.error:
        parsed.findings.append(exchange.raw.error)
    if exchange.retries:
        parsed.findings.append("retried")
    if not exchange.raw.blob:
        return parsed
    try:
        reply = parse_reply(exchange.raw)
    except ValueError:
        parsed.findings.append("malformed_http")
        return parsed
    parsed.status = reply.status
    if reply.status != 200:
        parsed.findings.append("throttled" if reply.status in RETRY_STATUS else "http_error")
        return parsed
    _read_events(reply, parsed)
    if not parsed.texts and not set(parsed.findings) & FATAL:
        parsed.findings.append("no_text")
    if any("\ufffd" in text for text in parsed.texts):
        parsed.findings.append("replacement_character")
    return parsed


def _read_events(reply: HttpReply, parsed: Parsed) -> None:
    finished = False
    for arrived, data in sse_events(reply):
        if data == b"[DONE]":
            finished = True
            continue
        try:
            event = json.loads(data)
        except UnicodeDecodeError:
            parsed.findings.append("invalid_utf8")
            continue
        except ValueError:
            parsed.findings.append("malformed_json")
            continue
        if "error" in event:
            parsed.findings.append("server_error")
        parsed.usage = event.get("usage") or parsed.usage
        parsed.mock = event.get("mock") or parsed.mock
        for choice in event.get("choices") or ():
            text = _text_of(choice)
            if text:
                parsed.times_s.append(arrived)
                parsed.texts.append(text)
            parsed.finish = choice.get("finish_reason") or parsed.finish
            parsed.per_step = choice.get("avg_decoded_tokens_per_iter") or parsed.per_step
    if not finished and not parsed.finish and not parsed.findings:
        parsed.findings.append("truncated_stream")


def _text_of(choice: dict[str, Any]) -> str:
    """Reasoning counts: a client that waits for `content` sees a false time to first token."""
    delta = choice.get("delta") or choice
    return (delta.get("reasoning_content") or delta.get("reasoning") or "") + (
        delta.get("content") or delta.get("text") or ""
    )


def measure(exchange: Exchange, count: CountTokens, profile: str = "") -> dict[str, Any]:
    """One row of requests.parquet."""
    parsed, ask, sent = parse_exchange(exchange), exchange.ask, exchange.raw.sent_s
    text = "".join(parsed.texts)
    chunk_tokens = _tokens_by_chunk(parsed.texts, count(text)) if text else np.zeros(0, np.int64)
    findings = parsed.findings + _count_findings(int(chunk_tokens.sum()), parsed)
    ready = _ready_with_first(parsed.times_s)
    findings += ["burst"] if _is_burst(parsed.times_s, ready) else []
    row: dict[str, Any] = {
        "id": ask.id, "domain": ask.domain, "profile": profile, "user": exchange.user,
        "intended_s": exchange.intended_s, "sent_s": sent, "status": parsed.status, "retries": exchange.retries,
        "finish_reason": parsed.finish, "output_tokens": int(chunk_tokens.sum()),
        "usage_tokens": int(parsed.usage.get("completion_tokens") or 0), "chunks": len(parsed.texts),
        "first_chunk_tokens": int(chunk_tokens[:ready].sum()),
        **_timings(parsed.times_s, chunk_tokens, ready, sent, exchange.intended_s),
        **(speculation_of_steps(parsed, chunk_tokens) or speculation(parsed.usage)),
    }  # fmt: skip
    row["ok"] = not set(findings) & FATAL
    row["findings"] = ";".join(dict.fromkeys(findings))
    row["text"] = text
    if parsed.mock:
        row["mock"] = parsed.mock
    return row


def _tokens_by_chunk(texts: list[str], token_ends: np.ndarray) -> np.ndarray:
    """A token belongs to the chunk that completed it.

    One pass of the tokenizer over the whole text, so counts add up.
    """
    chunk_ends = np.cumsum([len(text) for text in texts])
    owner = np.searchsorted(chunk_ends, token_ends, side="left")
    return np.bincount(np.minimum(owner, len(texts) - 1), minlength=len(texts))


def _count_findings(tokens: int, parsed: Parsed) -> list[str]:
    if not parsed.texts:
        return []
    claimed = parsed.usage.get("completion_tokens")
    if claimed is None:
        return ["usage_missing"]
    # Stop tokens are generated but not in the text.
    expected = (tokens, tokens + 1) if parsed.finish == "stop" else (tokens,)
    return [] if claimed in expected else ["usage_mismatch"]


def _timings(times: list[float], tokens: np.ndarray, ready: int, sent: float, intended: float) -> dict[str, float]:
    nan = float("nan")
    names = ("ttft_ms", "ttft_intended_ms", "duration_ms", "tps_user", "e2e_tps", "itl_ms_p50", "itl_ms_p99")
    if not times:
        return dict.fromkeys(names, nan)
    first, last, total = times[0], times[-1], int(tokens.sum())
    later, span = total - int(tokens[:ready].sum()), last - times[ready - 1]
    gaps = np.diff(times)
    per_token = np.repeat(gaps * 1e3 / np.maximum(tokens[1:], 1), tokens[1:])
    values = (
        (first - sent) * 1e3,
        (first - intended) * 1e3,
        (last - sent) * 1e3,
        later / span if later > 0 and span > 0 and not _is_burst(times, ready) else nan,
        total / (last - sent),
        float(np.median(per_token)) if len(per_token) else nan,
        float(np.percentile(per_token, 99)) if len(per_token) else nan,
    )
    return dict(zip(names, values, strict=True))


def _ready_with_first(times: list[float]) -> int:
    """How many chunks were there when the first was read, itself included."""
    return next((at for at in range(1, len(times)) if times[at] - times[at - 1] > READY_S), len(times))


def _is_burst(times: list[float], ready: int) -> bool:
    """Of eight chunks or more, more than half were ready with the first or fewer than four reads brought the others:
    what is left of the time says nothing of the server."""
    return len(times) >= BURST_CHUNKS and (2 * ready > len(times) or len(set(times[ready:])) < BURST_CHUNKS // 2)


def speculation(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Accepted counts from a reply's usage, flat: OpenAI's own fields, and our per-position ones when the server has
    them.
    """
    details = usage.get("completion_tokens_details") or {}
    own = usage.get("speculation") or {}
    return {
        "accepted": int(details.get("accepted_prediction_tokens") or 0),
        "rejected": int(details.get("rejected_prediction_tokens") or 0),
        "cycles": int(own.get("cycles") or 0),
        "accepted_by_position": [int(n) for n in own.get("accepted_by_position") or ()],
    }


def speculation_of_steps(parsed: Parsed, chunk_tokens: np.ndarray) -> dict[str, Any]:
    """The same from TensorRT-LLM, which tells tokens per step and, with stream_interval 1, sends a chunk for each.

    The prompt's own step is one of them and no cycle. The chunks' sizes say how far each cycle's drafts went; where two
    were merged, which looks like one that went further, only the total is known, and it is laid on the first positions.
    {} from a server that does not tell.
    """
    generated = int(parsed.usage.get("completion_tokens") or 0)
    if not parsed.per_step or not generated:
        return {}
    steps = max(round(generated / parsed.per_step), 1)
    accepted, cycles = generated - steps, steps - 1
    if len(chunk_tokens) == steps:
        by_position = [int((chunk_tokens > at).sum()) for at in range(1, int(chunk_tokens.max(initial=1)))]
    else:
        whole, rest = divmod(accepted, max(cycles, 1))
        by_position = [cycles] * whole + ([rest] if rest else [])
    return {"accepted": sum(by_position), "rejected": 0, "cycles": cycles, "accepted_by_position": by_position}
