"""The constants of a CPU's hardware file, fitted to the parts of measured cycles.

One set of constants for all calibration shapes; those held out are only shown. Refuses to touch the file: read the
figures, round them, write them down with their date. Run it: `python -m tasks.predict.measure` and then `python -m
tasks.predict.fit_cpu`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tasks.predict import hardware
from tasks.predict.calibrate import NATIVE, native_cycle
from tasks.predict.cost import Cycle
from tasks.predict.hardware import Gpu
from tasks.predict.shape import shape_from_config

FITTED = ("hbm_tbs", "cache_tbs", "fp8_tflops", "unpack_rows", "unpack_bf16_rows", "t0_us", "attn_us", "attn_tflops",
          "row_us", "small_us", "host_us")  # fmt: skip
# The engine's counters by operator; everything of the draft is one.
PARTS = {"rope+kv": "norms", "accept": "sampling", "host": "caller", "router": "moe", "shared_expert": "moe",
         "routed_experts": "moe"}  # fmt: skip


def parts_of(cycle: Cycle) -> dict[str, float]:
    """Modelled microseconds under the engine's own names."""
    parts: dict[str, float] = {}
    for row in cycle.operators:
        name = "draft" if row.name.startswith("draft") else PARTS.get(row.name, row.name)
        parts[name] = parts.get(name, 0.0) + cycle.operator_us(row)
    return parts


def with_constants(gpu: Gpu, logs: Any) -> Gpu:
    """`gpu` with the fitted constants; BF16 weights are widened to the same multiply-adds as FP8 ones."""
    values: dict[str, Any] = dict(zip(FITTED, map(math.exp, logs), strict=True))
    return replace(gpu, bf16_tflops=values["fp8_tflops"], **values)


def loss(gpu: Gpu, rows: Sequence[Mapping[str, Any]], shapes: Mapping[str, Any]) -> float:
    """Squared log error of the whole and, less, squared errors of the parts as shares of the whole."""
    total = 0.0
    for row in rows:
        if row.get("held_out"):
            continue
        found = parts_of(native_cycle(gpu, shapes[row["shape"]], row))
        measured = row["cycle_us"]
        total += 3 * math.log(sum(found.values()) / measured) ** 2
        total += sum(2 * ((found.get(name, 0.0) - us) / measured) ** 2 for name, us in row["parts_us"].items())
    return total


def main() -> None:
    from scipy.optimize import minimize

    data, gpu = hardware.read_yaml(NATIVE), hardware.load("cpu")
    shapes = {name: shape_from_config(config) for name, config in data["shapes"].items()}
    rows = [{"distinct": data["distinct"], **row} for row in data["rows"]]
    start = [math.log(getattr(gpu, name)) for name in FITTED]
    options = {"maxiter": 2000, "maxfev": 2000}
    best = minimize(lambda x: loss(with_constants(gpu, x), rows, shapes), start, method="Nelder-Mead", options=options)
    fitted = with_constants(gpu, best.x)
    for name in FITTED:
        print(f"{name}: {getattr(fitted, name):.4g}")
    for row in rows:
        modelled = native_cycle(fitted, shapes[row["shape"]], row).kernels_us
        mark = "held out" if row.get("held_out") else ""
        error = 100 * (modelled / row["cycle_us"] - 1)
        name = f"{row['shape']:12} k={row['draft_tokens']} users={row['users']} context={row['context']:4}"
        print(f"{name} {row['cycle_us']:9.1f} us, modelled {error:+5.1f}% {mark}")


if __name__ == "__main__":
    main()
