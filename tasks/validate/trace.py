"""Where a cycle's time goes on TensorRT-LLM: from the profiler's chrome trace of a few decode steps.

A decode step is one launch of a CUDA graph; the kernels that carry its correlation are that step's. Every instant from
one launch's first kernel to the next belongs to the kernel that started last and still runs, or to nobody: the host. So
the parts add up although kernels overlap (programmatic dependent launch).

It refuses to call the profiled cycle the cycle: profiling slows it, so the speed and `cycle.us` stay the client's, and
to tell draft from verify: one graph holds both, and the draft's kernels are the generic ones.

Run: `python -m tasks.validate.trace TRACE...`
"""

from __future__ import annotations

import gzip
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

GRAPH_LAUNCH = "cudaGraphLaunch"
HOST = "host gap"
# First match in a kernel's name wins; the ops of kilotok and of TensorRT-LLM's min-latency path come before families.
GROUPS = (
    ("allreduce", ("allreduce", "all_reduce", "lamport", "nccl")),
    ("moe", ("moe", "expert")),
    ("router", ("router", "llama4_bf16_bf16_gemm")),
    ("qkv", ("qkv", "llama4_fp8_bf16_gemm")),
    ("dense_mlp", ("swiglu", "fc13")),
    ("attention", ("attention", "fmha", "mmha", "xqa")),
    ("sampling", ("sampl", "argmax", "topk", "softmax", "verify", "accept")),
    ("norms", ("norm",)),
    ("gemm", ("gemm", "gemv", "nvjet", "cutlass", "splitk")),
    ("quantize", ("quant",)),
    ("rope+kv", ("rope", "rotary", "kv_cache", "kvcache")),
)
Event = Mapping[str, Any]


def group_of(kernel: str) -> str:
    """The operator a kernel's name belongs to; "other" for none."""
    low = kernel.lower()
    return next((group for group, hints in GROUPS if any(hint in low for hint in hints)), "other")


def read_trace(path: Path) -> list[Event]:
    """Events of a chrome trace, plain or gzipped; [] for one that is not whole."""
    try:
        data = path.read_bytes()
        events = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)["traceEvents"]
        return list(events)
    except (OSError, ValueError, EOFError, LookupError, TypeError):
        return []


def steps(events: Iterable[Event]) -> list[list[tuple[float, float, str]]]:
    """(start us, end us, name) of the kernels of each decode step, the steps in the order of their first kernel."""
    launches, kernels = set(), []
    for event in events:
        correlation = (event.get("args") or {}).get("correlation")
        if event.get("name") == GRAPH_LAUNCH:
            launches.add(correlation)
        elif event.get("cat") == "kernel" and correlation is not None and "dur" in event:
            kernels.append((correlation, float(event["ts"]), float(event["ts"]) + float(event["dur"]), event["name"]))
    found: dict[Any, list[tuple[float, float, str]]] = {}
    for correlation, start, end, name in kernels:
        if correlation in launches:
            found.setdefault(correlation, []).append((start, end, str(name)))
    return sorted((sorted(step) for step in found.values()), key=lambda step: step[0][0])


def parts(events: Iterable[Event]) -> dict[str, Any] | None:
    """{"cycles", "cycle_us", "parts": [{name, us}]}, the median step's length and the mean of each part scaled to it;
    None with fewer than two steps in a row."""
    decode = steps(events)
    lengths = [after[0][0] - before[0][0] for before, after in zip(decode, decode[1:], strict=False)]
    if not lengths:
        return None
    usual = statistics.median(lengths)
    # Between two requests the engine waits for the next: such a step is not a cycle.
    cycles = [(step, length) for step, length in zip(decode, lengths, strict=False) if length <= 2 * usual]
    sums: dict[str, float] = {}
    for step, length in cycles:
        for name, us in _own_time(step, step[0][0] + length).items():
            sums[name] = sums.get(name, 0.0) + us
    scale = usual / sum(sums.values())
    made = [{"name": name, "us": us * scale} for name, us in sorted(sums.items(), key=lambda part: -part[1])]
    return {"cycles": len(cycles), "cycle_us": usual, "parts": made}


def _own_time(step: Sequence[tuple[float, float, str]], until: float) -> dict[str, float]:
    """Group -> us. An instant is the kernel's that started last and still runs; without one it is the host's."""
    edges = sorted({time for start, end, _ in step for time in (start, min(end, until))} | {until})
    spent: dict[str, float] = {}
    for begin, end in zip(edges, edges[1:], strict=False):
        running = [(start, name) for start, stop, name in step if start <= begin and stop > begin]
        owner = group_of(max(running)[1]) if running else HOST
        spent[owner] = spent.get(owner, 0.0) + end - begin
    return spent


def longest(traces: Iterable[Path]) -> dict[str, Any] | None:
    """Of several ranks' traces the one with the most whole steps."""
    found = [made for path in traces if (made := parts(read_trace(path)))]
    return max(found, key=lambda made: made["cycles"], default=None)


def main() -> None:
    made = longest(Path(name) for name in sys.argv[1:])
    if made is None:
        sys.exit("no trace with two decode steps in a row: CUDA graphs must be on, and a request in flight")
    print(f"{made['cycle_us']:9.1f} us  a cycle under the profiler, {made['cycles']} of them")
    for part in made["parts"]:
        print(f"{part['us']:9.1f} us  {part['name']}")


if __name__ == "__main__":
    main()
