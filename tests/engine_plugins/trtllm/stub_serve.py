"""A stub of trtllm-serve: refuses what its version would refuse, starts ranks, then serves with an engine of ours.

Its argv and YAML are checked against the contract, its ranks construct the stand-in model in processes that inherit no
variable but TRTLLM* and TLLM* ones, its answers have TensorRT-LLM's fields and none of ours, and the profiler's trace
names the kernels whose gates the options open. KILOTOK_STUB_IGNORES names options that it accepts and forgets.
It refuses to be TensorRT-LLM: the model behind it is the native engine, or the toy for a folder with toy.json.

Run it: `python -m tests.engine_plugins.trtllm.stub_serve MODEL --port 8000 --tp_size 1 --config args.yaml`
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
import yaml
from fastapi import Request
from fastapi.responses import JSONResponse

# The plugin package has registered itself here under the names that this stub, unlike trtllm-serve, needs whole.
for _name in [name for name in sys.modules if name.partition(".")[0] in ("engine_plugins", "specs")]:
    del sys.modules[_name]

from engine_plugins.native import server  # noqa: E402
from engine_plugins.native.openai_api import parse  # noqa: E402
from engine_plugins.trtllm.contract import argv_complaints, contract_for, yaml_complaints  # noqa: E402
from engine_plugins.trtllm.kernels import record_kernels  # noqa: E402

UPSTREAM = Path(__file__).parent / "upstream"
VERSION = os.environ.get("KILOTOK_STUB_VERSION", "1.2.1")
IGNORED = os.environ.get("KILOTOK_STUB_IGNORES", "").split(",")
RANK = """
import os, sys, signal
sys.path.append(os.environ["STUB_UPSTREAM"]); sys.path.append(os.environ["STUB_PROJECT"])
import torch
from tensorrt_llm._torch.models.modeling_utils import MODEL_CLASS_MAPPING
model = MODEL_CLASS_MAPPING["Llama4ForConditionalGeneration"]()
model.load_weights({})
model(torch.arange(4), torch.randn(4, 64).to(torch.bfloat16))
print("up", flush=True)
signal.pause()
"""


def main() -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    contract = contract_for(VERSION)
    argv = ["trtllm-serve", *sys.argv[1:]]
    values = {flag: argv[at + 1] for at, flag in enumerate(argv[:-1]) if flag.startswith("--")}
    path = values.get("--config") or values.get("--extra_llm_api_options") or ""
    arguments: dict[str, Any] = yaml.safe_load(Path(path).read_text())
    wrong = [*argv_complaints(contract, argv, VERSION), *yaml_complaints(contract, arguments, VERSION)]
    for complaint in wrong:
        print(f"ValidationError: {complaint.what}: {complaint.fix}", file=sys.stderr)
    if wrong:
        return 1
    toy = Path(argv[1]) / "toy.json"
    alone = toy.exists() and json.loads(toy.read_text()).get("ranks") is False  # tests of crashes start many servers
    ranks = [] if alone else [start_rank(number) for number in range(int(values["--tp_size"]))]
    for rank in ranks:
        assert rank.stdout is not None and rank.stdout.readline() == b"up\n", "a rank did not come up"
    write_trace(arguments, values)
    try:
        serve(Path(argv[1]), arguments, values)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return 0


def start_rank(number: int) -> subprocess.Popen[bytes]:
    """A worker as MPI makes it; the launcher's own search path and rank are all it gets besides."""
    if os.environ.get("KILOTOK_STUB_DEAF_RANK") == str(number):  # one that the plugin package does not reach
        return subprocess.Popen([sys.executable, "-S", "-c", "print('up', flush=True); input()"], stdout=-1, stdin=-1)
    env = {name: value for name, value in os.environ.items() if name.startswith(("TRTLLM", "TLLM"))}
    if "TRTLLM_ENABLE_PDL" in IGNORED:
        env["TRTLLM_ENABLE_PDL"] = "0"
    env |= {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "OMPI_COMM_WORLD_RANK": str(number)}
    env |= {"STUB_UPSTREAM": str(UPSTREAM), "STUB_PROJECT": str(Path(__file__).resolve().parents[3])}
    env |= {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", RANK], env=env, stdout=subprocess.PIPE, cwd="/")


def write_trace(arguments: dict[str, Any], values: dict[str, str]) -> None:
    """The kernels of one step, by upstream's gates for what was asked for."""
    path = os.environ.get("TLLM_TORCH_PROFILE_TRACE")
    if not path or not os.environ.get("TLLM_PROFILE_START_STOP"):
        return
    options = {name: value for name, value in arguments.items() if name not in IGNORED}
    draft = (arguments.get("speculative_config") or {}).get("max_draft_len", 0)
    engine = {"backend": "trtllm", "options": options, "draft_tokens": draft, "env": {}, "plugins": []}
    engine |= {"tensor_parallel": int(values["--tp_size"]), "expert_parallel": int(values.get("--ep_size", 1))}
    kernels = [
        kernel.in_trace for kernel in record_kernels({"engine": engine}, model_config(sys.argv[1])) if kernel.runs
    ]
    graphs = "cuda_graph_config" not in IGNORED and arguments.get("cuda_graph_config", {}) is not None
    events: list[dict[str, Any]] = []
    for step in range(3):  # of 100 us, every kernel 5 us long
        args = {"correlation": step}
        events.append(
            {"cat": "cuda_runtime", "name": "cudaGraphLaunch" if graphs else "cudaLaunchKernel", "args": args}
        )
        for at, name in enumerate(name for name in ("fmha", *kernels) if name):
            when = {"ts": 100 * step + 6 * at, "dur": 5}
            events.append({"cat": "kernel", "name": f"void ns::{name}_kernel<4>(int)", "args": args, **when})
    Path(path).write_text(json.dumps({"traceEvents": events}))


def model_config(model: str) -> dict[str, Any]:
    return dict(json.loads((Path(model) / "config.json").read_text()))


def serve(model: Path, arguments: dict[str, Any], values: dict[str, str]) -> None:
    draft = (arguments.get("speculative_config") or {}).get("speculative_model_dir")
    with tempfile.TemporaryDirectory() as scratch:
        engine, make_params = load(model, Path(draft) if draft else None, arguments, values, Path(scratch))
        state = server.EngineServer(engine, make_params, model=model.name)
        app = server.create_app(state)
        app.router.routes = [route for route in app.router.routes if getattr(route, "path", "") not in OWN]
        app.get("/version")(lambda: JSONResponse({"version": VERSION}))
        app.get("/metrics")(lambda: JSONResponse([]))
        app.post("/v1/completions")(completions(state))
        config = uvicorn.Config(
            Upstream(server.Door(app, state.admission), state),
            host=values["--host"], port=int(values["--port"]), http=server.DirectProtocol,
            ws="none", lifespan="off", log_config=None, access_log=False,
        )  # fmt: skip
        server.NativeServer(config, state, None).run()


OWN = ("/version", "/metrics", "/v1/completions")


def load(model: Path, draft: Path | None, arguments: dict[str, Any], values: dict[str, str], scratch: Path) -> Any:
    if (model / "toy.json").exists():
        from tests.engine_plugins.toy_engine import SamplingParams, ToyEngine

        return ToyEngine(model), SamplingParams
    from engine_plugins.native import engine as native
    from engine_plugins.native.bundle import build_bundle

    build_bundle(
        model, scratch / "bundle", draft=draft, max_seq_len=int(values["--max_seq_len"]), max_batch_size=8,
        draft_tokens=arguments["speculative_config"]["max_draft_len"] if draft else 0,
    )  # fmt: skip
    forced = int(os.environ.get("TLLM_SPEC_DECODE_FORCE_NUM_ACCEPTED_TOKENS", "0"))
    how = {"forced_acceptance": float(forced + 1)} if forced else {}
    return native.Engine(scratch / "bundle", speculate=draft is not None, **how), native.SamplingParams


def completions(state: server.EngineServer) -> Any:
    """/v1/completions, which with `detokenize: false` gives token ids instead of text."""

    async def handle(request: Request) -> Any:
        body = json.loads(await server.read_body(request))
        if body.pop("detokenize", True):
            request._body = json.dumps(body).encode()
            return await state.generate(Replayed(request._body, request), chat=False)
        import asyncio

        asked = parse(json.dumps(body).encode(), chat=False, default_model=state.model)
        (ids,) = asked.prompts
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        class Sink:
            def on_step(self, num_tokens: int, text: str, finish_reason: str | None) -> None:
                if finish_reason:
                    done.set_result(finish_reason)

            def on_fault(self, fault: Any) -> None:
                done.set_exception(fault)

        ticket = state.scheduler.submit(Sink(), list(ids), state.params(asked, list(ids)))
        reason = await done
        out = [int(token) for token in ticket.request.output_ids]
        choice = {"index": 0, "text": "", "token_ids": out, "finish_reason": reason}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(out), "total_tokens": len(ids) + len(out)}
        return JSONResponse({"object": "text_completion", "model": state.model, "choices": [choice], "usage": usage})

    return handle


