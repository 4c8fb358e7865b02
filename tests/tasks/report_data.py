"""Realistic artifacts of every earlier stage for the report's tests, from a seed: a tiny Llama 4, a good night.

Refuses to be in the package: figures here are made up. Draw them with `python -m tests.tasks.report_data OUT`.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.job import Job
from tasks.validate.statistics import compare

DOMAINS = {
    "code": (0.86, 0.80, 0.74),
    "math": (0.79, 0.71, 0.66),
    "facts": (0.66, 0.55, 0.47),
    "extract": (0.90, 0.86, 0.81),
}
CYCLE_US = {
    "draft": 1180.0,
    "qkv": 620.0,
    "attention": 930.0,
    "o": 410.0,
    "dense_mlp": 1240.0,
    "router": 70.0,
    "shared_expert": 690.0,
    "routed_experts": 1510.0,
    "norms": 210.0,
    "lm_head": 480.0,
    "sampling": 260.0,
    "host": 420.0,
}
BUILD, LAST_BUILD = "20261124-020000-4711", "20261123-020000-3012"


def make_job(
    root: Path, *, name: str = "tiny-llama4-cpu", seed: int = 7, last_good: bool = True, layers: int = 8
) -> Job:
    """A job for `tasks.report.build` with everything present."""
    rng = random.Random(seed)
    folder = {
        stage: root / stage / ("k" * 8)
        for stage in ("quantize", "synthesize", "train_draft", "build_engine", "deploy", "validate")
    }
    for path in folder.values():
        path.mkdir(parents=True, exist_ok=True)
    metrics = _metrics()
    _quantize(folder["quantize"], rng, layers)
    _draft(folder["train_draft"], folder["synthesize"], rng)
    _validate(folder["validate"], rng, metrics)
    _manifests(root, folder, name)
    receipts = _receipts(metrics)
    spec = {
        "name": name,
        "engine": {
            "backend": "native",
            "tensor_parallel": 1,
            "draft_tokens": 3,
            "plugins": ["qkv_attn_scaling", "fc13_swiglu", "moe_top1", "router"],
        },
        "draft": {"method": "eagle3"},
        "validate": {
            "accuracy": {"margin": 0.03, "alpha": 0.05, "power": 0.8},
            "latency": {"profile": "artificial_analysis_1k"},
        },
    }
    prediction = {
        "metrics": {
            "latency.tps_per_user.p50": {"predicted": 340, "low": 270, "high": 420},
            "cycle.us": {"predicted": 7600, "low": 6200, "high": 9400},
        },
        "stages": {"train_draft": 130, "validate": 60},
        "devices": 2,
        "holds_devices": ["train_draft", "validate"],
        "price": {"per_device_hour": 4.5, "currency": "USD"},
    }
    last = _last_good(name, metrics, receipts) if last_good else None
    extra = {"build": BUILD, "receipts": receipts, "last_good": last, "prediction": prediction}
    out = root / "report"
    out.mkdir(exist_ok=True)
    return Job("report", spec, root, folder, out, extra=extra)


def _lengths() -> dict[str, float]:
    return {domain: 1 + a + a * b + a * b * c for domain, (a, b, c) in DOMAINS.items()}


def _metrics() -> dict[str, float]:
    lengths = _lengths()
    length, cycle = sum(lengths.values()) / 4, sum(CYCLE_US.values())
    metrics = {
        "latency.tps_per_user.p50": 0.965e6 * length / cycle,
        "latency.ttft_ms.p50": 31.4,
        "latency.itl_ms.p50": 2.91,
        "latency.e2e_tps.p50": 301.0,
        "acceptance.length": length,
        "baseline.tps_per_user.p50": 171.2,
        "cycle.us": cycle,
        "client.error_percent": 0.31,
    }
    metrics |= {f"acceptance.length.{domain}": value for domain, value in lengths.items()}
    metrics |= {f"acceptance.position.{at + 1}": sum(rates[at] for rates in DOMAINS.values()) / 4 for at in range(3)}
    return metrics


def _quantize(folder: Path, rng: random.Random, layers: int) -> None:
    rows = []
    for layer in range(layers):
        for tensor in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.o_proj",
            "feed_forward.down_proj",
            "feed_forward.experts.gate_up_proj",
        ):
            for kind, level in (("weight", 31.5), ("input", 27.5)):
                dip = 5.0 if kind == "input" and tensor.endswith("down_proj") and layer in (1, layers - 2) else 0.0
                rows.append(
                    (
                        f"model.layers.{layer}.{tensor}",
                        kind,
                        rng.uniform(0.0008, 0.004),
                        rng.uniform(0.4, 1.9),
                        level + rng.gauss(0, 0.5) - dip,
                        rng.choice([0, 0, 0, 0, 2.1e-5]),
                    )
                )
        for tensor in ("k_cache", "v_cache"):
            rows.append(
                (
                    f"model.layers.{layer}.self_attn.{tensor}",
                    "kv",
                    rng.uniform(0.01, 0.03),
                    rng.uniform(4, 12),
                    29 + rng.gauss(0, 0.7),
                    0.0,
                )
            )
    _table(folder / "layers.parquet", ("name", "kind", "scale", "amax", "sqnr_db", "saturation_share"), rows)


def _draft(train: Path, synth: Path, rng: random.Random) -> None:
    steps = [(step, 5.4 * math.exp(-step / 90) + 0.78 + rng.gauss(0, 0.05)) for step in range(1, 421, 4)]
    _table(train / "curve.parquet", ("step", "loss"), steps)
    _json(train / "summary.json", {"steps": 420, "parameters": 1_310_000, "seconds": 118.2})
    _json(synth / "summary.json", {"answers": 1600, "mean_answer_tokens": 58.1, "chat_template_sha256": "ab" * 32})


def _validate(folder: Path, rng: random.Random, metrics: dict[str, float]) -> None:
    requests = _requests(rng, metrics["latency.tps_per_user.p50"])
    columns = "id domain profile user sent_s status output_tokens ttft_ms duration_ms tps_user e2e_tps itl_ms_p50 ok"
    _table(folder / "requests.parquet", tuple(columns.split()), requests)
    alone = [row for row in requests if row[2] == "one_in_flight" and row[12]]
    metrics["latency.tps_per_user.p50"] = statistics.median(row[9] for row in alone)
    metrics["latency.ttft_ms.p50"] = statistics.median(row[7] for row in alone)
    judged, overall = _problems(folder, rng, metrics)
    accepted = []
    for domain, rates in {**DOMAINS, "all": tuple(metrics[f"acceptance.position.{at}"] for at in (1, 2, 3))}.items():
        reached = 2600 if domain == "all" else 650
        for position, rate in enumerate(rates, 1):
            accepted.append((domain, position, reached, round(reached * rate), rate))
            reached = round(reached * rate)
    _table(folder / "acceptance.parquet", ("domain", "position", "drafted", "accepted", "rate"), accepted)
    _json(folder / "golden.json", {"code": [0.85, 0.79, 0.75], "facts": [0.72, 0.63, 0.55]})
    _json(folder / "waterfall.json", {"cycle_us": metrics["cycle.us"], "parts": CYCLE_US})
    gates = _gates(metrics)
    _json(folder / "gates.json", gates)
    _json(folder / "summary.json", {**metrics, "verdict": "PASS"})
    verdict = {"verdict": "PASS", "gates": gates, "accuracy": judged, "overall": overall, "warnings": []}
    _json(folder / "verdict.json", verdict)


def _requests(rng: random.Random, alone: float) -> list[tuple[Any, ...]]:
    rows, start = [], 0.0
    for users in (1, 2, 4, 8):
        profile, speed_here = "one_in_flight" if users == 1 else f"parallel_{users}", alone / (1 + 0.42 * (users - 1))
        for index in range(24 if users == 1 else 8 * users):
            ttft, tokens = rng.lognormvariate(math.log(31 * users**0.5), 0.16), rng.randint(40, 120)
            speed, good = speed_here * rng.lognormvariate(0, 0.11), index != 17 or users != 1
            took, sent = ttft + 1e3 * tokens / speed, start + index // users * (0.032 * users**0.5 + 80 / speed_here)
            who = (f"r{users}-{index}", list(DOMAINS)[index % 4], profile, index % users, sent, 200)
            rows.append((*who, tokens, ttft, took, speed, 1e3 * tokens / took, 1e3 / speed, good))
        start += 1000
    return rows


def _problems(folder: Path, rng: random.Random, metrics: dict[str, float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Raw answers of both sides, and the verdicts on them by task and over all."""
    rows: list[tuple[Any, ...]] = []
    judged, everything = {}, []
    for task, level in {"code": 0.91, "math": 0.86, "facts": 0.94, "extract": 0.97}.items():
        answers = []
        for index in range(250):
            source = rng.random() < level
            served = source if rng.random() < (0.93 if task == "math" else 0.985) else rng.random() < level
            answers.append((source, served))
            for side, correct in (("source", source), ("served", served)):
                rows.append((task, f"{task}-{index}", side, 0, "Answer: x", "x", float(correct)))
        judged[task] = _judge(task, answers, metrics)
        everything += answers
    _table(folder / "problems.parquet", ("task", "id", "side", "sample", "answer", "target", "correct"), rows)
    return judged, _judge("", everything, metrics)


