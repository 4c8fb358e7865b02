"""The stages in their order: what each reads, what shapes its output, which function builds it.

Data only, and imports no stage: planning must not pay for torch. A stage never imports another stage; they meet here by
name.
See them with `kilotok plan SPEC`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

_TORCH = ("torch", "transformers", "tokenizers", "safetensors")
# All of `draft` that shapes a head: not `launch`.
DRAFT = ("method", "capture_layers", "target", "vocab_size", "ffn_multiplier", "intermediate_size", "data", "training")


@dataclass(frozen=True)
class Stage:
    """One box of the main path: what is keyed by, then how it is run."""

    name: str
    inputs: tuple[str, ...] = ()  # earlier stages whose artifact digests are part of the key
    uses: tuple[str, ...] = ()  # earlier stages it is given without being keyed by them (an endpoint's address)
    told: tuple[str, ...] = ()  # spec paths it is given without being keyed by them (how to start, what is enough)
    starts_from: str = ""  # dotted spec path of an earlier artifact of its own that it goes on from
    reads: tuple[str, ...] = ()  # dotted spec paths: its slice
    packages: tuple[str, ...] = ()  # distributions whose version shapes the output
    machine: tuple[str, ...] = ()  # machine facts that shape the output: see tasks.edges.machine.FACTS
    pinned: bool = False  # the lock says every byte of its output, so neither code nor spec can shape it
    tells: bool = False  # its output is about the run: keyed by every other stage's key and the last good build
    entry: str = ""  # "module:function", called as build(job, progress)
    alive: str = ""  # "module:function" (artifact directory) -> "" or why a cached artifact is no longer true
    revive: str = ""  # "module:function" (artifact directory) -> "" or what it did to make a cached artifact true again
    isolated: bool = False  # runs in a child process: memory, CUDA context and crashes end with it
    accelerator: bool = False  # holds the machine's accelerator lock while it runs
    size_of: tuple[str, float] = ("", 0.0)  # expected bytes as a share of another stage's artifact, before history


STAGES: tuple[Stage, ...] = (
    Stage("download", reads=("model",), pinned=True, entry="tasks.download:build", isolated=True),
    Stage(
        "quantize",
        inputs=("download",),
        reads=("quantize",),
        packages=("nvidia-modelopt", *_TORCH),
        entry="tasks.quantize:build",
        isolated=True,
        accelerator=True,
        size_of=("download", 0.55),
    ),
    Stage(
        "synthesize",
        inputs=("quantize",),
        reads=("draft.data", "engine.backend", "engine.version"),
        told=("engine", "deploy"),
        packages=("tokenizers", "jinja2"),
        entry="tasks.synthesize:build",
        isolated=True,
        accelerator=True,
        size_of=("download", 0.005),
    ),
    Stage(
        "train_draft",
        inputs=("download", "quantize", "synthesize"),
        starts_from="draft.training.warm_start",
        told=("validate.acceptance", "draft.launch"),
        reads=tuple(f"draft.{name}" for name in DRAFT),
        packages=("nvidia-modelopt", *_TORCH),
        entry="tasks.train_draft:build",
        isolated=True,
        accelerator=True,
        size_of=("download", 0.01),
    ),
    Stage(
        "build_engine",
        inputs=("quantize", "train_draft"),
        reads=("engine", "draft.method", "draft.capture_layers", "deploy.image"),
        packages=("numpy",),
        machine=("cpu_isa", "compiler", "cuda_compiler", "gpu", "container"),
        entry="tasks.build_engine:build",
        isolated=True,
        size_of=("quantize", 1.05),
    ),
    Stage(
        "deploy",
        inputs=("build_engine",),
        reads=("name", "deploy", "engine"),
        machine=("host",),
        entry="tasks.deploy:build",
    ),
    Stage(
        "validate",
        inputs=("download", "build_engine"),
        uses=("deploy",),
        reads=("validate", "engine.backend", "engine.draft_tokens"),
        told=("engine", "deploy"),
        packages=("lm-eval", *_TORCH),
        machine=("cpu", "gpu", "container"),
        entry="tasks.validate:build",
        isolated=True,
    ),
    Stage(
        "promote",
        inputs=("build_engine", "validate"),
        uses=("deploy",),
        reads=("name", "deploy"),
        machine=("host",),
        entry="tasks.promote:build",
        alive="tasks.promote:alive",
        revive="tasks.promote:revive",
    ),
    Stage(
        "report",
        inputs=("quantize", "synthesize", "train_draft", "build_engine", "validate"),
        uses=("download", "deploy", "promote"),
        reads=("name", "validate", "engine", *(f"draft.{name}" for name in DRAFT)),
        tells=True,
        entry="tasks.report:build",
    ),
)

REGISTRY: dict[str, Stage] = {stage.name: stage for stage in STAGES}


def ask(function: str, folder: Path) -> str:
    """What a stage's `alive` or `revive` says about a cached artifact; "" without one."""
    module, _, name = function.partition(":")
    return str(getattr(importlib.import_module(module), name)(folder)) if function else ""


def downstream(name: str, registry: dict[str, Stage] | None = None) -> list[str]:
    """Every stage that is keyed, directly or not, by the artifact of `name`, in order."""
    reached = {name}
    for stage in (registry or REGISTRY).values():
        if reached & set(stage.inputs):
            reached.add(stage.name)
    return [other for other in (registry or REGISTRY) if other in reached - {name}]
