"""The real server, in its own process, with the toy engine: what OpenAI's client sees, and what bad clients cannot
break.

Run it: `python -m pytest tests/engine_plugins/test_server.py`
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.engine_plugins.toy_engine import TEXT

ROOT = Path(__file__).resolve().parents[2]


class Served:
    """A server process and its address."""

    def __init__(
        self, folder: Path, options: tuple[str, ...] = (), env: dict[str, str] | None = None, **toy: Any
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "toy.json").write_text(json.dumps(toy))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        argv = [
            sys.executable,
            "-m",
            "tests.engine_plugins.toy_engine",
            "--bundle",
            str(folder),
            "--port",
            str(self.port),
        ]
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*argv, *options], cwd=ROOT, stderr=log, env={**os.environ, **(env or {})})
        wait_until(lambda: self.process.poll() is not None or self.health() == 200)
        assert self.process.poll() is None, self.log.read_text()

    def health(self) -> int:
        try:
            return httpx.get(f"{self.url}/health").status_code
        except httpx.TransportError:
            return 0

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return float(next(line.split()[-1] for line in lines if line.split()[0] == name))

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(10)


def wait_until(true: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(tmp_path_factory.mktemp("bundle") / "toy", step_s=0.002)
    yield server
    assert server.stop() == 0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    servers: list[Served] = []

    def begin(*options: str, env: dict[str, str] | None = None, **toy: Any) -> Served:
        servers.append(Served(tmp_path / "toy", options, env, **toy))
        return servers[-1]

    yield begin
    for server in servers:
        server.stop()


def completion(**more: Any) -> dict[str, Any]:
    return {"model": "toy", "prompt": "hi", "max_tokens": 200, "temperature": 0, **more}


def test_completion_has_text_reason_and_speculation_usage(served: Served) -> None:
    answer = served.client().completions.create(**completion())
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (TEXT, "stop")
    assert answer.usage.completion_tokens == len(TEXT.encode()) + 1
    speculation = answer.usage.speculation
    assert speculation["draft_tokens"] == 3 and speculation["cycles"] > 10
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens == sum(speculation["accepted_by_position"])


def test_chat_streams_whole_characters_and_usage_last(served: Served) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(served.client().chat.completions.create(model="toy", messages=messages, temperature=0, **options))
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(filter(None, texts)) == TEXT
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(TEXT.encode()) + 1
    assert len(texts) > 15, "a chunk per cycle, not one for the whole answer"


def test_chat_without_stream(served: Served) -> None:
    answer = served.client().chat.completions.create(
        model="toy", messages=[{"role": "user", "content": "hi"}], max_completion_tokens=3
    )
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("def", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_across_tokens_is_cut_and_nothing_after_it(served: Served, stream: bool) -> None:
    answer = served.client().completions.create(**completion(stop=["return", "never"], stream=stream))
    parts = list(answer) if stream else [answer]
    assert "".join(part.choices[0].text for part in parts) == TEXT.split("return")[0]
    assert parts[-1].choices[0].finish_reason == "stop"
    wait_until(lambda: served.metric("kilotok_requests_running") == 0)


def test_prompts_as_token_ids_and_as_lists(served: Served) -> None:
    one = served.client().completions.create(**completion(prompt=[104, 105]))
    assert (one.choices[0].text, one.usage.prompt_tokens) == (TEXT, 2)
    two = served.client().completions.create(**completion(prompt=["a", "bcd"]))
    assert [choice.text for choice in two.choices] == [TEXT, TEXT] and two.usage.prompt_tokens == 4


def test_models_and_version(served: Served) -> None:
    assert [model.id for model in served.client().models.list()] == ["toy"]
    assert httpx.get(f"{served.url}/version").json()["engine"] == "native"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"logprobs": 1}, "logprobs"),
        ({"n": 2}, "n"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [9999]}, "prompt"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({"stop": [""]}, "stop"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_the_parameter(
    served: Served, more: dict[str, Any], param: str
) -> None:
    body = json.dumps(completion(**more))
    answer = httpx.post(f"{served.url}/v1/completions", content=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)


@pytest.mark.parametrize(
    "body", [b"{", b"\xff\xfe", b"[]", b"null", b"[" * 100_000, b'{"prompt": "a", "stream_options": 1}']
)
def test_malformed_bodies_are_400_and_the_server_lives(served: Served, body: bytes) -> None:
    answer = httpx.post(f"{served.url}/v1/completions", content=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert served.health() == 200


def test_bytes_that_are_not_http(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as wire:
        wire.sendall(b"\x16\x03\x01 what\r\n\r\n")
        assert b"400" in wire.recv(1000)
    assert served.health() == 200


def test_wrong_model_wrong_path_and_too_long_body(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        served.client().completions.create(**completion(model="gpt-4"))
    assert httpx.get(f"{served.url}/v2/none").json()["error"]["message"].startswith("Not Found")
    assert httpx.post(f"{served.url}/v1/completions", content=b" " * (9 << 20)).status_code == 413


def test_http_1_0_stream_ends_with_the_connection(served: Served) -> None:
    body = json.dumps(completion(stream=True)).encode()
    with socket.create_connection(("127.0.0.1", served.port)) as wire:
        wire.sendall(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        reply = b"".join(iter(lambda: wire.recv(65536), b""))
    assert reply.endswith(b"\n\ndata: [DONE]\n\n") and b"chunked" not in reply


@pytest.mark.parametrize("stream", [False, True])
def test_nan_logits_fail_only_their_request(served: Served, stream: bool) -> None:
    with pytest.raises(openai.InternalServerError, match="NaN"):
        served.client().completions.create(**completion(prompt="nan", stream=stream))
    assert served.client().completions.create(**completion()).choices[0].text == TEXT


def test_engine_refusal_and_template_refusal_are_400(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="the toy refuses"):
        served.client().completions.create(**completion(prompt="refuse", stream=True))
    with pytest.raises(openai.BadRequestError, match="unknown role"):
        served.client().chat.completions.create(model="toy", messages=[{"role": "pirate", "content": "hi"}])


def test_hang_up_frees_the_slot(start: Callable[..., Served]) -> None:
    server = start(slots=1, step_s=0.005, max_seq_len=100_000)
    body = json.dumps(completion(stream=True, ignore_eos=True, max_tokens=90_000)).encode()
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port)) as wire:
            wire.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            assert b"200 OK" in wire.recv(1000)
            assert server.metric("kilotok_requests_running") == 1
        wait_until(lambda: server.metric("kilotok_requests_running") == 0)
    assert server.metric("kilotok_cancelled_total") == 3
    assert server.client().completions.create(**completion()).choices[0].text == TEXT


def test_full_queue_is_429_with_retry_after(start: Callable[..., Served]) -> None:
    server = start("--max-queue", "1", slots=1, step_s=0.02)
    results: list[int] = []

    def ask() -> None:
        results.append(httpx.post(f"{server.url}/v1/completions", json=completion(), timeout=30).status_code)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.metric("kilotok_requests_waiting") == 1)
    refused = httpx.post(f"{server.url}/v1/completions", json=completion())
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    for thread in threads:
        thread.join()
    assert results == [200, 200]


def test_sigterm_finishes_what_runs_refuses_what_comes_and_exits_0(start: Callable[..., Served]) -> None:
    server = start(step_s=0.02)
    stream = server.client().completions.create(**completion(stream=True))
    text = next(iter(stream)).choices[0].text
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: server.health() == 503)
    refused = httpx.post(f"{server.url}/v1/completions", json=completion())
    assert (
        refused.status_code == 503 and refused.headers["retry-after"] and refused.json()["error"]["code"] == "draining"
    )
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == TEXT
    assert server.process.wait(5) == 0


def test_engine_that_keeps_failing_is_reported_by_health(start: Callable[..., Served]) -> None:
    server = start()
    for _ in range(3):
        with pytest.raises(openai.InternalServerError, match="the toy exploded"):
            server.client().completions.create(**completion(prompt="explode"))
    assert server.health() == 503


def test_api_key(start: Callable[..., Served]) -> None:
    server = start("--api-key-env", "TOY_KEY", env={"TOY_KEY": "secret"})
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="wrong").completions.create(**completion())
    assert server.client(api_key="secret").completions.create(**completion()).choices[0].text == TEXT
    assert "secret" not in server.log.read_text()


def test_one_stream_through_the_server_costs_little(start: Callable[..., Served]) -> None:
    """An engine that takes no time: what is left is the server. 2,500 tokens/s is ten times slower than measured."""
    server = start()
    body = json.dumps(completion(stream=True, ignore_eos=True, max_tokens=3000)).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as wire:
        wire.sendall(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        began = time.perf_counter()
        while wire.recv(65536):
            pass
    assert 3000 / (time.perf_counter() - began) > 2500
