"""From a spec to numbers before anything runs: cycle, tokens per second with an interval, memory, and the floors
under them.

Refuses to read weights, to import torch and to hide an assumption: acceptance, calibration and hardware name their
sources. Run it: `kilotok predict SPEC [--json]`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.errors import InputError
from tasks.predict import calibrate, hardware, limits
from tasks.predict.acceptance import Acceptance, expect
from tasks.predict.calibrate import CYCLE, THROUGHPUT, Calibration
from tasks.predict.cost import OPS, Cycle, Setting, cycle, memory_gib_per_gpu
from tasks.predict.hardware import Gpu
from tasks.predict.records import Records
from tasks.predict.shape import DraftShape, Shape, known_shape, shape_from_config
from tasks.predict.throughput import Load, saturated, tokens_per_s

if TYPE_CHECKING:
    from specs.schema import Spec

INPUT_TOKENS = {"artificial_analysis_100": 100, "artificial_analysis_1k": 1000, "artificial_analysis_10k": 10000}
HELD_OUT_TOKENS = 64  # of a prompt that is used as it stands in the file
MANY_TOKENS = 32  # rows of a step from which a batch is priced by the throughput rows, not by those of one user
FUSED_FOR_MANY = frozenset({"allreduce_rmsnorm"})  # the others are for at most 16 rows
# A plugin is fused where TensorRT-LLM's own gates let one of these kernels run (engine_plugins/trtllm/kernels.py).
KERNELS = {
    "router": ("router GEMV",),
    "qkv_attn_scaling": ("FC_QKV + attention scaling",),
    "fc13_swiglu": ("FC13 + SwiGLU GEMV", "FC13 + SwiGLU trtllm-gen"),
    "moe_top1": ("MoE top-1",),
    "allreduce_rmsnorm": ("AllReduce",),
}


@dataclass(frozen=True)
class Interval:
    """`expected`, and the 80% interval around it."""

    expected: float
    low: float
    high: float

    def to_dict(self, digits: int = 1) -> dict[str, float]:
        return {name: round(getattr(self, name), digits) for name in ("expected", "low", "high")}


@dataclass(frozen=True)
class Case:
    """One question: a model on a machine in a setting. Frozen, so that a sweep asks five hundred of them."""

    name: str  # the spec's
    gpu: Gpu
    shape: Shape
    draft: DraftShape | None
    setting: Setting  # batch 1: what one user sees
    stack: str
    load: Load
    acceptance: Acceptance
    users: int
    max_seq_len: int
    records: Records = field(default_factory=Records, repr=False)

    @cached_property
    def cycle(self) -> Cycle:
        return cycle(self.gpu, self.shape, self.draft, self.setting)

    @cached_property
    def calibration(self) -> Calibration:
        return calibrate.calibrate(self.records.rows(self.gpu), self.stack, CYCLE, own=self.name)

    @cached_property
    def cycle_us(self) -> Interval:
        """Never below the floor of bytes and wire."""
        floor, model = self.cycle.hbm_ar_us, self.cycle.kernels_us
        low, expected, high = (
            max(floor, model * scale)
            for scale in (self.calibration.low, self.calibration.factor, self.calibration.high)
        )
        return Interval(expected, low, high)

    @cached_property
    def tps_per_user(self) -> Interval:
        """Acceptance over cycle; the two spreads are independent, so they add as squares of logarithms."""
        a, c = self.acceptance, self.cycle_us
        expected = 1e6 * a.length / c.expected
        down = math.hypot(math.log(a.length / a.low), math.log(c.high / c.expected))
        up = math.hypot(math.log(a.high / a.length), math.log(c.expected / c.low))
        ceiling = 1e6 * a.high / self.cycle.hbm_ar_us
        return Interval(expected, expected * math.exp(-down), min(ceiling, expected * math.exp(up)))

    @cached_property
    def tps_per_server(self) -> Interval:
        """At `users` requests in flight, prefill included."""
        tokens = self.users * (self.setting.draft_tokens + 1)
        fused = self.setting.fused if tokens <= MANY_TOKENS // 2 or self.stack == "native" else FUSED_FOR_MANY
        many = replace(self.setting, batch=self.users, distinct_experts=None, fused=self.setting.fused & fused)
        crowded = tokens >= MANY_TOKENS and self.stack != "native"
        stack, quantity = ("generic", THROUGHPUT) if crowded else (self.stack, CYCLE)
        found = calibrate.calibrate(self.records.rows(self.gpu), stack, quantity, own=self.name)
        model = tokens_per_s(self.gpu, self.shape, self.draft, many, self.load, self.acceptance.length)
        scale = [found.low, found.factor, found.high]
        low, expected, high = sorted(model * (s if quantity == THROUGHPUT else 1 / s) for s in scale)
        return Interval(expected, low, high)

    @cached_property
    def tps_saturated(self) -> float:
        """Of the server without speculation and with as many requests as fit: how answers are made in bulk."""
        if self.stack == "native":
            return self.tps_per_server.expected
        found = calibrate.calibrate(self.records.rows(self.gpu), "generic", THROUGHPUT)
        return saturated(self.gpu, self.shape, replace(self.setting, fused=FUSED_FOR_MANY), self.load)[0] * found.factor

    @cached_property
    def memory_gib(self) -> dict[str, float]:
        return memory_gib_per_gpu(self.shape, self.draft, replace(self.setting, batch=self.users), self.max_seq_len)


@dataclass(frozen=True)
class Prediction:
    """A case with the names of what it was made from."""

    spec: str
    hardware: str
    case: Case
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What `kilotok predict --json` prints."""
        c, cycle_ = self.case, self.case.cycle
        us = c.cycle_us.to_dict()
        share = cycle_.kernels_us
        rows = [
            {"operator": row.name, "mb": round(row.bytes / 1e6, 3), "kernels": row.kernels,
             "hbm_us": round(row.bytes / cycle_.bytes * cycle_.hbm_us, 2), "us": round(cycle_.operator_us(row), 2),
             "share": round(cycle_.operator_us(row) / share, 4)}
            for row in cycle_.operators
        ]  # fmt: skip
        if cycle_.allreduces:
            spent = cycle_.allreduces * cycle_.allreduce_us
            rows.append({"operator": "allreduce", "mb": 0.0, "kernels": cycle_.allreduces,
                         "hbm_us": 0.0, "us": round(spent, 2), "share": round(spent / share, 4)})  # fmt: skip
        return {
            "spec": self.spec,
            "hardware": {"file": self.hardware, "name": c.gpu.name, "gpus": c.setting.tensor_parallel},
            "cycle_us": {"hbm": round(cycle_.hbm_us, 1), "hbm_ar": round(cycle_.hbm_ar_us, 1),
                         "kernels": round(cycle_.kernels_us, 1), **us},
            "tps_per_user": c.tps_per_user.to_dict(),
            "tps_per_server": {"users": c.users, **c.tps_per_server.to_dict(0)},
            "acceptance": {**c.acceptance.to_dict(), "draft_tokens": c.setting.draft_tokens},
            "memory_gib_per_gpu": {**{name: round(gib, 2) for name, gib in c.memory_gib.items()},
                                   "available": round(c.gpu.memory_gib, 1)},
            "operators": rows,
            "calibration": {"stack": c.stack, "words": c.calibration.words},
            "notes": list(self.notes),
        }  # fmt: skip

    def to_text(self) -> str:
        """Three lines, a table, and where the numbers come from."""
        d, c = self.to_dict(), self.case
        us, user, server, memory = (
            d[name] for name in ("cycle_us", "tps_per_user", "tps_per_server", "memory_gib_per_gpu")
        )
        lines = [
            f"prediction of {self.spec} on {d['hardware']['gpus']} x {c.gpu.name}",
            "",
            f"  cycle       {us['expected']:,.0f} us ({us['low']:,.0f} to {us['high']:,.0f}); floors: "
            f"{us['hbm']:,.0f} bytes, {us['hbm_ar']:,.0f} with the wire",
            f"  one user    {user['expected']:,.0f} tokens/s ({user['low']:,.0f} to {user['high']:,.0f}) "
            f"at {d['acceptance']['length']:.2f} tokens per cycle",
            f"  {server['users']:>4} users  {server['expected']:,.0f} tokens/s for the server "
            f"({server['low']:,.0f} to {server['high']:,.0f}), prefill of {c.load.input_tokens} tokens included",
            f"  memory      {memory['total']:.2f} of {memory['available']:.0f} GiB per GPU",
            "",
            f"  {'operator':<16} {'MB':>9} {'kernels':>8} {'us':>9} {'share':>6}",
        ]
        lines += [
            f"  {row['operator']:<16} {row['mb']:>9.2f} {row['kernels']:>8.0f} {row['us']:>9.1f} "
            f"{100 * row['share']:>5.1f}%"
            for row in d["operators"]
        ]
        lines += ["", f"  calibration {c.stack}: {c.calibration.words}; intervals hold 80%"]
        lines += [f"  acceptance  {c.acceptance.source}"]
        return "\n".join([*lines, *(f"  note        {note}" for note in self.notes)])


