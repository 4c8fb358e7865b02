"""The OpenAI API as data: bodies in, plain requests out; tokens in, exact response JSON out.

What a client may ask is what the engine does; anything else is refused with OpenAI's error object rather than
ignored, because a parameter that is silently dropped is a wrong answer. Chunks of a stream are cut from two
prebuilt pieces of JSON around the text.

It refuses to do I/O and to know the engine: pure functions, tested without a server.

Run it: `python -m pytest tests/engine_plugins/test_server.py`; it serves inside `python -m
engine_plugins.native.server`.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as quote
from typing import Any

MAX_STOP = 16
MAX_CHOICES = 64
# Parameters that change what is generated and that this engine does not have. Each is fine at its neutral value.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, None),
    "top_logprobs": (0, None),
    "echo": (False,),
    "suffix": ("", None),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({}, None),
    "top_k": (0, -1, None),
    "min_p": (0, None),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "functions": ([], None),
    "response_format": ({"type": "text"}, None),
}
READ = {
    "model",
    "stream",
    "stream_options",
    "prompt",
    "messages",
    "stop",
    "temperature",
    "top_p",
    "seed",
    "max_tokens",
    "max_completion_tokens",
    "ignore_eos",
}  # read below
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}


class ApiError(Exception):
    """Answered as {"error": {message, type, param, code}} with an HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after_s = status, param, code, retry_after_s

    def body(self) -> bytes:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return json.dumps(
            {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
        ).encode()


@dataclass(frozen=True)
class GenerationRequest:
    """One checked body. `prompts` are texts or token ids (completions); `messages` is the conversation (chat)."""

    chat: bool
    model: str
    prompts: list[Any] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    include_usage: bool = False


def parse(body: bytes, *, chat: bool, default_model: str) -> GenerationRequest:
    """Check one request body. Raises ApiError(400) naming the parameter."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object")
    for name, neutral in NEUTRAL.items():
        if name in data and not any(_same(data[name], value) for value in neutral):
            raise ApiError(
                400,
                f"{name}={json.dumps(data[name])[:80]} is not supported by this server",
                name,
                "unsupported_parameter",
            )
    for name in data:
        if name not in NEUTRAL and name not in READ | HARMLESS:
            raise ApiError(400, f"unknown parameter: {name}", name, "unknown_parameter")
    model = _typed(data, "model", str, default_model)
    options = _typed(data, "stream_options", dict, {})
    return GenerationRequest(
        chat=chat,
        model=model,
        prompts=[] if chat else _prompts(data),
        messages=_messages(data) if chat else [],
        sampling=_sampling(data, chat),
        stream=_typed(data, "stream", bool, False),
        include_usage=bool(options.get("include_usage", False)),
    )


def _same(given: Any, neutral: Any) -> bool:
    if isinstance(given, bool) or isinstance(neutral, bool):  # 0 == False in Python, not in JSON
        return given is neutral
    return bool(given == neutral)


def _typed(data: dict[str, Any], name: str, kind: Any, default: Any) -> Any:
    value = data.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = kind.__name__ if isinstance(kind, type) else "number"
        raise ApiError(400, f"{name} must be of type {wanted}, not {type(value).__name__}", name)
    return value


def _number(data: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = float(_typed(data, name, (int, float), default))
    if not low <= value <= high:  # also refuses NaN
        raise ApiError(400, f"{name}={value} is outside [{low}, {high}]", name)
    return value


def _sampling(data: dict[str, Any], chat: bool) -> dict[str, Any]:
    limit = _typed(data, "max_completion_tokens", int, None) or _typed(data, "max_tokens", int, None if chat else 16)
    if limit is not None and limit < 1:
        raise ApiError(400, f"max_tokens={limit} must be at least 1", "max_tokens")
    stop = data.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MAX_STOP or not all(isinstance(text, str) and text for text in stop):
        raise ApiError(400, f"stop must be a non-empty string or a list of at most {MAX_STOP} of them", "stop")
    return {
        "max_tokens": limit,
        "temperature": _number(data, "temperature", 1.0, 0.0, 2.0),
        "top_p": _number(data, "top_p", 1.0, 0.0, 1.0),
        "seed": _typed(data, "seed", int, None),
        "stop": tuple(stop),
        "ignore_eos": _typed(data, "ignore_eos", bool, False),
    }


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int and token >= 0 for token in value)


def _prompts(data: dict[str, Any]) -> list[Any]:
    prompt = data.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) or _is_ids(prompt) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or _is_ids(p) for p in prompts):
        raise ApiError(400, "prompt must be a string, a list of token ids, or a list of these", "prompt")
    if len(prompts) > MAX_CHOICES:
        raise ApiError(400, f"at most {MAX_CHOICES} prompts in one request, not {len(prompts)}", "prompt")
    return prompts


def _messages(data: dict[str, Any]) -> list[dict[str, Any]]:
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a non-empty list", "messages")
    checked = []
    for at, message in enumerate(messages):
        where = f"messages[{at}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ApiError(400, f"{where} must be an object with a role", where)
        checked.append({**message, "content": _content(message.get("content"), where)})
    return checked


def _content(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
    ):
        return "".join(part["text"] for part in content)
    raise ApiError(
        400, f"{where}.content must be text: this server has no images, audio or tool calls", f"{where}.content"
    )


# Responses


def speculation_usage(
    num_prompt: int, num_reused: int, num_generated: int, draft_tokens: int, cycles: int, accepted: list[int]
) -> dict[str, Any]:
    """OpenAI's usage, its own prediction fields, and the acceptance by position that a speculative engine owes."""
    num_accepted = sum(accepted)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": num_reused},
        "completion_tokens_details": {
            "accepted_prediction_tokens": num_accepted,
            "rejected_prediction_tokens": max(0, cycles * draft_tokens - num_accepted),
        },
        "speculation": {"draft_tokens": draft_tokens, "cycles": cycles, "accepted_by_position": accepted},
    }


