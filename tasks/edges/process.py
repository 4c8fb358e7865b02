"""Start programs so that none outlives its purpose: own session, output to a file, death with us, the GPU's lock.

Refuses pipes for output (a full pipe stops the child, and an orphan holding one stops the parent) and lock files with
an expiry (a kernel flock is freed by the crash itself, and by nothing else).
Used by `tasks.runner` and by deploy; try it: `python -m tasks.edges.process LOG CMD...`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tasks.edges.leases import file_lease

_PR_SET_PDEATHSIG = 1
# Runs between us and the program: asks the kernel to kill it with its parent, then becomes it. Not a preexec_fn, which
# may deadlock in a threaded parent. The setting survives exec; the check closes the race with a parent already gone.
_TRAMPOLINE = (
    "import ctypes,os,signal,sys;"
    "ctypes.CDLL(None).prctl(1,signal.SIGKILL);"
    "os.getppid()==int(sys.argv[1]) or os._exit(111);"
    "os.execvp(sys.argv[2],sys.argv[2:])"
)


def die_with_parent(parent: int) -> None:
    """Called by a Python child first thing: the kernel kills it when the thread that started it ends. Linux only."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(111)


def spawn(
    argv: Sequence[str],
    log: Path,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    dies_with_us: bool = True,
) -> subprocess.Popen[bytes]:
    """Start `argv` in its own session, output appended to `log`; it dies with us unless told otherwise."""
    log.parent.mkdir(parents=True, exist_ok=True)
    guarded = sys.platform == "linux" and dies_with_us
    command = [sys.executable, "-S", "-E", "-c", _TRAMPOLINE, str(os.getpid()), *argv] if guarded else list(argv)
    with open(log, "ab") as output:
        return subprocess.Popen(
            command, cwd=cwd, env=dict(env) if env is not None else None, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True, pass_fds=tuple(pass_fds),
        )  # fmt: skip


def stop(process: subprocess.Popen[bytes], grace_s: float = 10.0) -> int:
    """Ask the whole session to end, then make it; returns the exit status."""
    for signum, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
        if process.poll() is not None:
            break
        _signal_group(process.pid, signum)
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue
    _signal_group(process.pid, signal.SIGKILL)  # grandchildren that the leader left behind
    return process.wait()


def is_alive(pid: int) -> bool:
    """A zombie is not alive: it only waits to be counted."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def stop_pid(pid: int, grace_s: float = 10.0) -> bool:
    """Like `stop`, for a session leader that another run of ours started; True when it is gone."""
    for signum, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        _signal_group(pid, signum)
        deadline = time.monotonic() + wait_s
        while is_alive(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not is_alive(pid):
            return True
    return False


def exit_words(status: int) -> str:
    """How a child ended, for a person: a signal has a name, and SIGKILL a usual reason."""
    if status >= 0:
        return f"exit status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def last_lines(log: Path, count: int = 12) -> str:
    """The end of a log without reading the rest of it."""
    try:
        with open(log, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - 16384))
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-count:])


@contextmanager
def accelerator(on_wait: Callable[[str], None] | None = None) -> Iterator[int]:
    """Hold this machine's accelerator; a child given the descriptor (`pass_fds`) keeps it until it is gone."""
    shared = Path("/run/lock")
    folder = shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    with file_lease(folder / "kilotok-accelerator.lease", "accelerator", on_wait) as descriptor:
        yield descriptor


def _signal_group(pid: int, signum: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signum)


if __name__ == "__main__":
    sys.exit(spawn(sys.argv[2:], Path(sys.argv[1])).wait())