def _judge(task: str, answers: list[Any], metrics: dict[str, float]) -> dict[str, Any]:
    """The paired test that validate runs, and the metrics it writes."""
    source, served = (np.array([[float(pair[side])] for pair in answers]) for side in (0, 1))
    result = compare(source, served, margin=0.03, alpha=0.05, power=0.8)
    prefix = f"accuracy.{task}." if task else "accuracy."
    values = {
        "source": result.source,
        "served": result.served,
        "difference": result.difference,
        "low": result.lower,
        "high": result.upper,
        "problems": float(result.problems),
    }
    metrics.update({prefix + name: value for name, value in values.items()})
    return {"verdict": result.verdict, "samples_needed": result.samples_needed}


def _gates(metrics: dict[str, float]) -> list[dict[str, Any]]:
    asked = (
        ("latency.tps_per_user.p50", "at_least", 250, "250"),
        ("latency.tps_per_user.p50", "at_least", 1.5 * 171.2, "1.5 of baseline"),
        ("latency.ttft_ms.p50", "at_most", 60, "60"),
        ("acceptance.length", "at_least", 2.2, "2.2"),
        ("acceptance.length.facts", "at_least", 1.9, "1.9"),
        ("accuracy.difference", "at_least", -0.03, "-0.03"),
        ("client.error_percent", "at_most", 1, "1"),
    )
    return [
        {
            "metric": name,
            "op": way,
            "measured": metrics[name],
            "required": bound,
            "asked": words,
            "unit": "",
            "verdict": "PASS",
            "reason": "holds",
        }
        for name, way, bound, words in asked
    ]


