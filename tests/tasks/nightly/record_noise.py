"""Record the noise that the detection is tested with: a bundle served by a fresh process each night, measured twice.

Nothing changes between the nights, so whatever differs is noise. Appends to noise_tiny_cpu.json beside this file.
Run it: `python -m tests.tasks.nightly.record_noise SPEC BUNDLE CHECKPOINT NIGHTS` on the machine that is to be known.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from specs.load import load_spec
from tasks.edges.machine import cpu
from tasks.validate.live import measure_live

RECORDED = Path(__file__).parent / "noise_tiny_cpu.json"
KEPT = ("latency.tps_per_user.p50", "latency.ttft_ms.p50", "cycle.us", "acceptance.length")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def night(spec_path: Path, bundle: Path, checkpoint: Path) -> list[dict[str, float]]:
    """Start, measure twice, stop."""
    port = free_port()
    argv = [sys.executable, "-m", "engine_plugins.native.server", "--bundle", str(bundle), "--port", str(port)]
    server = subprocess.Popen([*argv, "--host", "127.0.0.1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        runs = measure_live(load_spec(spec_path, []), checkpoint, url, 2, Path(tempfile.mkdtemp()))
    finally:
        server.terminate()
        server.wait(20)
    return [{name: run[name] for name in KEPT} for run in runs]


def main() -> None:
    spec, bundle, checkpoint = (Path(argument) for argument in sys.argv[1:4])
    nights = json.loads(RECORDED.read_text())["nights"] if RECORDED.exists() else []
    for _ in range(int(sys.argv[4])):
        runs = night(spec, bundle, checkpoint)
        nights += [runs] if len(runs) == 2 else []
        print(runs or "the machine was busy", flush=True)
        RECORDED.write_text(json.dumps({"machine": cpu(), "nights": nights}, indent=0) + "\n")


if __name__ == "__main__":
    main()