def predict(spec: Spec, records: Records | None = None, routing: Path | None = None) -> Prediction:
    """Raises InputError for what is unknown or cannot fit. `routing` is a trace: see `distinct_experts`."""
    records = records or Records()
    name = hardware_of(spec)
    gpu, shape = hardware.load(name, spec.where("hardware")), shape_of(spec, records)
    engine = spec.engine.model_dump()
    draft = draft_shape(spec, shape) if spec.engine.draft_tokens else None
    setting = setting_of(spec, gpu)
    limits.check(gpu, shape, draft, setting, engine, spec.where)
    notes = []
    if routing:
        setting = replace(setting, distinct_experts=distinct_experts(routing, setting.draft_tokens + 1))
        notes.append(f"{setting.distinct_experts:.2f} distinct experts per verify and layer, from {routing}")
    elif shape.experts:
        apart = shape.distinct_experts(setting.draft_tokens + 1)
        notes.append(f"{apart:.2f} distinct experts per verify and layer: tokens taken to route independently")
    if setting.parallel_draft:
        notes.append("one pass of the drafter for all tokens; its acceptance is taken to be the chain's")
    notes += records.machine_notes(gpu)
    latency = spec.validation.latency
    load = Load(INPUT_TOKENS.get(latency.profile, HELD_OUT_TOKENS), latency.max_new_tokens)
    setting = replace(setting, context=load.input_tokens + load.output_tokens / 2)
    metrics, build = records.last_metrics()
    accepted = expect(spec.model.source, setting.draft_tokens, metrics, build)
    case = Case(
        spec.name, gpu, shape, draft, setting, stack_of(spec), load, accepted, spec.engine.max_batch_size,
        spec.engine.max_seq_len, records,
    )  # fmt: skip
    return Prediction(spec.name, name, case, tuple(notes))


