"""A Prefect server and a process worker of one's own, on SQLite or PostgreSQL, for the tests that need both for real.

Refuses to share: database, ports, home and work folder are the test's. Used by test_worker.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from tasks.edges.service import free_port
from tests.flows.toy.repository import Repository

SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_WORKER_QUERY_SECONDS": "2",
    "PREFECT_WORKER_HEARTBEAT_SECONDS": "5",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_API_SERVICES_LATE_RUNS_AFTER_SECONDS": "5",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_AFTER_SECONDS": "5",
}


class House:
    """Server, worker, webhook and the toy repository that is deployed to them."""

    def __init__(
        self, path: Path, repository: Repository, database: str = "", secrets: dict[str, str] | None = None
    ) -> None:
        self.path, self.repository = path, repository
        self.home, self.store, self.hang = path / "home", path / "shared-store", path / "hang"
        self.home.mkdir(parents=True)
        self.port, self.heard = free_port("127.0.0.1"), listen()
        url = f"http://127.0.0.1:{self.heard.port}/hook-secret-6f1c2b"
        self.env = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            **SETTINGS,
            **(secrets or {}),
            "PREFECT_HOME": str(path / "prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "KILOTOK_REPOSITORY": repository.path.as_uri(),
            "KILOTOK_BRANCH": "main",
            "KILOTOK_HOME": str(self.home),
            "KILOTOK_STORE": str(self.store),
            "KILOTOK_WEBHOOK": url,
            "TOY_HANG": str(self.hang),
            "TOY_NIGHT": "1",
        }
        if database:
            self.env["PREFECT_API_DATABASE_CONNECTION_URL"] = database
        self.children: list[subprocess.Popen[bytes]] = []
        self.start_server()

    def start_server(self) -> None:
        argv = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        self.server = self.spawn("server", argv)
        self.wait(self.is_up, 180, "the server did not start")

    def stop_server(self) -> None:
        """All of it: the command and the process that it started to serve."""
        os.killpg(self.server.pid, signal.SIGTERM)
        self.server.wait(60)
        self.wait(lambda: not self.is_up(), 60, "the server did not stop")

    def is_up(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.env['PREFECT_API_URL']}/health", timeout=2):
            return True
        return False

    def worker(self) -> subprocess.Popen[bytes]:
        """A process worker as the operations guide starts it."""
        return self.spawn(
            "worker", ["-m", "prefect", "worker", "start", "--pool", "kilotok", "--type", "process", "--limit", "1"]
        )

    def spawn(self, name: str, argv: list[str]) -> subprocess.Popen[bytes]:
        with open(self.path / f"{name}.log", "ab") as log:
            child = subprocess.Popen(
                [sys.executable, *argv], cwd=self.path, env=self.env, stdout=log, stderr=log, start_new_session=True
            )
        self.children.append(child)
        return child

    def setup(self) -> str:
        """infra/prefect/setup.py of the toy repository."""
        env = {**self.env, "PYTHONPATH": str(self.repository.path)}
        done = subprocess.run(
            [sys.executable, "infra/prefect/setup.py"],
            cwd=self.repository.path,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def prefect(self, *argv: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "prefect", *argv], cwd=self.path, env=self.env, capture_output=True, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip

    def api(self, path: str, body: Any = None) -> Any:
        """One question to the server, asked again when a busy SQLite makes it say 503, as Prefect's own client does."""
        data = None if body is None else json.dumps(body).encode()
        url = f"{self.env['PREFECT_API_URL']}{path}"
        for attempt in range(5):
            try:
                request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
                with urllib.request.urlopen(request, timeout=120) as answer:  # a full disk queue holds SQLite up
                    return json.loads(answer.read() or b"null")
            except urllib.error.HTTPError as error:
                if error.code != 503 or attempt == 4:
                    raise
                time.sleep(2)
        raise AssertionError("unreachable")

    def start_run(self, deployment: str, **parameters: str) -> str:
        """Create a run; its id."""
        found = self.api(f"/deployments/name/{deployment}")
        return str(self.api(f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})["id"])

    def run_state(self, run: str) -> str:
        return str(self.api(f"/flow_runs/{run}")["state"]["name"])

    def until(self, run: str, *states: str, timeout_s: float = 240) -> str:
        """Wait until the run is in one of the states."""
        self.wait(lambda: self.run_state(run) in states, timeout_s, f"run is {self.run_state(run)}, wanted {states}")
        return self.run_state(run)

    def wait(self, what: Callable[[], bool], timeout_s: float, failure: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < deadline, failure
            time.sleep(0.2)

    def nights(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted((self.store / "records/nights/toy").glob("*.json"))]

    def hanging(self) -> list[str]:
        """Command lines of toy stages that are running: `tasks.child` of this house's store."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found += [line] if "tasks.child" in line and str(self.store) in line else []
        return found

    def close(self) -> None:
        """Everything that was started here, and what those started: all of it has our store in its environment."""
        for child in reversed(self.children):
            kill(child)
        ours = f"KILOTOK_STORE={self.store}\0".encode()
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if ours in entry.read_bytes():
                    os.kill(int(entry.parent.name), signal.SIGKILL)


def kill(child: subprocess.Popen[bytes]) -> None:
    """The whole session, as a machine that goes down does."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def listen() -> Any:
    """A webhook that keeps what it is sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.server.messages.append(self.rfile.read(int(self.headers["Content-Length"])).decode())  # type: ignore[attr-defined]
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_arguments: Any) -> None:
            return None

    server: Any = HTTPServer(("127.0.0.1", 0), Handler)
    server.messages, server.port = [], server.server_port
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's server programs, which is on nobody's PATH; None where only a client is installed."""
    if not shutil.which("pg_config"):
        return None
    found = subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True, check=True).stdout.strip()
    return Path(found) if Path(found, "initdb").exists() else None


@contextlib.contextmanager
def postgres(programs: Path) -> Iterator[str]:
    """A PostgreSQL of one's own; its URL for Prefect. It refuses to run as root, so root lends it another user."""
    user = "postgres" if os.geteuid() == 0 else None
    port = free_port("127.0.0.1")
    with tempfile.TemporaryDirectory(prefix="kilotok-postgres-") as folder:  # pytest's folders are root's alone
        if user:
            shutil.chown(folder, user)
        initdb = [programs / "initdb", "-D", f"{folder}/data", "-U", "kilotok", "-A", "trust"]
        subprocess.run(initdb, user=user, check=True, capture_output=True)
        options = ["-c", f"port={port}", "-c", f"unix_socket_directories={folder}", "-c", "listen_addresses=127.0.0.1"]
        with open(f"{folder}/log", "wb") as log:
            argv = [programs / "postgres", "-D", f"{folder}/data", *options]
            server = subprocess.Popen(argv, user=user, stdout=log, stderr=log)
        try:
            create = [programs / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "kilotok", "prefect"]
            for _ in range(100):
                if subprocess.run(create, capture_output=True).returncode == 0:
                    break
                time.sleep(0.2)
            yield f"postgresql+asyncpg://kilotok@127.0.0.1:{port}/prefect"
        finally:
            server.terminate()
            server.wait(20)
