"""Who may come in: readiness, drain, and a public listening socket that is handed over while requests flow.

A server always listens on its own slot's port. The public port belongs to a keeper process
(tasks/edges/listener.py) whose listening socket is passed to whichever slot is live, so that no proxy sits in the
stream's path: `accept` starts accepting from it, `release` stops. Two servers may accept from the same socket for a
moment, so nothing is refused; connections that are already here are served on, each answer now saying `Connection:
close`, and idle ones end by their usual keep-alive timeout.

It refuses to decide: a deployer speaks to the control socket (one JSON line in, one out; mode 0600).

Run it: `python -m engine_plugins.native.server --bundle DIR --control PATH`; see tasks/edges/listener.py for the
other end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("kilotok.admission")
CONTROL_TIMEOUT_S = 2.0


@contextlib.contextmanager
def unix_address(path: Path) -> Iterator[str]:
    """An address for a socket file whose path may be longer than the 107 bytes a socket address holds."""
    if len(os.fsencode(path)) < 100:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


class Admission:
    """Counts what is running and says whether more may come."""

    def __init__(self) -> None:
        self.draining = False
        self.released = False
        self.num_active = 0
        self.public_port = 0
        self._listener: asyncio.Server | None = None
        self._control: socket.socket | None = None
        self.make_protocol: Callable[[], asyncio.Protocol] | None = None  # set by the server once it is up
        self.connections: Callable[[], set[Any]] = set

    def closes(self, scope: dict[str, Any]) -> bool:
        """Whether this request's connection should end with its answer."""
        return self.draining or (self.released and (scope.get("server") or ("", 0))[1] == self.public_port)

    def num_public_connections(self) -> int:
        return sum(1 for protocol in self.connections() if (protocol.server or ("", 0))[1] == self.public_port)

    def status(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "accepting": self._listener is not None,
            "draining": self.draining,
            "active": self.num_active,
            "public_connections": self.num_public_connections() if self.public_port else 0,
        }

    def open_control(self, path: Path) -> None:
        """Listen for the deployer. A file left by a killed server is replaced."""
        path.unlink(missing_ok=True)
        control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with unix_address(path) as address:
            control.bind(address)
        path.chmod(0o600)
        control.listen(8)
        control.setblocking(False)
        self._control = control
        asyncio.get_running_loop().add_reader(control.fileno(), self._on_control)

    def close(self) -> None:
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control.fileno())
            self._control.close()
        if self._listener is not None:
            self._listener.close()

    def _on_control(self) -> None:
        assert self._control is not None
        try:
            peer, _ = self._control.accept()
        except OSError:
            return
        asyncio.get_running_loop().create_task(self._answer(peer))

    async def _answer(self, peer: socket.socket) -> None:
        """One command, one answer. The deployer sends in one packet, so this blocks for microseconds."""
        with peer:
            peer.settimeout(CONTROL_TIMEOUT_S)
            try:
                line, descriptors, _, _ = socket.recv_fds(peer, 4096, 1)
                command = json.loads(line).get("do")
                reply = await self._obey(command, descriptors)
            except (OSError, ValueError, AttributeError) as error:
                command, reply = None, {"error": str(error)}
            lent = (
                [sock.fileno() for sock in self._listener.sockets] if self._listener and command == "listener" else []
            )
            with contextlib.suppress(OSError):
                socket.send_fds(peer, [json.dumps(reply).encode() + b"\n"], lent)

    async def _obey(self, command: str | None, descriptors: list[int]) -> dict[str, Any]:
        if command == "accept" and descriptors:
            await self._accept(socket.socket(fileno=descriptors[0]))
        elif command == "release":
            self._release()
        elif command not in ("status", "listener"):  # "listener" lends it back to a new keeper, if the old one died
            return {"error": f"unknown command {command!r}"}
        return self.status()

    async def _accept(self, listener: socket.socket) -> None:
        self.released = False
        if self._listener is not None:  # asked twice after a deployer's crash
            listener.close()
            return
        assert self.make_protocol is not None
        listener.setblocking(False)
        self.public_port = listener.getsockname()[1]
        self._listener = await asyncio.get_running_loop().create_server(self.make_protocol, sock=listener)
        log.info("accepting on public port %d", self.public_port)

    def _release(self) -> None:
        self.released = True
        if self._listener is not None:
            self._listener.close()  # closes our copy of the socket; the keeper's and the other slot's stay open
            self._listener = None
            log.info("released public port %d", self.public_port)
