"""What the front costs: the same stream from the same server, direct and through engine_plugins.trtllm.front.

A toy engine takes 1 ms per step and gives 2.5 tokens in each, which is the pace of a thousand tokens a second and more.
It refuses to say anything of TensorRT-LLM. Run it alone on the machine: `python infra/bench_reports/front_cpu.py`
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tasks.edges.service import free_port, http_status

ROUNDS, TOKENS = 15, 1500
BODY = {"prompt": "who?", "temperature": 0, "max_tokens": TOKENS, "stream": True, "ignore_eos": True}


def stream(port: int) -> tuple[float, float, float]:
    """(time to the first chunk in ms, tokens per second after it, 99th percentile of the gaps in ms)."""
    wire = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    started = time.perf_counter()
    wire.request("POST", "/v1/completions", json.dumps(BODY), {"Content-Type": "application/json"})
    answer = wire.getresponse()
    times = []
    while answer.read1(65536):
        times.append(time.perf_counter())
    gaps = sorted(b - a for a, b in zip(times, times[1:], strict=False))
    return (times[0] - started) * 1e3, TOKENS / (times[-1] - times[0]), gaps[int(len(gaps) * 0.99)] * 1e3


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        checkpoint.mkdir()
        (checkpoint / "toy.json").write_text(json.dumps({"step_s": 0.001, "accepted": [1, 2], "text": "ab" * 50}))
        engine = [sys.executable, "-m", "tests.engine_plugins.toy_engine", "--bundle", str(checkpoint)]
        record = {"argv": ["engine", "--port", "{port}"], "args": {}, "env": {}, "plugins": []}
        (Path(folder) / "bundle.json").write_text(json.dumps(record))
        direct, fronted = free_port("127.0.0.1"), free_port("127.0.0.1")
        front = [sys.executable, "-m", "engine_plugins.trtllm.front", "--bundle", folder, "--served-model-name", "toy"]
        front += ["--control", f"{folder}/s.sock", "--port", str(fronted), "--engine", " ".join(engine)]
        servers = [subprocess.Popen([*engine, "--port", str(direct)]), subprocess.Popen(front)]
        try:
            for port in (direct, fronted):
                while http_status(f"http://127.0.0.1:{port}/health") != 200:
                    time.sleep(0.1)
            turns = [
                (stream(direct), stream(fronted)) for _ in range(ROUNDS)
            ]  # the machine's mood is the same for both
        finally:
            for server in servers:
                server.terminate()
                server.wait()
    for name, found in zip(("direct", "front"), zip(*turns, strict=True), strict=True):
        ttft, speed, gap = (median(column) for column in zip(*found, strict=True))
        print(f"{name:8} first chunk {ttft:6.2f} ms   {speed:7.1f} tokens/s   p99 gap {gap:5.2f} ms")


if __name__ == "__main__":
    main()