def unknown(spec: Spec, records: Records) -> str:
    """Why nothing can be predicted yet, or "": no hardware is named, or the model is not here and not a known one."""
    try:
        hardware_of(spec)
        if not spec.model.source.startswith("file:"):
            shape_of(spec, records)
    except InputError as error:
        return str(error)
    return ""


def hardware_of(spec: Spec) -> str:
    """The spec's own word; the native engine runs on this machine's CPU."""
    if spec.hardware:
        return spec.hardware
    if spec.engine.backend == "native":
        return "cpu"
    raise InputError(
        "no hardware is named", spec.where("hardware"),
        f"add `hardware:` with one of {', '.join(hardware.known())}",
    )  # fmt: skip


def stack_of(spec: Spec) -> str:
    """Whose overhead: the native engine's, that of TensorRT-LLM's hand-tuned path for one user, or any other GPU
    stack's: TensorRT-LLM, vLLM and SGLang as they come lie no further apart than the systems of each."""
    if spec.engine.backend == "native":
        return "native"
    return "min_latency" if spec.engine.options.get("enable_min_latency") else "generic"


def shape_of(spec: Spec, records: Records | None = None) -> Shape:
    """From a `file:` source, from the store's download, or from the known models."""
    source = spec.model.source
    if source.startswith("file:"):
        folder = spec.root / source.removeprefix("file:")
        return _read_shape(folder / "config.json", spec.where("model.source"))
    downloaded = records.download if records else None
    if downloaded and (downloaded / "config.json").is_file():
        return _read_shape(downloaded / "config.json", spec.where("model.source"))
    return known_shape(source.partition("://")[2])


