"""Verbs that know before anything is spent: predict, explain, sweep. Imports are inside the verbs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from flows.verbs.surface import Surface

if TYPE_CHECKING:
    from tasks.predict.sweep import Point


def register(add: Surface) -> None:
    routing = {
        "metavar": "TRACE",
        "type": Path,
        "help": 'JSON {"experts": [layer][token]}: how tokens were really routed',
    }
    predict_ = add("predict", predict, "cycle, tokens/s, memory and floors of a spec; runs nothing", as_json=True)
    explain_ = add("explain", explain, "where the microseconds go and what each lever is worth", as_json=True)
    for verb in (predict_, explain_):
        verb.add_argument("--routing", **routing)  # type: ignore[arg-type]
    sweep_ = add(
        "sweep", sweep, "predict a grid of specs, measure the best of it, write the winner's patch", as_json=True
    )
    sweep_.add_argument(
        "--over", action="append", required=True, metavar="KEY=VALUES", help="1..7, 8..64..8 or 1,4,8; may be repeated"
    )
    sweep_.add_argument(
        "--measure", type=int, default=8, metavar="N", help="points to measure; 0 only predicts (default 8)"
    )
    sweep_.add_argument("--best", choices=("user", "server"), default="user", help="whose speed decides (default user)")
    sweep_.add_argument("--out", type=Path, metavar="FOLDER", help="default .kilotok/sweeps/NAME")
    explain_.add_argument(
        "--plot", metavar="FILE", type=Path, help="also draw the cycle and the levers, as an HTML page"
    )


def predict(arguments: argparse.Namespace) -> int:
    """Exit 2 for hardware nobody knows and for what cannot fit it."""
    from specs.load import load_spec
    from tasks.predict.prediction import predict as make
    from tasks.predict.prediction import targets
    from tasks.predict.records import Records
    from tasks.store import open_store

    spec = load_spec(Path(arguments.spec), arguments.overrides)
    made = make(spec, Records.read(open_store(arguments.store), spec.name), arguments.routing)
    said = targets(spec, made)
    if arguments.as_json:
        print(json.dumps({**made.to_dict(), "targets": said}, indent=2))
    else:
        print("\n".join([made.to_text(), *(f"  target      {verdict}" for verdict in said)]))
    return 0


def explain(arguments: argparse.Namespace) -> int:
    """A table of bars and of levers; --plot writes the waterfall that a report would show."""
    from specs.load import load_spec
    from tasks.predict import levers
    from tasks.predict.prediction import predict as make
    from tasks.predict.records import Records
    from tasks.store import open_store

    spec = load_spec(Path(arguments.spec), arguments.overrides)
    made = make(spec, Records.read(open_store(arguments.store), spec.name), arguments.routing)
    found = levers.explain(made, spec.model.source)
    print(json.dumps(found, indent=2) if arguments.as_json else levers.to_text(found))
    if arguments.plot:
        from tasks.predict.drawings import explanation

        explanation(arguments.plot, found)
    return 0


def sweep(arguments: argparse.Namespace) -> int:
    """The predictor prunes, measurement decides: on the native engine as a Prefect flow; for TensorRT-LLM the points
    are written as specs for a DGX."""
    from specs.load import load_spec
    from tasks.predict import sweeping
    from tasks.predict.records import Records
    from tasks.predict.sweep import grid, search, worth_measuring
    from tasks.store import open_store

    spec = load_spec(Path(arguments.spec), arguments.overrides)
    store = open_store(arguments.store)
    points = search(spec, grid(arguments.over), Records.read(store, spec.name))
    chosen = worth_measuring(points, arguments.measure)
    measured = [] if spec.engine.backend == "trtllm" else _measure(arguments, spec.name, chosen)
    found = sweeping.conclude(points, measured, arguments.best)
    out = arguments.out or Path(".kilotok/sweeps") / spec.name
    written = sweeping.write(out, spec, found, chosen if spec.engine.backend == "trtllm" else [])
    print(json.dumps(found.to_dict() | {"files": written}, indent=2) if arguments.as_json else found.to_text(written))
    return 0


def _measure(arguments: argparse.Namespace, name: str, chosen: list[Point]) -> list[Point]:
    """The chosen points with measured speeds, through the flow."""
    if not chosen:
        return []
    from flows.local_server import prefect_server
    from flows.terminal import Terminal
    from tasks.predict.sweeping import with_measured

    terminal = Terminal()
    terminal.say(f"[bold]kilotok[/] sweep of {name}: {len(chosen)} points to measure")
    with prefect_server(Path(".kilotok/prefect"), terminal.say):
        from flows.narrate import TERMINAL
        from flows.sweep import sweep as flow

        TERMINAL.set(terminal)
        asked = [{"name": point.name, "overrides": [*arguments.overrides, *point.overrides]} for point in chosen]
        return with_measured(chosen, flow(arguments.spec, asked, arguments.store))
