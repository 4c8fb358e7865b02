"""The keeper: a tiny process that owns a deployment's public port and lends its listening socket to the live server.

Servers accept from the socket themselves, so a stream of a thousand tokens a second pays for no proxy, and during a
promotion two servers accept at once, so no connection is refused or lost in a backlog. When nobody serves (a swap, or
the live server died), the keeper itself answers 503 with Retry-After instead of leaving clients to hang.

It refuses to read requests, to know slots, and to start servers. Its socket answers one JSON line with one JSON line.

Run it: `python -m tasks.edges.listener --socket PATH --host 127.0.0.1 --port 8000`; deployments start it themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from engine_plugins.native.admission import unix_address

BACKLOG = 4096  # connections that wait while no server accepts; the kernel caps it at net.core.somaxconn
RETRY_AFTER_S = 2
CONTROL_TIMEOUT_S = 10.0
BODY = b'{"error": {"message": "no server is live", "type": "server_error", "param": null, "code": "unavailable"}}'
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: %d\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (RETRY_AFTER_S, len(BODY), BODY)
)


def ask(
    path: Path, command: dict[str, Any], descriptor: int | None = None, timeout_s: float = CONTROL_TIMEOUT_S
) -> tuple[dict[str, Any], int | None]:
    """Send one command to a keeper's or server's control socket; returns the answer and a descriptor if one came.

    Raises OSError when nobody listens, and ValueError when the answer is an error.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as wire:
        wire.settimeout(timeout_s)
        with unix_address(path) as address:
            wire.connect(address)
        line = json.dumps(command).encode() + b"\n"
        if descriptor is None:
            wire.sendall(line)
        else:
            socket.send_fds(wire, [line], [descriptor])
        answer, descriptors, _, _ = socket.recv_fds(wire, 65536, 1)
    reply = json.loads(answer or b'{"error": "no answer"}')
    if "error" in reply:
        raise ValueError(str(reply["error"]))
    return reply, descriptors[0] if descriptors else None


def bind_public(host: str, port: int) -> socket.socket:
    """The public listening socket. Raises OSError when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class Keeper:
    """Holds the socket; refuses connections politely while told to, or once every watched server is gone."""

    def __init__(self, listener: socket.socket, path: Path) -> None:
        self.listener, self.path = listener, path
        self.refusing = False
        self.watched: dict[int, int] = {}  # pidfd -> pid of servers that accept from our socket
        self.selector = selectors.DefaultSelector()
        path.unlink(missing_ok=True)
        self.control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with unix_address(path) as address:
            self.control.bind(address)
        path.chmod(0o600)
        self.control.listen(8)
        self.listener.setblocking(False)
        self.selector.register(self.control, selectors.EVENT_READ, self._on_control)
        self.running = True

    def run(self) -> None:
        while self.running:
            for key, _ in self.selector.select():
                key.data(key.fileobj)
        self.path.unlink(missing_ok=True)

    def status(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "refusing": self.refusing, "watched": sorted(self.watched.values())}

    def refuse(self, wanted: bool) -> None:
        if wanted and not self.refusing:
            self.selector.register(self.listener, selectors.EVENT_READ, self._on_connection)
        elif self.refusing and not wanted:
            self.selector.unregister(self.listener)
        self.refusing = wanted

    def watch(self, pids: list[int]) -> None:
        """Refuse by ourselves as soon as all of these are gone."""
        for descriptor in list(self.watched):
            self._forget(descriptor)
        for pid in pids:
            try:
                descriptor = os.pidfd_open(pid)
            except OSError:
                continue
            self.watched[descriptor] = pid
            self.selector.register(descriptor, selectors.EVENT_READ, self._on_exit)
        self.refuse(not self.watched)

    def _forget(self, descriptor: int) -> None:
        self.selector.unregister(descriptor)
        os.close(descriptor)
        del self.watched[descriptor]

    def _on_exit(self, descriptor: int) -> None:
        self._forget(descriptor)
        if not self.watched:
            self.refuse(True)

    def _on_control(self, _: Any) -> None:
        with contextlib.suppress(OSError):
            peer, _address = self.control.accept()
            with peer:
                peer.settimeout(CONTROL_TIMEOUT_S)
                self._answer(peer)

    def _answer(self, peer: socket.socket) -> None:
        try:
            command = json.loads(peer.recv(65536))
            what = command["do"]
        except (ValueError, KeyError, TypeError):
            peer.sendall(b'{"error": "not a command"}\n')
            return
        if what == "refuse":
            self.refuse(True)
        elif what == "watch":
            self.watch([int(pid) for pid in command["pids"]])
        elif what == "stop":
            self.running = False
        lent = [self.listener.fileno()] if what == "listener" else []
        socket.send_fds(peer, [json.dumps(self.status()).encode() + b"\n"], lent)

    def _on_connection(self, _: Any) -> None:
        with contextlib.suppress(OSError):
            peer, _address = self.listener.accept()
            threading.Thread(target=refuse_politely, args=(peer,), daemon=True).start()


def refuse_politely(peer: socket.socket) -> None:
    """Answer 503, and take in what the client still sends: closing on unread bytes would reset the answer away."""
    with peer, contextlib.suppress(OSError):
        peer.settimeout(2)
        peer.recv(65536)
        peer.sendall(REFUSAL)
        peer.shutdown(socket.SHUT_WR)
        while peer.recv(65536):
            pass


def main(argv: list[str] | None = None) -> int:
    """Keep one port until told to stop."""
    parser = argparse.ArgumentParser(description="Own a public port and lend its listening socket.")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fd", type=int, default=None, help="an inherited listening socket, instead of binding")
    args = parser.parse_args(argv)
    try:
        listener = bind_public(args.host, args.port) if args.fd is None else socket.socket(fileno=args.fd)
    except OSError as error:
        print(f"cannot listen on {args.host}:{args.port}: {error.strerror}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a person's Ctrl-C is for the command they typed
    Keeper(listener, args.socket).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