def _read_shape(path: Path, where: str) -> Shape:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"the model's config.json cannot be read: {error}", where, "give a Hugging Face folder"
        ) from error
    return shape_from_config(config, str(path))


def draft_shape(spec: Spec, shape: Shape) -> DraftShape:
    """The head that train_draft makes."""
    d = spec.draft
    ffn = d.intermediate_size or (round(d.ffn_multiplier * shape.hidden) if d.ffn_multiplier else shape.ffn_dense)
    return DraftShape(ffn, d.vocab_size or shape.vocab)


def setting_of(spec: Spec, gpu: Gpu) -> Setting:
    """Parallelism, precision and fused ops as the spec says; one user."""
    engine, recipe = spec.engine, spec.quantize.recipe
    native = engine.backend == "native"
    width = 0.5625 if "nvfp4" in recipe else 1.0 if "fp8" in recipe else 2.0
    return Setting(
        tensor_parallel=engine.tensor_parallel,
        expert_parallel=engine.expert_parallel,
        attention_dp=bool(engine.options.get("enable_attention_dp")),
        draft_tokens=engine.draft_tokens,
        parallel_draft=engine.parallel_draft,
        weight_bytes=width,
        kv_bytes=1.0 if "kv_fp8" in recipe else 2.0,
        accept_us=gpu.small_us if native else Setting.accept_us,
        fused=OPS if native else _fused(spec),
    )


def _fused(spec: Spec) -> frozenset[str]:
    """Plugins that the spec asks for and whose kernel TensorRT-LLM would run at this shape."""
    from engine_plugins.trtllm.kernels import record_kernels

    runs = [kernel.name for kernel in record_kernels(spec) if kernel.runs]
    lives = {plugin for plugin, names in KERNELS.items() if any(run.startswith(names) for run in runs)}
    return frozenset(lives & set(spec.engine.plugins))


def distinct_experts(trace: Path, tokens: int) -> float:
    """Mean distinct experts per layer of `tokens` consecutive tokens; `trace` is JSON: experts[layer][token], each a
    number or a list of numbers."""
    try:
        layers = json.loads(trace.read_text(encoding="utf-8"))["experts"]
        picks: list[list[Any]] = [[one if isinstance(one, list) else [one] for one in layer] for layer in layers]
        counts = [
            len({expert for chosen in layer[start : start + tokens] for expert in chosen})
            for layer in picks
            for start in range(len(layer) - tokens + 1)
        ]
        return sum(counts) / len(counts)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(
            f"no routing trace of at least {tokens} tokens: {error}", str(trace),
            'write {"experts": [[expert of token 0, of token 1, ...] per layer]}',
        ) from error  # fmt: skip


def targets(spec: Spec, prediction: Prediction | Mapping[str, Any]) -> list[str]:
    """Physics' verdict on each gate that asks for a speed of one user."""
    d = prediction.to_dict() if isinstance(prediction, Prediction) else prediction
    length, us = d["acceptance"]["length"], d["cycle_us"]
    said = []
    for gate in spec.validation.gates:
        asked = gate.at_least
        if gate.metric != "latency.tps_per_user.p50" or isinstance(asked, bool) or not isinstance(asked, (int, float)):
            continue
        needs = 1e6 * length / asked
        verdict = "possible" if us["expected"] <= needs else "unlikely" if us["low"] <= needs else "out of reach"
        verdict = verdict if us["hbm_ar"] <= needs else "below the floor: impossible"
        said.append(
            f"{asked:g} tokens/s needs a cycle of {needs / 1000:.2f} ms at acceptance {length:.2f}; the floor is "
            f"{us['hbm_ar'] / 1000:.2f} ms, expected {us['expected'] / 1000:.2f} ms: {verdict}"
        )
    return said
