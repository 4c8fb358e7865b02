"""The front: `trtllm-serve` as one slot of a deployment.

trtllm-serve binds its own port and cannot take over a listening socket, so this process starts it on a private port,
accepts in its place and passes bytes on. Towards the deployer it behaves like the native server: the same control
socket, 503 with Retry-After while it drains, exit when everything that ran has been answered. Of a response only the
head is read; what follows goes through unchanged, chunk by chunk.

It refuses to balance, retry or cache, to read bodies, and to outlive its engine or to be outlived by it.

Run it: `python -m engine_plugins.trtllm.front --bundle DIR --name MODEL --port 8000` in the environment that has
trtllm-serve.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine_plugins.native.admission import Admission
from engine_plugins.trtllm import EVIDENCE_ENV, PLUGINS_ENV
from engine_plugins.trtllm.placeholders import filled
from engine_plugins.trtllm.relay import Client

log = logging.getLogger("kilotok.front")
ENGINE_HOST = "127.0.0.1"
ENGINE_GRACE_S = 60.0  # trtllm-serve joins eight workers that free their GPUs
LINGER_S = 1.0  # idle connections may still bring a request, which is owed a 503 and not a reset
_PR_SET_PDEATHSIG = 1


class Front:
    """Accepts on the slot's port and, when told to, on the public socket; ends with its engine."""

    def __init__(self, host: str, port: int, control: Path | None, engine: Engine) -> None:
        self.host, self.port, self.control, self.engine = host, port, control, engine
        self.admission = Admission()
        self.clients: set[Client] = set()
        self.ended = asyncio.Event()

    def make_client(self) -> Client:
        return Client(self.admission, self.clients, (ENGINE_HOST, self.engine.port))

    async def run(self) -> int:
        """Serve until a signal or the engine's end; returns the exit status."""
        loop = asyncio.get_running_loop()
        self.admission.make_protocol = self.make_client
        self.admission.connections = lambda: self.clients
        server = await loop.create_server(self.make_client, self.host, self.port)
        if self.control is not None:
            self.admission.open_control(self.control)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        watched = os.pidfd_open(self.engine.process.pid)
        loop.add_reader(watched, self.ended.set)
        log.info("front on %s:%d, engine on port %d", self.host, self.port, self.engine.port)
        await self.ended.wait()
        loop.remove_reader(watched)
        os.close(watched)
        self.admission.close()
        server.close()
        for client in list(self.clients):
            client.close()
        return await loop.run_in_executor(None, self.engine.end, self.admission.draining)

    def _on_signal(self) -> None:
        if self.admission.draining:  # asked twice: now means now
            self.ended.set()
            return
        log.info("draining: %d requests run", self.admission.num_active)
        self.admission.draining = True
        self._drain = asyncio.get_running_loop().create_task(self._end_when_idle())

    async def _end_when_idle(self) -> None:
        patience_s = LINGER_S
        while self.admission.num_active or (self.clients and patience_s > 0):
            await asyncio.sleep(0.02)
            patience_s = LINGER_S if self.admission.num_active else patience_s - 0.02
        self.ended.set()


class Engine:
    """trtllm-serve as our child, on a port of its own. Raises OSError when the program cannot be started."""

    def __init__(self, bundle: Path, name: str, folder: Path, command: str = "") -> None:
        self.port = _free_port()
        record = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
        arguments, model, evidence = folder / "args.yaml", folder / name, folder / "evidence"
        evidence.mkdir(parents=True, exist_ok=True)
        model.unlink(missing_ok=True)
        model.symlink_to(bundle / "checkpoint")  # trtllm-serve names the model after its folder
        known = {"checkpoint": str(model), "draft": str(bundle / "draft"), "args": str(arguments)}
        known |= {"host": ENGINE_HOST, "port": str(self.port)}
        arguments.write_text(json.dumps(filled(record["args"], known), indent=1))  # JSON is YAML
        argv = filled(record["argv"], known)
        self.process = subprocess.Popen(
            [*(shlex.split(command) or argv[:1]), *argv[1:]],
            env={**os.environ, **record["env"], **_own_environment(bundle, record, evidence)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a signal to our session is ours: the engine goes on until we have drained
            preexec_fn=_dies_with(os.getpid()),  # one thread so far, so this cannot deadlock
        )

    def end(self, meant: bool) -> int:
        """End the whole session; returns 0 when that was meant, else the engine's own status."""
        for number, wait_s in ((signal.SIGTERM, ENGINE_GRACE_S), (signal.SIGKILL, 10.0)):
            if self.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(wait_s)
        with contextlib.suppress(ProcessLookupError):  # workers that their leader left behind
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.poll()
        if not meant:
            log.error("the engine ended by itself with status %s", status)
        return 0 if meant else 3


def _own_environment(bundle: Path, record: Mapping[str, Any], evidence: Path) -> dict[str, str]:
    """What makes the plugin package register itself in every process, and the profiler look at a few iterations."""
    paths = [str(bundle / "site"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in paths if path)),
        PLUGINS_ENV: ",".join(record["plugins"]),
        EVIDENCE_ENV: str(evidence),
        "TLLM_PROFILE_START_STOP": "4-12",  # the smoke requests: a few decode iterations
        "TLLM_TORCH_PROFILE_TRACE": str(evidence / "trace.json"),
    }


def _dies_with(parent: int) -> Any:
    def ask() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(111)

    return ask


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((ENGINE_HOST, 0))
        return int(probe.getsockname()[1])


def main(argv: list[str] | None = None) -> int:
    """Command line. Exit 0 after a drain, 2 when the engine cannot be started, 3 when it ended by itself."""
    parser = argparse.ArgumentParser(description="Serve a trtllm bundle with trtllm-serve behind one port.")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--control", type=Path, required=True, help="control socket; files of this start lie beside it")
    parser.add_argument("--engine", default="", help="command to run instead of the bundle's trtllm-serve")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        engine = Engine(args.bundle, args.served_model_name, args.control.with_suffix(""), args.engine)
    except (OSError, KeyError, ValueError) as error:
        print(f"cannot start the engine of {args.bundle}: {error}", file=sys.stderr)
        return 2

    async def serve() -> int:
        return await Front(args.host, args.port, args.control, engine).run()

    return asyncio.run(serve())


if __name__ == "__main__":
    sys.exit(main())
