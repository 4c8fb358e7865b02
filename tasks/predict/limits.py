"""What cannot run, found before anything is spent, each with the nearest spec that can.

`check` is about the machine and holds for a prediction too; `check_engine` about what the engines here can serve.
Refuses to try: divisibility, memory and contracts are arithmetic. Run it: `kilotok plan SPEC`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine_plugins.trtllm.kernels import RECORD_TOKENS
from specs.errors import InputError
from tasks.predict.cost import Setting, memory_gib_per_gpu
from tasks.predict.hardware import Gpu
from tasks.predict.shape import DraftShape, Shape
from tasks.predict.throughput import USABLE

if TYPE_CHECKING:
    from specs.schema import Spec

Where = Callable[[str], str]


def check(
    gpu: Gpu, shape: Shape, draft: DraftShape | None, setting: Setting, engine: dict[str, Any], where: Where
) -> None:
    """Raise InputError for the first thing that cannot be. `engine` is the spec's section, `where` finds its keys."""
    _check_devices(gpu, setting, where)
    _check_heads(gpu, shape, setting, where)
    _check_experts(shape, setting, where)
    _check_memory(gpu, shape, draft, setting, engine, where)


def check_engine(spec: Spec) -> None:
    """Raise InputError for drafts that the engine does not serve, or for which its kernels would silently not run."""
    engine = spec.engine
    if engine.parallel_draft:
        raise InputError(
            "no engine here serves a parallel drafter yet", spec.where("engine.parallel_draft"),
            "use parallel_draft: false; predict and explain say what one would be worth",
        )  # fmt: skip
    _check_forced(spec)
    most, whose = min(_longest_drafts(spec), default=(engine.draft_tokens, ""))
    if engine.draft_tokens > most:
        raise InputError(
            f"draft_tokens {engine.draft_tokens} makes steps of {engine.draft_tokens + 1} tokens; {whose} takes at "
            f"most {most + 1}", spec.where("engine.draft_tokens"), f"use draft_tokens: {most}",
        )  # fmt: skip


def _check_forced(spec: Spec) -> None:
    """A forced acceptance that TensorRT-LLM cannot be made to have. One beyond the drafts `validate` leaves out."""
    length = spec.validation.latency.forced_acceptance
    if spec.engine.backend != "trtllm" or not spec.engine.draft_tokens or length is None:
        return
    near = max(round(length), 2)
    if length != near:
        raise InputError(
            f"forced_acceptance {length:g}, but trtllm forces whole numbers from 2",
            spec.where("validate.latency.forced_acceptance"), f"use forced_acceptance: {near}",
        )  # fmt: skip


def _longest_drafts(spec: Spec) -> Iterator[tuple[int, str]]:
    """Longest draft at which a step of one user still runs on the kernels that the spec asks for, and whose limit it
    is."""
    engine = spec.engine
    if engine.backend == "trtllm" and engine.options.get("enable_min_latency"):
        yield RECORD_TOKENS - 1, "enable_min_latency"
    for plugin in engine.plugins if engine.gpu_architecture else ():
        limits = import_module(f"engine_plugins.ops.{plugin}.contract").CONTRACT.gpu_axes
        if "M" in limits:
            yield limits["M"].high - 1, f"the plugin {plugin}"
        elif "k" in limits:
            yield limits["k"].high, f"the plugin {plugin}"


def divides(shape: Shape, tensor_parallel: int) -> bool:
    """Whether every GPU gets whole query heads, KV heads (or one shared by several GPUs) and rows of each MLP."""
    kv = shape.kv_heads % tensor_parallel == 0 or tensor_parallel % shape.kv_heads == 0
    widths = [width for width in (shape.ffn_dense, shape.ffn_expert) if width]
    return shape.q_heads % tensor_parallel == 0 and kv and not any(width % tensor_parallel for width in widths)


def _nearest(wanted: int, allowed: list[int]) -> int:
    return min(allowed, key=lambda value: (abs(value - wanted), -value))


def _check_devices(gpu: Gpu, setting: Setting, where: Where) -> None:
    if setting.tensor_parallel > gpu.devices:
        raise InputError(
            f"tensor_parallel {setting.tensor_parallel} on {gpu.devices} x {gpu.name}",
            where("engine.tensor_parallel"),
            f"use tensor_parallel: {gpu.devices}, or hardware with more GPUs",
        )


def _check_heads(gpu: Gpu, shape: Shape, setting: Setting, where: Where) -> None:
    tp = setting.tensor_parallel
    if setting.attention_dp or divides(shape, tp):
        return
    near = _nearest(tp, [value for value in range(1, gpu.devices + 1) if divides(shape, value)])
    raise InputError(
        f"tensor_parallel {tp} does not divide {shape.q_heads} query heads, {shape.kv_heads} KV heads and the MLP",
        where("engine.tensor_parallel"),
        f"use tensor_parallel: {near}",
    )


def _check_experts(shape: Shape, setting: Setting, where: Where) -> None:
    ep = setting.expert_parallel
    if ep == 1:
        return
    if not shape.experts:
        raise InputError(
            f"expert_parallel {ep} for a model without experts", where("engine.expert_parallel"),
            "use expert_parallel: 1",
        )  # fmt: skip
    if shape.experts % ep:
        tp = setting.tensor_parallel
        near = _nearest(ep, [value for value in range(1, tp + 1) if tp % value == 0 and shape.experts % value == 0])
        raise InputError(
            f"expert_parallel {ep} does not divide {shape.experts} experts", where("engine.expert_parallel"),
            f"use expert_parallel: {near}",
        )  # fmt: skip


def _check_memory(
    gpu: Gpu, shape: Shape, draft: DraftShape | None, setting: Setting, engine: dict[str, Any], where: Where
) -> None:
    length, requests = engine["max_seq_len"], engine["max_batch_size"]
    paged = engine["backend"] == "trtllm"  # takes what is left; must hold one whole request
    dp = setting.tensor_parallel if setting.attention_dp else 1

    def need(tp: int = setting.tensor_parallel, batch: int = requests, tokens: int = length) -> float:
        held = replace(setting, tensor_parallel=tp, batch=dp if paged else batch)
        return memory_gib_per_gpu(shape, draft, held, tokens)["total"]

    limit = USABLE * gpu.memory_gib
    if need() <= limit:
        return
    wider = [
        tp for tp in range(setting.tensor_parallel + 1, gpu.devices + 1) if divides(shape, tp) and need(tp) <= limit
    ]
    smaller = [batch for batch in range(requests - 1, 0, -1) if need(batch=batch) <= limit]
    shorter = next((2**power for power in range(20, 8, -1) if 2**power < length and need(tokens=2**power) <= limit), 0)
    if not paged and smaller:
        fix, key = f"use max_batch_size: {smaller[0]}", "engine.max_batch_size"
    elif shorter:
        fix, key = f"use max_seq_len: {shorter}", "engine.max_seq_len"
    elif wider:
        fix, key = f"use tensor_parallel: {wider[0]}", "engine.tensor_parallel"
    else:
        fix, key = f"nothing smaller fits; weights alone take {need(tokens=0):.0f} GiB: use other hardware", "hardware"
    raise InputError(
        f"{need():.1f} GiB per GPU are needed, {limit:.1f} of {gpu.memory_gib:.0f} are usable on {gpu.name}",
        where(key),
        fix,
    )
