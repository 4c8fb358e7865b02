"""The quantize stage in order: refuse, calibrate, share scales, measure, convert, reload, write the table.

It refuses bad input before the model is loaded and bad output before the artifact counts. What calibration found is
kept in the scratch directory: a killed build goes on at the batch or the shard it had reached.
Run it: `python -m tasks.child JOB.json`.
"""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from specs.errors import InputError
from tasks.job import Job, Progress
from tasks.prompts import Prompt, balanced, chat_token_ids, read_prompts, resolve, template_sha256
from tasks.quantize import calibrate, convert, coverage, detectors, export, measure, reload, sensitivity, table
from tasks.quantize.detectors import TensorRow

HELD_BACK = 16  # prompts that set no scale: they measure clipping and compare logits
WITNESS_TOKENS = 128  # of each of them: at full size the traces are 4 GB


@dataclass
class Calibrated:
    """What calibration leaves behind; `traces` are the outputs of every layer and the logits on the held-back ids."""

    kept: list[str]  # blocks in BF16
    scales: dict[str, float]
    rows: list[TensorRow]
    described: dict[str, Any]
    metrics: dict[str, float]
    precise: bool  # traced in FP32
    ids_BT: torch.Tensor
    traces: list[torch.Tensor]

    def save(self, path: Path) -> None:
        """Tensors first: the JSON says that all is there."""
        tensors = {str(i): trace.contiguous() for i, trace in enumerate([self.ids_BT, *self.traces])}
        save_file(tensors, path.with_suffix(".safetensors"))
        record = {name: getattr(self, name) for name in ("kept", "scales", "described", "metrics", "precise")}
        part = path.with_suffix(".part")
        part.write_text(json.dumps({**record, "rows": [asdict(row) for row in self.rows]}))
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Calibrated | None:
        """What `save` wrote, or None."""
        if not path.is_file():
            return None
        record = json.loads(path.read_text())
        record["rows"] = [TensorRow(**row) for row in record["rows"]]
        tensors = load_file(path.with_suffix(".safetensors"))
        ids_BT, *traces = [tensors[str(i)] for i in range(len(tensors))]
        return cls(**record, ids_BT=ids_BT, traces=traces)


def build(job: Job, progress: Progress) -> dict[str, float]:
    """Quantized checkpoint of `inputs/download` in `job.out`; returns `quantize.*` metrics."""
    source, spec = job.inputs["download"], job.spec["quantize"]
    config = json.loads((source / "config.json").read_text())
    recipe = calibrate.read_recipe(spec["recipe"], job.root)
    streamed = coverage.formats(recipe["quant_cfg"]) == {"FP8"}
    wanted = coverage.expected(config, recipe["quant_cfg"])
    refuse_quantized(source)
    template_sha256(source)  # no template, no calibration: the served prompts would look different
    prompts = calibration_prompts(spec["calibration"], job)
    rename = functools.partial(coverage.exported_name, prefixes=coverage.newer_names(config))

    record = job.scratch / "calibration.json"
    found = Calibrated.load(record)
    if found is None:
        convert.scan(source, progress, rename)
        model = calibrate.load_model(source, config, job.scratch / "offload")
        found = calibrated(model, job, recipe, wanted, prompts, progress)
        if streamed:
            found.save(record)
        else:
            progress.note("export")
            export.export(model, source, job.out, config, wanted.without(found.kept).weights)
        del model
        gc.collect()
    wanted = wanted.without(found.kept)
    if streamed:
        found.rows += convert.convert(source, job.out, found.scales, job.scratch / "shards", progress, rename)
    export.write_configs(source, job.out, found.described)
    detectors.check_scales(found.rows)
    detectors.check_saturation(found.rows)
    detectors.check_quantizers([row.name for row in found.rows], wanted)
    progress.note("reload")
    groups = coverage.fused_groups(sorted(wanted.weights))
    difference = witness(job.out, wanted, groups, found.ids_BT, found.traces, found.precise)
    return {**metrics(table.write_layers(found.rows, job.out / "layers.parquet")), **found.metrics,
            "quantize.reload_difference": difference}  # fmt: skip


