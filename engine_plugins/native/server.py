"""The native engine behind the OpenAI API: completions and chat, streaming and not.

A stream's tokens leave in the event-loop callback that the engine's step woke, one write per step, without a task
switch, a pydantic model or an HTTP state machine in between. Everything that is not per token is plain FastAPI.

It refuses what the engine does not do (log-probabilities, n > 1, penalties, tools) with OpenAI's error object, more
work than its queue holds (429), bodies and prompts that are too long, and new requests while it drains (503 with
Retry-After).

Run it: `python -m engine_plugins.native.server --bundle DIR --port 8000`
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine_plugins.native.admission import Admission
from engine_plugins.native.generation import Generation, Reply
from engine_plugins.native.metrics import render_metrics
from engine_plugins.native.openai_api import ApiError, GenerationRequest, parse
from engine_plugins.native.scheduler import Scheduler

log = logging.getLogger("kilotok.server")
MAX_BODY_BYTES = 8 << 20
KEEP_ALIVE_S = (
    20  # longer than the usual clients' own limits (httpx 5 s, aiohttp 15 s): they close first, nothing is cut
)
RETRY_AFTER_S = 2
DRAIN_LINGER_S = 1.0  # idle connections may still bring a request, which is owed a 503 and not a reset
SWITCH_INTERVAL_S = 2e-4  # the engine thread must not wait 5 ms for the GIL between two steps


class EngineServer:
    """The app's state: engine, scheduler, limits."""

    def __init__(
        self, engine: Any, make_params: Callable[..., Any], *, model: str, api_key: str = "", max_queue: int = 64
    ) -> None:
        self.engine, self.make_params, self.model = engine, make_params, model
        self.api_key = api_key.encode()
        self.admission = Admission()
        self.max_seq_len = int(engine.max_seq_len)
        self.scheduler = Scheduler(
            engine, slots=engine.bundle.max_batch_size, draft_tokens=engine.draft_tokens, max_queue=max_queue
        )
        self.started = time.time()

    def check_key(self, request: Request) -> None:
        """Raises ApiError(401) unless the Bearer token is ours; every wrong key takes the same time."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self.api_key and not hmac.compare_digest(given, self.api_key):
            raise ApiError(
                401, "wrong or missing API key; send it as Authorization: Bearer KEY", code="invalid_api_key"
            )

    async def generate(self, request: Request, chat: bool) -> Response:
        """One completion or chat completion."""
        self.check_key(request)
        if self.admission.draining:
            raise ApiError(503, "the server is draining; try again", code="draining", retry_after_s=RETRY_AFTER_S)
        asked = parse(await read_body(request), chat=chat, default_model=self.model)
        if asked.model != self.model:
            raise ApiError(
                404, f"the model {asked.model!r} is not served here; this is {self.model!r}", "model", "model_not_found"
            )
        prompts = [self.encode(prompt) for prompt in asked.prompts] if not chat else [self.encode_chat(asked)]
        if not self.scheduler.has_room(len(prompts)):
            message = f"the queue is full: {self.scheduler.waiting} requests wait for {self.scheduler.slots} slots"
            raise ApiError(429, message, code="queue_full", retry_after_s=RETRY_AFTER_S)
        generations = [Generation(ids, self.params(asked, ids)) for ids in prompts]
        return Reply(self.scheduler, asked, generations)

    def params(self, asked: GenerationRequest, prompt_ids: list[int]) -> Any:
        """Sampling parameters, with the room that the prompt leaves as the limit when none is asked for."""
        room = self.max_seq_len - len(prompt_ids)
        if room < 1:
            message = f"the prompt has {len(prompt_ids)} tokens; prompt and answer together may have {self.max_seq_len}"
            raise ApiError(400, message, "messages" if asked.chat else "prompt", "context_length_exceeded")
        limit = min(asked.sampling["max_tokens"] or room, room)
        return self.make_params(**{**asked.sampling, "max_tokens": limit})

    def encode(self, prompt: Any) -> list[int]:
        if not isinstance(prompt, str):
            size = self.engine.config.vocab_size
            if max(prompt) >= size:
                raise ApiError(400, f"token id {max(prompt)} is outside the vocabulary of {size}", "prompt")
            return prompt
        ids = self.engine.encode(prompt)
        if not ids:
            raise ApiError(400, "the prompt is empty", "prompt")
        return ids

    def encode_chat(self, asked: GenerationRequest) -> list[int]:
        try:
            return self.engine.encode_chat(asked.messages)
        except Exception as error:  # noqa: BLE001 - the model's own template raises whatever it likes about a conversation
            raise ApiError(400, f"the chat template refused the messages: {error}", "messages") from None


async def read_body(request: Request) -> bytes:
    """The body, or ApiError(413) as soon as it is too long."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
    return bytes(body)


