"""Where the microseconds go and what each lever is worth: the same case with one thing changed.

Refuses to promise: a lever says what the arithmetic gains, with the stack's overhead kept as it is.
Run it: `kilotok explain SPEC [--plot FILE.html]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tasks.predict.acceptance import expect
from tasks.predict.prediction import Case, Prediction

Change = Callable[[Case], Case]
MOST_DRAFTS = 15
BAR = 40  # characters of the longest bar
PARTS = {"draft": "draft", "accept": "sampling"}  # everything else is verify


@dataclass(frozen=True)
class Lever:
    """One change: its cycle and speed; `gain` is relative to the case as it is."""

    name: str
    cycle_us: float
    tps_per_user: float
    gain: float


def _gpu(**changes: Any) -> Change:
    return lambda case: replace(case, gpu=replace(case.gpu, **changes))


def _setting(**changes: Any) -> Change:
    return lambda case: replace(case, setting=replace(case.setting, **changes))


def _draft(**changes: Any) -> Change:
    return lambda case: replace(case, draft=replace(case.draft, **changes)) if case.draft else case


def _both(*changes: Change) -> Change:
    def apply(case: Case) -> Case:
        for change in changes:
            case = change(case)
        return case

    return apply


def _candidates(case: Case) -> list[tuple[str, Change]]:
    gpu = case.gpu
    faster = _gpu(t0_us=min(gpu.t0_us, 1.0), small_us=min(gpu.small_us, 1.0), attn_us=min(gpu.attn_us, 2.5))
    found: list[tuple[str, Change]] = []
    if case.cycle.allreduces:
        found += [
            (f"all-reduce {gpu.ar_us:g} -> 5 us", _gpu(ar_us=5.0, ar_unfused_us=5.0)),
            (f"all-reduce {gpu.ar_us:g} -> 3 us", _gpu(ar_us=3.0, ar_unfused_us=3.0)),
            ("all-reduce not fused with RMSNorm", _setting(fused=case.setting.fused - {"allreduce_rmsnorm"})),
        ]
    if gpu.t0_us > 1:
        found.append((f"kernel fixed cost {gpu.t0_us:g} -> 1 us", faster))
        if case.cycle.allreduces:
            found.append(("both: all-reduce 5 us, kernels 1 us", _both(faster, _gpu(ar_us=5.0, ar_unfused_us=5.0))))
    else:
        found.append((f"kernel fixed cost {gpu.t0_us:g} us halved", _gpu(t0_us=gpu.t0_us / 2)))
    if case.setting.weight_bytes > 0.5625:
        found.append(("NVFP4 weights (0.5625 bytes)", _setting(weight_bytes=0.5625)))
    found.append(("FP8 lm_head", _setting(head_bytes=1.0)))
    if case.draft:
        if case.draft.vocab > 32000:
            found.append(("32k draft vocabulary", _draft(vocab=32000)))
        found += [
            ("FP8 draft head", _draft(bytes_per_weight=1.0)),
            ("parallel drafter: one pass for all drafts", _setting(parallel_draft=True)),
        ]
    if case.shape.experts:
        found.append(("all tokens of a pass on one expert", _setting(distinct_experts=float(case.shape.top_k))))
    return found


def levers(case: Case) -> list[Lever]:
    """The case as it is, then each lever, the strongest first. The stack's factor stays, so gains are ratios of
    cycles."""
    factor, base = case.calibration.factor, case.cycle.kernels_us

    def lever(name: str, changed: Case) -> Lever:
        us = changed.cycle.kernels_us * factor
        return Lever(
            name, round(us, 1), round(1e6 * case.acceptance.length / us, 1), base / changed.cycle.kernels_us - 1
        )

    changed = [lever(name, change(case)) for name, change in _candidates(case)]
    return [lever("as it is", case), *sorted(changed, key=lambda one: -one.gain)]


def draft_lengths(prediction: Prediction, model: str) -> list[dict[str, float]]:
    """Cycle and speed for 0 to 15 drafts, as a chain and in one pass, with the acceptance expected of each."""
    case, rows = prediction.case, []
    metrics, build = case.records.last_metrics()
    head = case.draft
    for k in range(MOST_DRAFTS + 1 if head else 1):
        length = expect(model, k, metrics, build).length
        row: dict[str, float] = {"draft_tokens": k, "acceptance": round(length, 2)}
        for name, parallel in (("chain", False), ("parallel", True)):
            setting = replace(case.setting, draft_tokens=k, parallel_draft=parallel)
            at = replace(case, setting=setting, draft=head if k else None)
            us = at.cycle.kernels_us * case.calibration.factor
            row |= {f"{name}_us": round(us, 1), f"{name}_tps": round(1e6 * length / us, 1)}
        rows.append(row)
    return rows


def explain(prediction: Prediction, model: str) -> dict[str, Any]:
    """{"prediction", "levers", "draft_lengths"}, ready for JSON."""
    return {
        "prediction": prediction.to_dict(),
        "levers": [vars(lever) | {"gain": round(lever.gain, 4)} for lever in levers(prediction.case)],
        "draft_lengths": draft_lengths(prediction, model),
    }


def to_text(found: dict[str, Any]) -> str:
    """Operators as bars, levers and draft lengths as tables."""
    rows = found["prediction"]["operators"]
    longest = max(row["us"] for row in rows)
    hardware, spec = found["prediction"]["hardware"], found["prediction"]["spec"]
    lines = [
        f"where the microseconds of {spec} go, {hardware['gpus']} x {hardware['name']}, without the stack's overhead"
    ]
    lines += ["", f"  {'operator':<16} {'us':>9}  {'bytes at full speed, then everything else':<{BAR}}"]
    for row in rows:
        filled, floor = (round(BAR * value / longest) for value in (row["us"], min(row["hbm_us"], row["us"])))
        lines.append(f"  {row['operator']:<16} {row['us']:>9.1f}  {'█' * floor}{'░' * (filled - floor)}")
    width = max(len(lever["name"]) for lever in found["levers"]) + 2
    lines += ["", f"  {'lever':<{width}} {'cycle us':>9} {'tokens/s':>9} {'gain':>7}"]
    for lever in found["levers"]:
        figures = f"{lever['cycle_us']:>9,.0f} {lever['tps_per_user']:>9,.0f} {100 * lever['gain']:>+6.1f}%"
        lines.append(f"  {lever['name']:<{width}} {figures}")
    lines += [
        "",
        f"  {'drafts':>6} {'acceptance':>10} {'chain us':>9} {'tokens/s':>9} {'one pass us':>11} {'tokens/s':>9}",
    ]
    lines += [
        f"  {row['draft_tokens']:>6} {row['acceptance']:>10.2f} {row['chain_us']:>9,.0f} {row['chain_tps']:>9,.0f} "
        f"{row['parallel_us']:>11,.0f} {row['parallel_tps']:>9,.0f}"
        for row in found["draft_lengths"]
    ]
    return "\n".join(lines)


def waterfall(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `tasks.report.plots.waterfall` draws."""
    parts = [
        {
            "name": row["operator"].replace("_", " "),
            "group": next((group for start, group in PARTS.items() if row["operator"].startswith(start)), "verify"),
            "us": row["us"],
        }
        for row in found["prediction"]["operators"]
        if row["us"] > 0
    ]
    return {"total_us": sum(part["us"] for part in parts), "parts": parts}