def calibrated(
    model: Any, job: Job, recipe: dict[str, Any], wanted: coverage.Coverage, prompts: list[Prompt], progress: Progress
) -> Calibrated:
    """Calibrate `model` in place and read off its scales, noise and traces."""
    import transformers

    spec = job.spec["quantize"]["calibration"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.inputs["download"])
    limit = spec.get("sequence_length") or 10**9
    sequences = [token_ids(tokenizer, prompt)[:limit] for prompt in prompts]
    held_back, calibration = sequences[:HELD_BACK], sequences[HELD_BACK:]
    routed = calibrate.calibrate(
        model, recipe, calibration, spec.get("batch_size", 8), progress, job.scratch / "amax.safetensors"
    )
    detectors.check_expert_tokens(routed)
    quantizers = calibrate.quantizers(model)
    detectors.check_quantizers(quantizers, wanted)
    calibrate.share_scales(model, coverage.fused_groups(sorted(wanted.weights)))
    ids_BT = reload.one_length(held_back, WITNESS_TOKENS)
    ids = ids_BT.to(calibrate.first_device(model))
    kept, left = sensitivity.keep(model, quantizers, ids, job.spec["quantize"].get("max_divergence"), progress)
    quantizers = calibrate.quantizers(model)

    progress.note("measure")
    streamed = coverage.formats(recipe["quant_cfg"]) == {"FP8"}
    if streamed:
        calibrate.snap_weights(model, quantizers)
    metered = {n: q for n, q in quantizers.items() if not (streamed and n.endswith("weight_quantizer"))}
    meter = measure.NoiseMeter(metered)  # a streamed weight is measured while it is converted
    traces = reload.trace(model, ids)
    return Calibrated(
        kept=kept,
        scales=calibrate.exported_scales(quantizers) if streamed else {},
        rows=meter.close(),
        described=export.quantization_config(model),
        metrics={
            "quantize.divergence": left,
            "quantize.blocks_kept": float(len(kept)),
            "quantize.calibration_tokens": float(sum(map(len, calibration))),
            "quantize.expert_tokens.min": float(min((min(counts) for counts in routed.values()), default=0)),
        },
        precise=traces[0].dtype == torch.float32,
        ids_BT=ids_BT,
        traces=traces,
    )


def witness(
    out: Path,
    wanted: coverage.Coverage,
    groups: list[tuple[str, ...]],
    ids_BT: torch.Tensor,
    traces: list[torch.Tensor],
    precise: bool = True,
) -> float:
    """Every check on the files themselves; returns the median relative difference of the reloaded logits."""
    quantized, scales, names = export.exported_tables(out)
    detectors.check_excluded(quantized, wanted)
    detectors.check_kv_scales(names, wanted)
    detectors.check_input_scales(names, wanted)
    detectors.check_shared_scales(scales, groups)
    convert.scan(out, Progress())
    layers, logits = reload.compare(reload.reload(out), ids_BT, traces)
    detectors.check_reload(layers, logits, out.name, precise)
    return sorted(logits)[len(logits) // 2]


def metrics(frame: Any) -> Mapping[str, float]:
    """The table in four numbers."""
    weights = frame[frame.kind == "weight"]
    return {
        "quantize.tensors": float(len(weights)),
        "quantize.sqnr_db.min": float(frame.sqnr_db.min()),
        "quantize.sqnr_db.weights_mean": float(weights.sqnr_db.mean()),
        "quantize.saturation_share.max": float(frame.saturation_share.max()),
    }


def refuse_quantized(source: Path) -> None:
    """A checkpoint may hold FP8 or packed integers without saying so in config.json."""
    quantized, _, _ = export.exported_tables(source)
    if quantized:
        raise InputError(
            f"the checkpoint is already quantized: {len(quantized)} tensors are not floating point of 16 bits or more",
            sorted(quantized)[0],
            "point model.source at the BF16 checkpoint",
        )


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