def create_app(state: EngineServer) -> FastAPI:
    """The routes. Generation bypasses pydantic on purpose; see the module's docstring."""
    app = FastAPI(title="kilotok native engine", version=own_version(), docs_url=None, redoc_url=None)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await state.generate(request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await state.generate(request, chat=True)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        state.check_key(request)
        model = {"id": state.model, "object": "model", "created": int(state.started), "owned_by": "kilotok"}
        return JSONResponse({"object": "list", "data": [{**model, "max_model_len": state.max_seq_len}]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> Response:
        state.check_key(request)
        if name != state.model:
            raise ApiError(
                404, f"the model {name!r} is not served here; this is {state.model!r}", "model", "model_not_found"
            )
        return JSONResponse(
            {"id": state.model, "object": "model", "created": int(state.started), "owned_by": "kilotok"}
        )

    @app.get("/health")
    async def health() -> Response:
        if state.scheduler.broken:
            return JSONResponse({"status": "broken", "reason": state.scheduler.broken}, 503)
        if state.admission.draining:
            return JSONResponse({"status": "draining"}, 503, headers={"retry-after": str(RETRY_AFTER_S)})
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(
            render_metrics(state.scheduler, state.admission), media_type="text/plain; version=0.0.4"
        )

    @app.get("/version")
    async def version_() -> Response:
        return JSONResponse({"version": own_version(), "engine": "native", "model": state.model, "pid": os.getpid()})

    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)
    return app


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"retry-after": str(error.retry_after_s)} if error.retry_after_s else None
    return Response(error.body(), error.status, headers, media_type="application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    return await _api_error(request, ApiError(error.status_code, message))


async def _bug(request: Request, error: Exception) -> Response:
    """Our own mistake: the client gets OpenAI's shape, the log gets the traceback (starlette raises it again)."""
    return await _api_error(request, ApiError(500, f"internal error: {type(error).__name__}"))


def own_version() -> str:
    try:
        return version("kilotok")
    except PackageNotFoundError:  # running from a source tree that is not installed
        return "0+source"


class Door:
    """The outermost ASGI layer: counts what runs, and ends connections that are to move elsewhere."""

    def __init__(self, app: Any, admission: Admission) -> None:
        self.app, self.admission = app, admission

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_closing(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start" and self.admission.closes(scope):
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        self.admission.num_active += 1
        try:
            await self.app(scope, receive, send_closing)
        finally:
            self.admission.num_active -= 1


class DirectProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with the transport in the scope: `Reply` writes a stream's chunks to it."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        app = self.app

        async def with_transport(scope: Any, receive: Any, send: Any) -> None:
            scope["kilotok.transport"] = transport
            await app(scope, receive, send)

        self.app = with_transport  # type: ignore[assignment]


class NativeServer(uvicorn.Server):
    """Adds the control socket, and a SIGTERM that answers 503 until the running requests are done, then exits 0."""

    def __init__(self, config: uvicorn.Config, state: EngineServer, control: Path | None) -> None:
        super().__init__(config)
        self.state, self.control = state, control

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # uvicorn's own would stop listening at once and die by the signal
        yield

    async def startup(self, sockets: Any = None) -> None:
        loop = asyncio.get_running_loop()
        self.state.scheduler.start(loop)
        await super().startup(sockets)
        admission = self.state.admission
        admission.connections = lambda: self.server_state.connections
        admission.make_protocol = lambda: DirectProtocol(self.config, self.server_state, self.lifespan.state)
        if self.control is not None:
            admission.open_control(self.control)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        log.info("ready: %s on %s:%s", self.state.model, self.config.host, self.config.port)

    def _on_signal(self, number: int) -> None:
        if self.state.admission.draining:  # asked twice: now means now
            self.force_exit = self.should_exit = True
            return
        log.info("draining: %d requests run", self.state.scheduler.in_flight)
        self.state.admission.draining = True
        self._drain = asyncio.get_running_loop().create_task(self._exit_when_idle())

    async def _exit_when_idle(self) -> None:
        admission, patience_s = self.state.admission, DRAIN_LINGER_S
        while admission.num_active or (self.server_state.connections and patience_s > 0):
            await asyncio.sleep(0.02)
            patience_s = DRAIN_LINGER_S if admission.num_active else patience_s - 0.02
        self.should_exit = True

    async def shutdown(self, sockets: Any = None) -> None:
        self.state.admission.close()
        await super().shutdown(sockets)
        self.state.scheduler.stop()


def serve(state: EngineServer, *, host: str, port: int, control: Path | None = None) -> None:
    """Serve until a signal."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    config = uvicorn.Config(
        Door(create_app(state), state.admission),
        host=host,
        port=port,
        http=DirectProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    NativeServer(config, state, control).run()


def load_native(args: argparse.Namespace) -> tuple[Any, Callable[..., Any]]:
    """The engine of this package; imported here so that `--help` and the tests' toy need no compiler."""
    from engine_plugins.native.backend import serving_device
    from engine_plugins.native.engine import Engine, SamplingParams

    engine = Engine(
        args.bundle,
        threads=args.threads,
        speculate=not args.no_speculation,
        forced_acceptance=args.forced_acceptance,
        fused=not args.no_fusion,
        device=args.device or serving_device(args.bundle),
    )
    log.info("the engine runs on %s", engine.counters()["backend"])
    return engine, SamplingParams


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine_plugins.native.server", description="Serve a native bundle."
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", default="")
    parser.add_argument("--api-key-env", default="", metavar="NAME", help="environment variable that holds the API key")
    parser.add_argument("--no-speculation", action="store_true")
    parser.add_argument("--no-fusion", action="store_true", help="one operator at a time, for comparison")
    parser.add_argument(
        "--forced-acceptance",
        type=float,
        default=None,
        metavar="TOKENS",
        help="accept drafts at this many tokens a cycle, right or wrong: for timing the engine, never for answers",
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda for a bundle with kernels for a GPU that is here"
    )
    parser.add_argument("--max-queue", type=int, default=64, help="requests that may wait for a slot")
    parser.add_argument("--control", type=Path, default=None, metavar="PATH", help="control socket for the deployer")
    return parser


def main(argv: list[str] | None = None, load: Callable[[argparse.Namespace], tuple[Any, Any]] = load_native) -> int:
    """Command line. Exit 0 after a drain, 2 on wrong input."""
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    api_key = os.environ.get(args.api_key_env, "") if args.api_key_env else ""
    if args.api_key_env and not api_key:
        print(f"error: --api-key-env names {args.api_key_env}, which is not set", file=sys.stderr)
        return 2
    engine, make_params = load(args)
    model = args.served_model_name or args.bundle.resolve().name
    state = EngineServer(engine, make_params, model=model, api_key=api_key, max_queue=args.max_queue)
    serve(state, host=args.host, port=args.port, control=args.control)
    return 0


if __name__ == "__main__":
    sys.exit(main())