class ResponseFormat:
    """The JSON of one response: one object, or the chunks of a stream."""

    def __init__(self, request: GenerationRequest, created: int) -> None:
        self.chat = request.chat
        self.id = ("chatcmpl-" if request.chat else "cmpl-") + uuid.uuid4().hex
        self.created, self.model = created, request.model
        self.include_usage = request.include_usage
        kind = "chat.completion.chunk" if request.chat else "text_completion"
        self._head = (
            f'data: {{"id":"{self.id}","object":"{kind}","created":{created},"model":{quote(request.model)},"choices":['
        )
        self._tail = '],"usage":null}\n\n' if request.include_usage else "]}\n\n"

    def chunk(self, index: int, text: str, finish_reason: str | None = None) -> bytes:
        """One event of the stream."""
        delta = (
            f'"delta":{{"content":{quote(text)}}}'
            if self.chat and text
            else '"delta":{}'
            if self.chat
            else f'"text":{quote(text)}'
        )
        reason = "null" if finish_reason is None else f'"{finish_reason}"'
        return f'{self._head}{{"index":{index},{delta},"logprobs":null,"finish_reason":{reason}}}{self._tail}'.encode()

    def opening(self, index: int) -> bytes:
        """Chat streams name the role first, as OpenAI does; it travels in one packet with the first text."""
        if not self.chat:
            return b""
        delta = '"delta":{"role":"assistant","content":""}'
        return f'{self._head}{{"index":{index},{delta},"logprobs":null,"finish_reason":null}}{self._tail}'.encode()

    def closing(self, usage: dict[str, Any]) -> bytes:
        """The usage event, when asked for, and the end mark."""
        if not self.include_usage:
            return b"data: [DONE]\n\n"
        return f'{self._head}],"usage":{json.dumps(usage)}}}\n\ndata: [DONE]\n\n'.encode()

    def whole(self, texts: list[str], reasons: list[str], usage: dict[str, Any]) -> bytes:
        """The response that is not streamed."""
        choices: list[dict[str, Any]] = []
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            said: dict[str, Any] = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            )
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
        kind = "chat.completion" if self.chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return json.dumps({**head, "choices": choices, "usage": usage}).encode()


def error_event(error: ApiError) -> bytes:
    """How a stream that has begun says that it failed; the openai client raises on it."""
    return b"data: " + error.body() + b"\n\n"
