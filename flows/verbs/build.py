"""Verbs about one spec: build it, plan it, lock it, and say why. Imports are inside the verbs."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.verbs.surface import Surface
from specs.errors import GateFailed, InputError, KilotokError, LockError

if TYPE_CHECKING:
    from specs.schema import Spec
    from tasks.plan import Plan


def register(add: Surface) -> None:
    add("run", run, "build what changed, measure it, promote it if every gate passes", as_json=True)
    add("plan", plan, "what a run would build, reuse and need, and why; runs nothing", as_json=True)
    add("why", why, "every component of a stage's key that differs from its last build").add_argument(
        "stage", metavar="STAGE"
    )
    add("lock", lock, "resolve the source to a commit and record every file's sha256", store=False)
    add("schema", schema, "print the spec's JSON Schema", spec=False, store=False)


def run(arguments: argparse.Namespace) -> int:
    """The flow, on the configured Prefect server or on one started for this run."""
    from flows.local_server import prefect_server
    from flows.terminal import Terminal, verdict_lines
    from specs.load import load_spec
    from specs.lock import check_lock, read_lock
    from tasks.build import new_build_id
    from tasks.predict.forecast import forecast
    from tasks.store import open_store

    spec = load_spec(Path(arguments.spec), arguments.overrides)  # before a server is started for a typo
    check_lock(spec, read_lock(spec))
    store, build_id = open_store(arguments.store), new_build_id()
    store.read_json(f"last_good/{spec.name}")  # a bucket that refuses us does so before a server is started
    forecast(spec, store)  # what cannot fit is refused here
    terminal = Terminal()
    terminal.say(f"[bold]kilotok[/] {spec.name}  build {build_id}")
    failure: KilotokError | None = None
    with prefect_server(Path(".kilotok/prefect"), terminal.say):
        from flows.narrate import TERMINAL
        from flows.rebuild import rebuild

        TERMINAL.set(terminal)
        try:
            rebuild(arguments.spec, arguments.overrides, arguments.store, build_id)
        except KilotokError as error:
            failure = error
    record = store.read_json(f"builds/{spec.name}/{build_id}")
    if record is None:  # it ended before its first stage
        raise failure or InputError("the build left no record", build_id)
    if failure is None or isinstance(failure, GateFailed):
        for line in verdict_lines(record):
            terminal.say(line)
    if arguments.as_json:
        print(json.dumps(record, indent=2))
    if failure is not None:
        raise failure
    return 0


def plan(arguments: argparse.Namespace) -> int:
    """Keys, hits, misses, reasons and what is predicted; stats files, reads none. A trtllm spec also shows how its
    server will be started. Exit 2 when it cannot run at all."""
    from specs.load import load_spec
    from specs.lock import check_lock, read_lock
    from tasks.plan import plan as make_plan
    from tasks.predict.forecast import forecast
    from tasks.store import open_store
    from tasks.train_draft.launch import argv as training_argv

    spec = load_spec(Path(arguments.spec), arguments.overrides)
    found: dict[str, Any] = {"lock": "ok"}
    lock = read_lock(spec)
    try:
        check_lock(spec, lock)
    except LockError as error:  # a plan is also for what cannot run yet
        found["lock"] = str(error)
    store, refusal = open_store(arguments.store), None
    planned = make_plan(spec, store)
    try:
        planned = replace(planned, forecast=forecast(spec, store, lock.size_bytes if lock else 0))
    except InputError as error:  # the plan is shown, then refused
        refusal, found["refused"] = error, str(error)
    text = planned.to_text() + (f"\n  lock {found['lock']}" if found["lock"] != "ok" else "")
    if command := training_argv(spec.to_dict()["draft"], "JOB.json"):
        found["train_draft"] = {"argv": command}
        text += f"\n  train_draft starts {' '.join(command)}"
    if spec.engine.backend == "trtllm":
        more, found["engine"] = _launch(spec)
        text += more
    print(json.dumps({**planned.to_dict(), **found}, indent=2) if arguments.as_json else text)
    if refusal is None and planned.disk_is_short and _runs_here(spec):
        refusal = short_of_disk(planned)
    if refusal is not None:
        raise refusal
    return 0


def _runs_here(spec: Spec) -> bool:
    """A plan for a DGX may be made on a laptop, whose disk it will not need."""
    from tasks.edges.machine import gpu

    return spec.engine.backend == "native" or gpu() != "none"


def short_of_disk(planned: Plan) -> InputError:
    """The store's disk cannot hold what would be built."""
    from tasks.plan import size_words

    need, free = size_words(planned.disk_bytes), size_words(planned.disk_free_bytes)
    return InputError(f"{need} of disk are needed, {free} are free", planned.store, "`kilotok gc`, or another --store")


def _launch(spec: Spec) -> tuple[str, dict[str, Any]]:
    """How TensorRT-LLM will be started, and which of the record's kernels run at this shape."""
    from engine_plugins.trtllm.kernels import record_kernels
    from engine_plugins.trtllm.render import render

    kernels = [asdict(kernel) for kernel in record_kernels(spec)]
    rows = [f"    {'runs    ' if row['runs'] else 'does not'} {row['name']:<28} {row['why']}" for row in kernels]
    text = "\n".join(["", "", "  kernels of the record at this shape", *rows])
    return text, {"rendered": render(spec).to_dict(), "kernels": kernels}


def why(arguments: argparse.Namespace) -> int:
    """The same reason as in the plan, then each component that differs."""
    from specs.load import load_spec
    from tasks.plan import why as explain
    from tasks.store import open_store

    print(
        "\n  ".join(
            explain(load_spec(Path(arguments.spec), arguments.overrides), open_store(arguments.store), arguments.stage)
        )
    )
    return 0


def lock(arguments: argparse.Namespace) -> int:
    """Write specs/locks/NAME.yaml, to be committed."""
    from specs.load import load_spec
    from specs.lock import write_lock
    from tasks.edges.hub import make_lock
    from tasks.job import Progress

    spec = load_spec(Path(arguments.spec), arguments.overrides)
    locked = make_lock(spec, Progress())
    revision = f" at {locked.revision}" if locked.revision else ""  # a folder has none
    print(f"locked {spec.name}: {len(locked.files)} files{revision} -> {write_lock(spec, locked)}")
    return 0


def schema(_arguments: argparse.Namespace) -> int:
    """JSON Schema; point an editor at it for completion."""
    from specs.schema import Spec

    print(json.dumps(Spec.json_schema(), indent=2))
    return 0