class Replayed:
    """A request whose body has been read."""

    def __init__(self, body: bytes, request: Request) -> None:
        self.body, self.headers = body, request.headers

    async def stream(self) -> Any:
        yield self.body


class Upstream:
    """Outermost: takes our own fields out of the answers and puts TensorRT-LLM's in."""

    def __init__(self, app: Any, state: server.EngineServer) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        head: list[dict[str, Any]] = []

        async def translated(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                if b"application/json" in dict(message["headers"]).get(b"content-type", b""):
                    head.append(message)
                    return
            elif head:
                body = translate(message["body"])
                headers = [(k, v) for k, v in head[0]["headers"] if k != b"content-length"]
                length = (b"content-length", str(len(body)).encode())
                await send({**head[0], "headers": [*headers, length]})
                message = {**message, "body": body}
            elif message.get("body", b"").startswith(b"data: "):
                message = {**message, "body": b"".join(event_lines(message["body"]))}
            await send(message)

        await self.app(scope, receive, translated)


def translate(body: bytes) -> bytes:
    record = json.loads(body)
    if isinstance(record, dict) and "usage" in record:
        per_step = tokens_per_step(record["usage"])
        for choice in record["choices"]:
            if per_step:
                choice["avg_decoded_tokens_per_iter"] = per_step
    return json.dumps(record).encode()


def event_lines(body: bytes) -> Iterator[bytes]:
    """The closing events of a stream: the last chunk of upstream's carries the tokens per step."""
    for event in re.findall(rb"data: (.*?)\n\n", body, re.DOTALL):
        if event != b"[DONE]" and (usage := (record := json.loads(event)).get("usage")):
            per_step = tokens_per_step(usage)
            if per_step:
                delta = {"index": 0, "delta": {}, "text": "", "avg_decoded_tokens_per_iter": per_step}
                yield b"data: " + json.dumps({**record, "usage": None, "choices": [delta]}).encode() + b"\n\n"
            event = json.dumps(record).encode()
        yield b"data: " + event + b"\n\n"


def tokens_per_step(usage: dict[str, Any]) -> float | None:
    """Takes our counts out of a usage; the first token comes with the prompt's own step."""
    own = usage.pop("speculation", None) or {}
    usage.pop("completion_tokens_details", None)
    return usage["completion_tokens"] / (own["cycles"] + 1) if own.get("cycles") else None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    sys.exit(main())
