"""From a failed gate to its likely cause, with the evidence and what to do: the part people would else do by hand.

  weights   a tensor's scale against the source's: named down to the expert
  draft     the head, teacher-forced: is its output layer not this target's (it belongs to another checkpoint), does it
            clearly fit other layers better (capture is shifted), or its own while the engine accepts little (the
            engine's draft path, or the template)
  speed     against the last good build: tokens per cycle (the draft), the cycle, also at forced acceptance (the
            engine), or what lies outside

It refuses to turn a guess into a verdict: gates decide, causes explain, and where nothing stands out there is none.

Run: `python -m pytest tests/tasks/test_diagnosis.py`
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tasks.validate.judge import CAPTURE_LIMIT_NATS, SCALE_LIMIT_PERCENT
from tasks.validate.probe import DraftFit, ScaleError

Metrics = Mapping[str, float]
CLEAR_LOSS = 0.1  # share of drafts that the engine rejects although they are right teacher-forced
OTHER_OUTPUT = 0.5  # cosine; a head trained on its target stays above 0.9, one of another checkpoint is near 0
MOVED = 0.03  # relative; a smaller movement between two builds may be noise


@dataclass(frozen=True)
class Cause:
    """One sentence each: what is wrong, how we know, what to do."""

    cause: str
    evidence: str
    fix: str


def diagnose(
    failed: Collection[str],
    metrics: Metrics,
    scales: Sequence[ScaleError] = (),
    fit: DraftFit | None = None,
    last_good: Metrics | None = None,
) -> list[Cause]:
    """Causes of the failed gates, the surest first."""
    causes = _weights(scales)
    if fit is not None and any(name.startswith(("acceptance.", "draft.")) for name in failed):
        causes += _draft(metrics, fit)
    if last_good and any(name.startswith(("latency.", "cycle.", "forced.")) for name in failed):
        causes += _speed(metrics, last_good)
    return causes


def _weights(scales: Sequence[ScaleError]) -> list[Cause]:
    broken = [error for error in scales if error.percent > SCALE_LIMIT_PERCENT]
    if not broken:
        return []
    worst = broken[0]
    others = f"; {len(broken) - 1} more are off" if len(broken) > 1 else "; every other weight agrees"
    return [
        Cause(
            f"the scale of {worst.name} is wrong by a factor of {worst.ratio:.2f}",
            f"the served weights are {worst.ratio:.2f} times the source's{others}",
            "build quantize again; if it stays, look at its calibration and export of that layer",
        )
    ]


def _draft(metrics: Metrics, fit: DraftFit) -> list[Cause]:
    own = f"{100 * fit.agreement:.0f}%"
    if fit.output_similarity < OTHER_OUTPUT:
        return [
            Cause(
                "the draft belongs to another checkpoint",
                f"its output layer does not resemble this target's (cosine {fit.output_similarity:.2f}) and it guesses "
                f"{own} of the tokens, whichever layers it sees",
                "train the draft on this target, or serve the target it was made for",
            )
        ]
    if fit.gain_nats > CAPTURE_LIMIT_NATS:
        return [
            Cause(
                f"the draft is fed the wrong layers: it captures {list(fit.layers)}, it was trained on layers near "
                f"{list(fit.best_layers)}",
                f"teacher-forced it fits {list(fit.best_layers)} better, by {fit.gain_nats:.2g} nats a token beyond "
                f"noise: {100 * fit.best_agreement:.1f}% right guesses instead of {100 * fit.agreement:.1f}%",
                "compare draft.capture_layers with the head's config.json; transformers' hidden_states start one early",
            )
        ]
    first = metrics.get("acceptance.position.1")
    if first is not None and first < fit.agreement - CLEAR_LOSS:
        return [
            Cause(
                "the engine does not get out of the draft what is in it",
                f"teacher-forced it guesses {own} of the tokens, served its first token is accepted {100 * first:.0f}%",
                "compare chat templates, norms and positions of trainer and engine",
            )
        ]
    return [
        Cause(
            "the draft has learnt too little",
            f"it fits this target and these layers, but guesses only {own} of the tokens teacher-forced",
            "train longer, on more of the target's own answers, above all in the domains that fall short",
        )
    ]


def _speed(metrics: Metrics, last_good: Metrics) -> list[Cause]:
    """Each factor of the speed that got worse by more than noise, the largest first."""
    length, cycle = "acceptance.length", "cycle.us"
    found: list[tuple[float, Cause]] = []
    if loss := _worse(metrics, last_good, length, up=True):
        found.append((loss, Cause(
            "the draft is accepted less", _moved(metrics, last_good, length, "tokens per cycle"),
            "see acceptance by domain and position",
        )))  # fmt: skip
    if loss := _worse(metrics, last_good, cycle, up=False):
        parts = [name for name in metrics if name.startswith("cycle.") and name.endswith("_us")]
        parts = [name for name in parts if name not in ("cycle.client_us", "cycle.outside_us") and name in last_good]
        worst = max(parts, key=lambda name: metrics[name] - last_good[name], default="")
        evidence = _moved(metrics, last_good, cycle, "us per cycle")
        if _worse(metrics, last_good, "forced.cycle_us", up=False):
            evidence += ", and as much slower at forced acceptance, where the draft does not matter"
        if worst and metrics[worst] > last_good[worst]:
            evidence += f"; most of it in {worst.removeprefix('cycle.').removesuffix('_us')}"
        found.append((loss, Cause("the engine's cycle is slower", evidence, "see the waterfall, then what changed")))
    outside = "cycle.outside_us"
    if cycle in last_good and metrics.get(outside, 0) - last_good.get(outside, 0) > MOVED * last_good[cycle]:
        loss = (metrics[outside] - last_good.get(outside, 0)) / last_good[cycle]
        found.append((loss, Cause(
            "more time passes outside the engine", _moved(metrics, last_good, outside, "us per cycle outside"),
            "look at the server, the network and what else runs on the machine",
        )))  # fmt: skip
    return [cause for _, cause in sorted(found, key=lambda pair: -pair[0])]


def _worse(metrics: Metrics, last_good: Metrics, name: str, up: bool) -> float:
    """Relative loss beyond noise, or 0."""
    now, then = metrics.get(name), last_good.get(name)
    if not now or not then:
        return 0.0
    loss = then / now - 1 if up else now / then - 1
    return loss if loss > MOVED else 0.0


def _moved(metrics: Metrics, last_good: Metrics, name: str, unit: str) -> str:
    return f"{metrics[name]:.3g} {unit} instead of {last_good.get(name, 0.0):.3g}"