def _receipts(metrics: dict[str, float]) -> list[dict[str, Any]]:
    rows = (
        ("download", "cached", 0.2, 14.2e6, "unchanged"),
        ("quantize", "cached", 0.1, 8.1e6, "unchanged"),
        ("synthesize", "cached", 0.1, 1.4e6, "unchanged"),
        ("train_draft", "built", 121.6, 3.1e6, "rebuild, draft.training.epochs 2 -> 3"),
        ("build_engine", "built", 9.8, 9.9e6, "rebuild, train_draft changed (1f0c2b7e -> 90aa31d2)"),
        ("deploy", "built", 3.1, 4096, "rebuild, build_engine changed (77b0c1d9 -> 02c4e51f)"),
        ("validate", "built", 71.4, 412_000, "rebuild, build_engine changed (77b0c1d9 -> 02c4e51f)"),
        ("promote", "built", 0.3, 700, "rebuild, validate changed"),
    )
    return [
        {
            "stage": stage,
            "key": _hex(stage, state),
            "state": state,
            "uri": f"store/{stage}",
            "digest": _hex(stage, "digest"),
            "size_bytes": int(size),
            "seconds": took,
            "reason": why,
            "metrics": dict(metrics) if stage == "validate" else {},
        }
        for stage, state, took, size, why in rows
    ]


def _last_good(name: str, metrics: dict[str, float], receipts: list[dict[str, Any]]) -> dict[str, Any]:
    before = {key: value for key, value in metrics.items() if not key.startswith("accuracy")}
    before |= {
        "latency.tps_per_user.p50": 0.94 * metrics["latency.tps_per_user.p50"],
        "acceptance.length": 0.938 * metrics["acceptance.length"],
        "acceptance.length.facts": 1.05 * metrics["acceptance.length.facts"],
        "latency.ttft_ms.p50": 30.1,
    }
    stages = [{**row, "key": row["key"] if row["state"] == "cached" else "old-" + row["stage"]} for row in receipts]
    return {
        "build": LAST_BUILD,
        "spec": name,
        "started": "2026-11-23T02:00:00+00:00",
        "stages": stages,
        "metrics": before,
        "verdict": "PASS",
    }


def _manifests(root: Path, folder: dict[str, Path], name: str) -> None:
    provenance = {
        "git": {"commit": "29bfa38c11de0a5e", "dirty": False},
        "argv": ["kilotok", "run", f"specs/{name}.yaml"],
        "python": "3.11.7",
        "packages": {
            "nvidia-modelopt": "0.47.0",
            "torch": "2.13.0",
            "transformers": "5.14.1",
            "numpy": "2.4.6",
            "prefect": "3.8.9",
            "lm-eval": "0.4.13",
        },
        "machine": {
            "cpu": "AMD EPYC 7763 x 2",
            "gpu": "none",
            "cpu_isa": "x86_64 avx avx2 fma f16c",
            "compiler": "g++ 12",
            "kernel": "6.8.0",
        },
        "spec": {"model": {"source": "file:specs/models/tiny-llama4"}},
    }
    for stage, path in folder.items():
        new = {
            "stage": stage,
            "components": {"spec.draft.training.epochs": "3", "package.torch": "2.13.0"},
            "provenance": provenance,
            "inputs": {"quantize": "", "train_draft": ""} if stage == "build_engine" else {},
            "created": "2026-11-24T02:03:31+00:00",
        }
        old = {**new, "components": {"spec.draft.training.epochs": "2", "package.torch": "2.13.0"}}
        _json(path / "manifest.json", new)
        if stage == "train_draft":
            (root / stage / f"old-{stage}").mkdir(exist_ok=True)
            _json(root / stage / f"old-{stage}" / "manifest.json", old)


def _hex(*words: str) -> str:
    return f"{random.Random('/'.join(words)).getrandbits(256):064x}"


def _json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data))


def _table(path: Path, columns: tuple[str, ...], rows: list[Any]) -> None:
    pq.write_table(pa.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in rows]), path)


if __name__ == "__main__":
    from tasks.job import Progress
    from tasks.report import build

    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    print(build(make_job(target), Progress()), target / "report" / "index.html")
