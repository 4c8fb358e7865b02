"""The server's counters as Prometheus text.

It refuses to measure: it prints what the scheduler and the engine have counted.

Run it: `curl http://127.0.0.1:8000/metrics` against a running server.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine_plugins.native.admission import Admission
from engine_plugins.native.scheduler import Scheduler

Samples = Iterable[tuple[str, float]]  # label text such as {position="1"} or "", and the value


def _family(name: str, kind: str, text: str, samples: Samples) -> str:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    lines += [f"{name}{labels} {value:.9g}" for labels, value in samples]
    return "\n".join(lines)


def render_metrics(scheduler: Scheduler, admission: Admission) -> str:
    """Everything a dashboard needs to split TPS into acceptance length and cycle time."""
    totals = scheduler.totals
    families = [
        _family(f"kilotok_{name}_total", "counter", text, [("", totals[name])])
        for name, text in (
            ("requests", "Requests given to the engine."),
            ("faults", "Requests that the engine could not finish."),
            ("cancelled", "Requests whose client hung up."),
            ("prompt_tokens", "Prompt tokens."),
            ("reused_tokens", "Prompt tokens that were in a cache already, of finished requests."),
            ("generation_tokens", "Generated tokens."),
            ("cycles", "Decode cycles of finished requests."),
        )
    ]
    accepted = [(f'{{position="{at}"}}', totals[f"accepted_{at}"]) for at in range(1, scheduler.draft_tokens + 1)]
    if accepted:
        families.append(
            _family("kilotok_accepted_tokens_total", "counter", "Accepted draft tokens of finished requests.", accepted)
        )
    families += [
        _family("kilotok_requests_running", "gauge", "Requests in a slot.", [("", scheduler.running)]),
        _family("kilotok_requests_waiting", "gauge", "Requests waiting for a slot.", [("", scheduler.waiting)]),
        _family("kilotok_slots", "gauge", "Slots of the continuous batch.", [("", scheduler.slots)]),
        _family("kilotok_draining", "gauge", "1 while no new requests are taken.", [("", admission.draining)]),
    ]
    return "\n".join([*families, *_engine_families(scheduler.engine.counters())]) + "\n"


def _engine_families(counters: dict[str, Any]) -> list[str]:
    """Seconds per operator group; the engine's own cycle count beside it, since a cycle serves many requests."""
    families = []
    seconds = counters.get("seconds_by_group")
    if isinstance(seconds, dict):
        samples = [(f'{{group="{group}"}}', float(value)) for group, value in sorted(seconds.items())]
        families.append(_family("kilotok_operator_seconds_total", "counter", "Engine time by operator group.", samples))
    if "cycles" in counters:
        families.append(
            _family("kilotok_engine_cycles_total", "counter", "Engine cycles.", [("", float(counters["cycles"]))])
        )
    return families
