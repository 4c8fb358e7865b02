"""Everything said about a build before it runs: speed, memory, seconds and money per stage; and afterwards kept
beside what came.

Refuses what cannot run; what cannot be predicted is said in words and stops nothing.
Run it: `kilotok plan SPEC`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tasks.predict import calibrate, limits
from tasks.predict.calibrate import CYCLE, SECONDS
from tasks.predict.prediction import Case, predict, targets, unknown
from tasks.predict.records import Records, model_of
from tasks.predict.stages import USES_DEVICES, modelled_seconds
from tasks.store import Store

if TYPE_CHECKING:
    from specs.schema import Spec


def forecast(spec: Spec, store: Store, checkpoint_bytes: float = 0.0) -> dict[str, Any]:
    """{"metrics", "stages", "modelled", "prediction", "targets", ...}; {"unknown": why} when nothing can be said.

    Raises InputError for hardware nobody knows, for what cannot fit it and for what the engine does not serve.
    """
    limits.check_engine(spec)
    records = Records.read(store, spec.name)
    if why := unknown(spec, records):
        return {"unknown": why}
    prediction = predict(spec, records)
    case = prediction.case
    seconds = modelled_seconds(spec, case, checkpoint_bytes)
    stages = {stage: _seconds(case, stage, value) for stage, value in seconds.items()}
    return {
        "stack": case.stack,
        "model": model_of(case.gpu),
        "modelled": {CYCLE: case.cycle.kernels_us, **{f"{SECONDS}.{stage}": value for stage, value in seconds.items()}},
        "metrics": {
            "latency.tps_per_user.p50": _triple(case.tps_per_user.to_dict()),
            "cycle.us": _triple(case.cycle_us.to_dict()),
            "acceptance.length": {
                "predicted": case.acceptance.length, "low": case.acceptance.low, "high": case.acceptance.high
            },
        },
        "stages": stages,
        "devices": case.setting.tensor_parallel,
        "holds_devices": list(USES_DEVICES),
        "price": {"per_device_hour": case.gpu.price_per_device_hour, "currency": case.gpu.currency},
        "prediction": prediction.to_dict(),
        "targets": targets(spec, prediction),
    }  # fmt: skip


def _seconds(case: Case, stage: str, modelled: float) -> dict[str, float]:
    found = calibrate.calibrate(case.records.rows(case.gpu), case.stack, f"{SECONDS}.{stage}", own=case.name)
    low, expected, high = (round(modelled * scale, 2) for scale in (found.low, found.factor, found.high))
    return {"predicted": expected, "low": low, "high": high}


def _triple(interval: Mapping[str, float]) -> dict[str, float]:
    return {"predicted": interval["expected"], "low": interval["low"], "high": interval["high"]}


def spending(forecast: Mapping[str, Any], stages: Iterable[str]) -> dict[str, Any]:
    """Seconds, device-hours and money of the stages that will be built."""
    built = [stage for stage in stages if stage in forecast["stages"]]
    total = sum(forecast["stages"][stage]["predicted"] for stage in built)
    held = sum(forecast["stages"][stage]["predicted"] for stage in built if stage in USES_DEVICES)
    hours = held * forecast["devices"] / 3600
    price = forecast["price"]["per_device_hour"]
    money = None if price is None else {"value": round(hours * price, 2), "currency": forecast["price"]["currency"]}
    return {"seconds": round(total, 1), "device_hours": round(hours, 4), "cost": money}
