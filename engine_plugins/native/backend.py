"""What runs under the engine: the compiled step, the GPU's graphs, or the reference when there is no compiler.

What it is: the calls they share, and the choice between them.
What it refuses to be: a plugin system; there are three.
Run it: `python -m pytest tests/engine_plugins/test_engine.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine_plugins.native.bundle import Bundle
from specs.errors import InputError

DEVICES = ("cpu", "cuda", "cuda-reference")  # the last: the GPU's program on the CPU references of its ops, for tests
Prefill = tuple[int, int, Sequence[int]]  # slot, first position, tokens: the rows' own and the one after them
Result = tuple[list[int], int]  # new tokens, how many drafts had been proposed


class Backend(Protocol):
    """State per slot lives below; the engine only names slots."""

    def cycle(self, prefills: Sequence[Prefill], decode_slots: Sequence[int]) -> list[Result]:
        """One step for all: prefill rows, verify each decoding slot's drafts, draft again."""

    def start(self, slot: int, position: int, token: int, temperature: float, top_p: float, seed: int) -> None:
        """The slot decodes from now on: `token` at `position` is next, everything before it is (being) prefilled."""

    def copy_prefix(self, source: int, slot: int, count: int) -> None:
        """The first `count` positions of `source`'s caches become `slot`'s."""

    def forced(self, slot: int, token_ids: list[int], what: str) -> np.ndarray:
        """Teacher-forced "logits" [T, V], "hidden" [T, 3H] or "draft" logits [T-1, draft V]."""

    def counters(self) -> dict[str, Any]:
        """Cycles, seconds per operator group, and the backend's name."""

    def close(self) -> None:
        """Free threads and memory."""


def default_threads() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serving_device(bundle: Path) -> str:
    """cuda for a bundle with kernels for a GPU, where there is one; else cpu."""
    if not (bundle / "plugins" / "gpu.json").exists():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def open_backend(
    bundle: Bundle,
    *,
    draft_tokens: int,
    prefill_rows: int,
    threads: int | None,
    forced_acceptance: float | None,
    isa: str | None,
    row_budget: int,
    fused: bool,
    device: str,
) -> Backend:
    """The GPU's when asked for; else the compiled backend when the bundle has one."""
    if device not in DEVICES:
        raise InputError(f"device {device!r}", "engine", f"one of {', '.join(DEVICES)}")
    if device != "cpu":
        from engine_plugins.native.gpu_backend import GpuBackend

        return GpuBackend(
            bundle,
            draft_tokens=draft_tokens,
            prefill_rows=prefill_rows,
            forced_acceptance=forced_acceptance,
            device=device,
        )
    if bundle.library is None:
        from engine_plugins.native.reference_backend import ReferenceBackend

        return ReferenceBackend(bundle, draft_tokens, forced_acceptance)
    from engine_plugins.native.native_backend import NativeBackend

    return NativeBackend(
        bundle,
        draft_tokens=draft_tokens,
        prefill_rows=prefill_rows,
        threads=threads or default_threads(),
        forced_acceptance=forced_acceptance,
        isa=isa,
        row_budget=row_budget,
        fused=fused,
    )
