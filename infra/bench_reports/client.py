"""Our streaming client beside aiperf and guidellm: the same mock, the same load, in one run. Prints a Markdown table.

Each tool runs as a process of its own from start to exit; its CPU time is that of the process and all it started. The
mock says afterwards how fast it really sent each stream, so a tool is held to what happened and not to the plan. The
first chunk carries one token, so that all three mean the same by tokens/s for one user.

It refuses to tune the peers: their command lines are those of tasks/validate/witness.py, with users in parallel.

Run it from the repository root, alone on the machine: `python infra/bench_reports/client.py --aiperf VENV/bin/aiperf
--guidellm VENV/bin/guidellm`
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tasks.validate.client import Ask, Endpoint, token_counter  # noqa: E402 - the script runs from the repository root
from tasks.validate.load import parallel_users  # noqa: E402
from tasks.validate.mock import MockPlan, mock_server  # noqa: E402
from tasks.validate.witness import TOOLS, ours  # noqa: E402

TOKENIZER = Path("specs/models/tiny-llama4")
TOKENS, TOKENS_PER_S = 1500, 5000.0
PATTERN = (1, 3, 2, 4)


def asks(number: int) -> list[Ask]:
    return [Ask(f"p{n}", f"prompt {n} please", max_tokens=TOKENS) for n in range(number)]


def our_client(url: str, users: int, requests: int) -> None:
    """What the child process of `kilotok` runs: print the median tokens/s for one user."""
    endpoint = Endpoint(url, "mock", token_counter(TOKENIZER / "tokenizer.json"))
    rows = parallel_users(endpoint, asks(requests), users)
    print(json.dumps([ours(rows)[0], sum(row["ok"] for row in rows)]))


def command(tool: str, given: argparse.Namespace, url: str, users: int, requests: int, folder: Path) -> list[str]:
    endpoint = Endpoint(url, "mock", token_counter(TOKENIZER / "tokenizer.json"))
    if tool == "kilotok":
        return [sys.executable, __file__, "--child", url, str(users), str(requests)]
    argv = TOOLS[tool][0](endpoint, asks(requests), TOKENIZER, folder, users)
    return [getattr(given, tool), *argv[1:]]


def measure(tool: str, given: argparse.Namespace, users: int, requests: int) -> dict[str, Any]:
    """One run of one tool against a fresh mock."""
    plan = MockPlan(ttft_ms=20, tokens_per_s=TOKENS_PER_S, tokens=TOKENS, pattern=PATTERN)
    with mock_server(plan) as url, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        argv = command(tool, given, url, users, requests, folder)
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(argv, cwd=None if tool == "kilotok" else folder, capture_output=True, text=True)
        wall_s, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        true = json.load(urllib.request.urlopen(f"{url}/truth"))["tps"]
        if tool == "kilotok":
            said, finished = json.loads(done.stdout)
        else:
            said, _, _, finished = TOOLS[tool][1](folder)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    truth = statistics.median(true)
    return {
        "tool": tool, "users": users, "requests": requests, "finished": finished, "cpu_s": cpu_s, "wall_s": wall_s,
        "tps": said, "true_tps": truth, "error_percent": 100 * abs(said / truth - 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Our client beside aiperf and guidellm on one mock")
    parser.add_argument("--aiperf", default="aiperf")
    parser.add_argument("--guidellm", default="guidellm")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--child", nargs=3, metavar=("URL", "USERS", "REQUESTS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        our_client(given.child[0], int(given.child[1]), int(given.child[2]))
        return
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {TOKENS} tokens an answer\n"
    )
    print("| users | requests | client | finished | tokens/s/user | true | error | CPU | wall |")
    print("|---|---|---|---|---|---|---|---|---|")
    for users in given.users:
        for tool in ("kilotok", "aiperf", "guidellm"):
            row = measure(tool, given, users, max(24, 2 * users))
            print(
                "| {users} | {requests} | {tool} | {finished} | {tps:,.0f} | {true_tps:,.0f} | {error_percent:.2f}% | "
                "{cpu_s:.1f} s | {wall_s:.1f} s |".format(**row),
                flush=True,
            )


if __name__ == "__main__":
    main()
