"""The quantize stage in order: refuse, calibrate, share scales, measure, export, reload, write the table.

It refuses bad input before the model is loaded and bad output before the artifact counts.
Run it: `python -m tasks.child JOB.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from specs.errors import InputError
from tasks.job import Job, Progress
from tasks.prompts import Prompt, balanced, chat_token_ids, read_prompts, resolve, template_sha256
from tasks.quantize import calibrate, coverage, detectors, export, reload, table

HELD_BACK = 16  # prompts that set no scale: they measure clipping and compare logits


def build(job: Job, progress: Progress) -> dict[str, float]:
    """FP8 checkpoint of `inputs/download` in `job.out`; returns `quantize.*` metrics."""
    source, spec = job.inputs["download"], job.spec["quantize"]
    config = json.loads((source / "config.json").read_text())
    recipe = calibrate.read_recipe(spec["recipe"], job.root)
    wanted = coverage.expected(config, recipe["quant_cfg"])
    template_sha256(source)  # no template, no calibration: the served prompts would look different
    prompts = calibration_prompts(spec["calibration"], job)
    detectors.check_finite(calibrate.non_finite_tensors(source), "source checkpoint")

    import transformers

    progress(0, 1, "load")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    limit = spec["calibration"].get("sequence_length") or 10**9
    sequences = [token_ids(tokenizer, prompt)[:limit] for prompt in prompts]
    architecture = getattr(transformers, config["architectures"][0])
    model = architecture.from_pretrained(source, dtype=torch.float32).eval()
    held_back, calibration = sequences[:HELD_BACK], sequences[HELD_BACK:]
    routed = calibrate.calibrate(model, recipe, calibration, progress)
    detectors.check_expert_tokens(routed)
    detectors.check_quantizers(calibrate.quantizers(model), wanted)
    groups = coverage.fused_groups(sorted(wanted.weights))
    calibrate.share_scales(model, groups)

    progress.note("measure")
    meter = calibrate.NoiseMeter(model)
    traces = [reload.trace(model, ids) for ids in held_back]
    rows = meter.close()
    detectors.check_scales(rows)
    detectors.check_saturation(rows)
    detectors.check_quantizers([row.name for row in rows], wanted)

    progress.note("export")
    calibrate.snap_weights(model)
    export.export(model, source, job.out, wanted.weights)
    difference = witness(job.out, wanted, groups, held_back, traces)
    frame = table.write_layers(rows, job.out / "layers.parquet")
    weights = frame[frame.kind == "weight"]
    return {
        "quantize.tensors": float(len(weights)),
        "quantize.sqnr_db.min": float(frame.sqnr_db.min()),
        "quantize.sqnr_db.weights_mean": float(weights.sqnr_db.mean()),
        "quantize.saturation_share.max": float(frame.saturation_share.max()),
        "quantize.reload_difference": difference,
        "quantize.calibration_tokens": float(sum(map(len, calibration))),
        "quantize.expert_tokens.min": float(min((min(counts) for counts in routed.values()), default=0)),
    }


def witness(
    out: Path,
    wanted: coverage.Coverage,
    groups: list[tuple[str, ...]],
    sequences: list[list[int]],
    traces: list[list[torch.Tensor]],
) -> float:
    """Every check on the files themselves; returns the median relative difference of the reloaded logits."""
    quantized, scales, names = export.exported_tables(out)
    detectors.check_excluded(quantized, wanted)
    detectors.check_kv_scales(names, wanted)
    detectors.check_input_scales(names, wanted)
    detectors.check_shared_scales(scales, groups)
    detectors.check_finite(calibrate.non_finite_tensors(out), "export")
    again = reload.reload(out)
    layers: dict[str, list[float]] = {name: [] for name in reload.decoder_layers(again)}
    logits = []
    for ids, theirs in zip(sequences, traces, strict=True):
        forced = reload.trace(again, ids, theirs)
        for differences, one, other in zip(layers.values(), forced, theirs, strict=False):
            differences.append(reload.relative_difference(one, other))
        logits.append(reload.relative_difference(reload.trace(again, ids)[-1], theirs[-1]))
    detectors.check_reload(layers, logits, out.name)
    return sorted(logits)[len(logits) // 2]


def calibration_prompts(spec: dict[str, Any], job: Job) -> list[Prompt]:
    """The calibration set, balanced over domains; one shorter than asked is refused."""
    path = resolve(spec["dataset"], job)
    prompts = read_prompts(path)
    samples = int(spec["samples"])
    if len(prompts) < samples:
        raise InputError(
            f"the calibration set has {len(prompts)} prompts, {samples} are asked for",
            str(path),
            "add prompts or lower quantize.calibration.samples",
        )
    if samples <= HELD_BACK:
        raise InputError(
            f"{samples} calibration samples leave nothing to calibrate on: {HELD_BACK} of them check the export",
            "quantize.calibration.samples",
            f"ask for more than {HELD_BACK}; 128 is a good start",
        )
    return balanced(prompts, samples, path)


def token_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The prompt as served; its answer too when the file has one, since answers are what decoding multiplies."""
    ids = chat_token_ids(tokenizer, prompt.prompt)
    return ids + tokenizer.encode(prompt.answer, add_special_tokens=False) if prompt.answer else ids
