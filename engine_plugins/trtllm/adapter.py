"""Our fused ops in TensorRT-LLM's Llama 4: after a model is constructed, its modules get our ops in front of their own.

A module keeps its class, weights, loading and parallelism; its class is extended by one method (`seats`) that calls
`torch.ops.kilotok.NAME` inside the op's gate and upstream's own code outside of it. The model class itself stays the
registered object: upstream's input processors and vision encoders are looked up by it, so a subclass would lose them.

What ran, and what fell back and why, is written down once per kind in EVIDENCE/PID.json: that is how a deployer knows
that an op is live. Under CUDA graphs the Python below runs at warm-up and capture; what it chose there is what is
replayed.

It refuses to change a result: an op that is absent, a shape outside the gate or a missing scale means upstream's code.

Run it: `python -m pytest tests/engine_plugins/trtllm/test_adapter.py`, against a stand-in for upstream.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from engine_plugins.trtllm import EVIDENCE_ENV, PLUGINS_ENV
from engine_plugins.trtllm.seats import SEATS, Seat, Seated

MODEL = "Llama4ForConditionalGeneration"
OPS_MODULE = "engine_plugins.ops.library"  # importing it defines torch.ops.kilotok.*
PARENT_FIGURES = ("q_size", "kv_size", "head_dim", "floor_scale", "attn_scale")  # of the attention around FC_QKV
REPORTED_ENV = ("TRTLLM_ENABLE_PDL", "TRT_LLM_DISABLE_LOAD_WEIGHTS_IN_PARALLEL")


class Evidence:
    """This process's own account of what is live; every new kind of fact rewrites one small file."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / f"{os.getpid()}.json" if folder else None
        self.facts: dict[str, Any] = {"pid": os.getpid(), "ops": {}, "grafted": {}, "errors": []}
        self.facts["env"] = {name: os.environ[name] for name in REPORTED_ENV if name in os.environ}
        self._seen: set[tuple[str, str]] = set()

    def note(self, op: str, outcome: str, tokens: int) -> None:
        """`outcome` is "ran", or why it did not."""
        if (op, outcome) not in self._seen:
            self._seen.add((op, outcome))
            self.facts["ops"].setdefault(op, {})[outcome] = tokens
            self.write()

    def write(self) -> None:
        if self.path is None:
            return
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.facts))
        part.replace(self.path)


def register(modeling_llama: ModuleType) -> None:
    """Make every Llama 4 that this process constructs use the ops that the environment names."""
    asked = tuple(name for name in os.environ.get(PLUGINS_ENV, "").split(",") if name)
    evidence = Evidence(os.environ.get(EVIDENCE_ENV, ""))
    model: Any = getattr(modeling_llama, MODEL)
    construct = model.__init__

    def construct_and_graft(self: Any, *args: Any, **more: Any) -> None:
        construct(self, *args, **more)
        evidence.facts |= _machine()
        try:
            load_ops()
            graft(self, asked, evidence)
        except Exception as error:  # noqa: BLE001  a server without our ops still serves; the deployer decides
            evidence.facts["errors"].append(f"{type(error).__name__}: {error}")
        evidence.write()

    model.__init__ = construct_and_graft
    evidence.write()


def load_ops() -> None:
    """Define torch.ops.kilotok.*, with the kernels that the bundle brings for this GPU."""
    import torch

    library = importlib.import_module(OPS_MODULE)
    plugins = Path(__file__).resolve().parents[3] / "plugins"  # of the bundle whose `site/` this is
    if torch.cuda.is_available() and plugins.is_dir():
        library.use_kernels(plugins)


def op_named(name: str) -> Callable[..., Any] | None:
    """torch.ops.kilotok.NAME, or None when it is not there."""
    import torch

    return getattr(torch.ops.kilotok, name, None)


def _machine() -> dict[str, Any]:
    import torch

    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or os.environ.get("RANK") or 0)
    if not torch.cuda.is_available():
        return {"rank": rank, "sm": 0}
    major, minor = torch.cuda.get_device_capability()
    return {"rank": rank, "sm": 10 * major + minor}


def graft(model: Any, asked: tuple[str, ...], evidence: Evidence) -> None:
    """Give each module of `model` the ops among `asked` that have a seat there."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        name, seated = SEATS.get(path.rpartition(".")[2], ("", Seated))
        if name not in asked or isinstance(module, Seated) or not _is_target(path) or not _is_seat(name, path, module):
            continue
        module.__class__ = type(f"Kilotok{type(module).__name__}", (seated, type(module)), {})
        around = modules.get(path.rpartition(".")[0])
        figures = {key: getattr(around, key) for key in PARENT_FIGURES if hasattr(around, key)}
        module.kilotok = Seat(name, op_named(name), evidence.note, figures)
        evidence.facts["grafted"][name] = evidence.facts["grafted"].get(name, 0) + 1
    for name in asked:
        if name not in evidence.facts["grafted"]:
            evidence.note(name, "has no seat in this model", 0)


def _is_target(path: str) -> bool:
    """The draft and the vision encoder have modules of the same names, and other shapes."""
    return not path.startswith(("draft_model.", "mm_encoder.", "vision", "multi_modal"))


def _is_seat(name: str, path: str, module: Any) -> bool:
    """A dense layer's `feed_forward` is no mixture; its parts have seats of their own."""
    return name != "moe_top1" or path.endswith("experts") or hasattr(module, "experts")
