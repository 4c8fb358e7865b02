"""Waits for tensorrt_llm's Llama to be imported, then grafts our ops onto it. Runs in every process of the server.

What it costs a process that never imports tensorrt_llm: this module, which imports nothing of ours.
It refuses to fail the server: whatever goes wrong is written down as evidence, and the deployer refuses the start.

Run it: `TLLM_KILOTOK_PLUGINS=router python -c "import tensorrt_llm"` where the plugin package is installed.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

TARGET = "tensorrt_llm._torch.models.modeling_llama"


def install() -> None:
    """Watch for the import; once per process."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds TARGET as the others would, with a loader that calls us afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TARGET:
            return None
        sys.meta_path.remove(self)  # seen once is enough, and the others' search must not come back here
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The module's own loader, then ours."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.own.exec_module(module)
        from engine_plugins.trtllm.adapter import register

        register(module)
