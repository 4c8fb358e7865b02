"""Proof that what was asked for runs: each option that speed depends on, looked for in the running server's own traces.

A flag that upstream accepts and ignores costs a third of the speed and leaves no error. So a start is believed only
after the server's version, every rank's account of itself (`adapter.Evidence`), the kernel names of a short profiler
trace and the acceptance of the smoke requests agree with the bundle.

It refuses to measure speed, and to believe a kernel it could not see: no trace is a complaint.

Run it: part of `deploy` for backend trtllm; the evidence lies beside the slot's control socket.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine_plugins.trtllm.contract import contract_for
from engine_plugins.trtllm.kernels import record_kernels

CATEGORIES = ("kernel", "cuda_runtime", "cuda_driver")
MIN_PDL_SM = 90  # programmatic dependent launch exists from Hopper on


@dataclass(frozen=True)
class Expected:
    """What the bundle asked for."""

    version: str
    ranks: int
    plugins: tuple[str, ...]
    kernels: dict[str, str]  # record kernel -> part of its name in a trace
    cuda_graphs: bool
    pdl: bool
    draft_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for the bundle's record."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Expected:
        """What `to_dict` wrote down."""
        return cls(**{**record, "plugins": tuple(record["plugins"])})


@dataclass(frozen=True)
class Seen:
    """What the running server shows. `ranks` are the files that the plugin package left, one per process."""

    version: str
    ranks: list[dict[str, Any]] = field(default_factory=list)
    kernels: frozenset[str] | None = None  # names in the trace; None when there is none
    acceptance: float = 0.0

    @property
    def complete(self) -> bool:
        """The trace comes last: what is missing now stays missing."""
        return self.kernels is not None


def expect(spec: dict[str, Any], config: dict[str, Any] | None) -> Expected:
    """From a spec (or the slice with `engine`) and the checkpoint's config.json."""
    engine = spec["engine"]
    known = contract_for(engine["version"]).env["TRTLLM_ENABLE_PDL"]
    kernels = {
        kernel.name: kernel.in_trace
        for kernel in record_kernels(spec, config)
        if kernel.runs and kernel.in_trace and kernel.plugin not in engine["plugins"]
    }
    return Expected(
        version=engine["version"],
        ranks=engine["tensor_parallel"],
        plugins=tuple(engine["plugins"]),
        kernels=kernels,
        cuda_graphs=engine["options"].get("cuda_graph_config", {}) is not None,
        pdl=engine["env"].get("TRTLLM_ENABLE_PDL", known["default"]) == "1",
        draft_tokens=engine["draft_tokens"],
    )


def look(evidence: Path, version: str, acceptance: float) -> Seen:
    """Read what the server's processes left in the evidence folder."""
    files = [json.loads(path.read_text()) for path in sorted(evidence.glob("*.json")) if path.stem.isdigit()]
    ranks = [found for found in files if "sm" in found]  # those that have constructed the model
    return Seen(version, ranks, _kernel_names(evidence), acceptance)


def unproven(expected: Expected, seen: Seen) -> list[str]:
    """Everything that was asked for and does not show, in words; empty when the start is proven."""
    return [*_server(expected, seen), *_kernels(expected, seen), *_plugins(expected, seen)]


def _server(expected: Expected, seen: Seen) -> Iterator[str]:
    if seen.version != expected.version:
        yield f"the server is TensorRT-LLM {seen.version or 'of unknown version'}, the spec says {expected.version}"
    if expected.draft_tokens and seen.acceptance <= 1.0:
        yield f"acceptance is {seen.acceptance:g}: the draft is loaded and never right, or not loaded"


def _kernels(expected: Expected, seen: Seen) -> Iterator[str]:
    if not expected.kernels and not expected.cuda_graphs:
        return
    if seen.kernels is None:
        yield "there is no profiler trace, so no kernel could be seen"
        return
    if expected.cuda_graphs and not any("cudaGraphLaunch" in name for name in seen.kernels):
        yield "cuda_graph_config is on, and no CUDA graph was launched"
    for kernel, part in expected.kernels.items():
        if not any(part in name for name in seen.kernels):
            yield f"{kernel} should run at this shape, and no kernel named {part}* was launched"


def _plugins(expected: Expected, seen: Seen) -> Iterator[str]:
    if len(seen.ranks) < expected.ranks:
        yield f"the plugin package registered itself in {len(seen.ranks)} of {expected.ranks} ranks"
    for rank in seen.ranks:
        name = f"rank {rank.get('rank', '?')}"
        yield from (f"{name}: {error}" for error in rank.get("errors", ()))
        if expected.pdl and rank.get("env", {}).get("TRTLLM_ENABLE_PDL", "1") != "1":
            yield f"{name}: TRTLLM_ENABLE_PDL did not reach it"
        if expected.pdl and 0 < rank["sm"] < MIN_PDL_SM:
            yield f"{name}: no programmatic dependent launch on SM {rank['sm']}"
        for op in expected.plugins:
            outcomes = rank.get("ops", {}).get(op, {})
            if "ran" not in outcomes:
                yield f"{name}: plugin {op} never ran ({'; '.join(outcomes) or 'it was never reached'})"


def _kernel_names(evidence: Path) -> frozenset[str] | None:
    """Names of kernels and runtime calls in the chrome traces, plain or gzipped; None while none is whole."""
    names: set[str] = set()
    for trace in evidence.glob("trace*"):
        try:
            data = trace.read_bytes()
            events = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)["traceEvents"]
        except (OSError, ValueError, EOFError, LookupError):  # being written
            continue
        names |= {str(event.get("name", "")) for event in events if event.get("cat") in CATEGORIES}
    return frozenset(names) or None
