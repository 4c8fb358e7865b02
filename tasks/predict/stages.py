"""Seconds of each stage by arithmetic: a start, bytes over a disk, multiply-adds over a rate, tokens over the
predicted speed.

Crude on purpose: what a machine really takes is learned from its builds (`records.py`), and these are the ratios'
other side. Refuses to know what is cached; that is the plan's. Run it: `kilotok plan SPEC`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.predict.prediction import Case, draft_shape

if TYPE_CHECKING:
    from specs.schema import Spec

# Interpreter, imports and fixed work, seconds; measured on two cores with the tiny model, whose own work is small.
START_S = {
    "download": 0.5, "quantize": 10.0, "synthesize": 8.0, "train_draft": 8.0, "build_engine": 3.0, "deploy": 0.6,
    "validate": 5.0, "promote": 0.1, "report": 0.6,
}  # fmt: skip
LINK_BYTES_PER_S, DISK_BYTES_PER_S = 0.5e9, 0.7e9  # a hub through hf_xet; a cloud disk, read or written
TRAINING_SHARE = 0.4  # of the sustained rate that torch reaches, forward or backward
PROBLEMS_PER_TASK = 200  # where `validate.accuracy.samples` takes all of a task and nobody has counted it
BASELINE_REQUESTS = 8  # the source model is timed with fewer
USES_DEVICES = ("quantize", "synthesize", "train_draft", "deploy", "validate")


def modelled_seconds(spec: Spec, case: Case, checkpoint_bytes: float = 0.0) -> dict[str, float]:
    """Stage -> seconds if it is built. `checkpoint_bytes` from the lock; else two bytes per parameter."""
    shape, gpus = case.shape, case.setting.tensor_parallel
    source = checkpoint_bytes or 2.0 * shape.total_params
    torch_flops = gpus * case.gpu.flops_per_us(2.0) * 1e6 * TRAINING_SHARE
    calibration, data, training = spec.quantize.calibration, spec.draft.data, spec.draft.training
    served_bytes = shape.total_params * case.setting.weight_bytes
    answers = data.samples * data.max_new_tokens
    head = draft_shape(spec, shape).params(shape)
    train_flops = answers * training.epochs * (6 * head * training.ttt_steps + 2 * shape.active_params)
    trained = train_flops / torch_flops
    if training.max_seconds:
        trained = min(trained, training.max_seconds)
    per_user = case.tps_per_user.expected
    latency, accuracy = spec.validation.latency, spec.validation.accuracy
    problems = len(accuracy.tasks) * (accuracy.samples or PROBLEMS_PER_TASK)
    plain = per_user / case.acceptance.length
    timing = latency.max_new_tokens * (latency.requests / per_user + BASELINE_REQUESTS / plain)
    judging = problems * accuracy.max_new_tokens / case.tps_saturated * 3  # served, and the source at half its speed
    local = spec.model.source.startswith("file:")
    work = {
        "download": source / (DISK_BYTES_PER_S if local else LINK_BYTES_PER_S),
        "quantize": calibration.samples * calibration.sequence_length * 2 * shape.active_params / torch_flops
        + (source + served_bytes) / DISK_BYTES_PER_S,
        "synthesize": answers / case.tps_saturated,
        "train_draft": trained,
        "build_engine": 2 * served_bytes / DISK_BYTES_PER_S if spec.engine.backend == "native" else 0.0,
        "deploy": served_bytes / DISK_BYTES_PER_S if spec.engine.backend == "trtllm" else 0.0,
        "validate": timing + judging,
    }
    return {stage: start + work.get(stage, 0.0) for stage, start in START_S.items()}
