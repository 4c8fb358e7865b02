"""The `kilotok` command. Exit 0 pass, 1 a gate failed, 2 the input is wrong, 3 a stage failed.

Refuses to hold logic: each verb is a few lines over `tasks`. Imports happen inside the verbs, so that `kilotok
plan` answers
at once. Run it: `kilotok --help`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specs.errors import GateFailed, InputError, KilotokError, LockError

DEFAULT_STORE = ".kilotok/store"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run one verb, map errors to one line and an exit code."""
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.verb(arguments) or 0)
    except KilotokError as error:
        print(f"kilotok: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("kilotok: interrupted; run again to resume where it stopped", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The whole surface; a test holds it against the README."""
    top = argparse.ArgumentParser(
        prog="kilotok", description="From one YAML spec to a served, measured, promoted LLM endpoint."
    )
    verbs = top.add_subparsers(required=True, metavar="VERB")

    def verb(
        name: str, function: Any, text: str, *, spec: bool = True, store: bool = True, as_json: bool = False
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(verb=function)
        if spec:
            sub.add_argument("spec", metavar="SPEC", help="path of a spec")
            sub.add_argument(
                "--set",
                dest="overrides",
                metavar="K=V",
                action="append",
                default=[],
                help="override a key: draft.training.epochs=3",
            )
        if store:
            sub.add_argument(
                "--store",
                metavar="URI",
                default=DEFAULT_STORE,
                help=f"directory or s3://bucket/prefix (default {DEFAULT_STORE})",
            )
        if as_json:
            sub.add_argument("--json", dest="as_json", action="store_true", help="print one JSON object on stdout")
        return sub

    verb("run", run, "build what changed, measure it, promote it if every gate passes", as_json=True)
    verb("plan", plan, "what a run would build, reuse and need, and why; runs nothing", as_json=True)
    verb("lock", lock, "resolve the source to a commit and record every file's sha256", store=False)
    verb("schema", schema, "print the spec's JSON Schema", spec=False, store=False)
    serve_ = verb("serve", serve, "serve a bundle in the foreground", spec=False, store=False)
    serve_.add_argument("bundle", metavar="BUNDLE", type=Path, help="a build_engine artifact")
    serve_.add_argument("--host", default="127.0.0.1")
    serve_.add_argument("--port", type=int, default=8000)
    status_ = verb("status", status, "deployments, last builds and who holds what", spec=False, as_json=True)
    status_.add_argument("name", nargs="?", metavar="SPEC", help="only this spec")
    report_ = verb("report", report, "where the last report is; --compare A B for two builds", spec=False)
    report_.add_argument("name", nargs="?", metavar="SPEC", help="path or name of a spec")
    report_.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two build ids")
    verb("doctor", doctor, "check this machine: compiler, memory, disk, ports, GPU, Prefect", spec=False, as_json=True)
    _store_verbs(verb)
    verb("drain", drain, "finish what runs and stop the deployment of a spec")
    verb("rollback", rollback, "bring the previous deployment of a spec back")
    return top


def _store_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """What one asks of artifacts rather than of specs."""
    why_ = verb("why", why, "every component of a stage's key that differs from its last build")
    why_.add_argument("stage", metavar="STAGE")
    for name, function, text in (
        ("verify", verify, "rehash an artifact, check its signature and its lineage"),
        ("lineage", lineage, "an artifact and what it was made from"),
    ):
        verb(name, function, text, spec=False).add_argument(
            "uri", metavar="URI", help="as printed by `kilotok store ls`"
        )
    diff_ = verb("diff", diff, "what changed between two artifacts, in words", spec=False)
    diff_.add_argument("artifacts", nargs=2, metavar=("A", "B"))
    gc_ = verb("gc", gc, "what is no longer needed; a dry run unless --delete", spec=False)
    gc_.add_argument("--keep", type=int, default=2, metavar="N", help="builds to keep per spec (default 2)")
    gc_.add_argument("--delete", action="store_true", help="really delete")
    store_ = verb("store", store, "list artifacts, sum sizes, copy to or from another store", spec=False)
    store_.add_argument("action", choices=("ls", "du", "pull", "push"))
    store_.add_argument("other", nargs="?", metavar="URI", help="the other store, for pull and push")


def run(arguments: argparse.Namespace) -> int:
    """The flow, on the configured Prefect server or on one started for this run."""
    from flows.local_server import prefect_server
    from flows.terminal import Terminal, verdict_lines
    from specs.load import load_spec
    from specs.lock import check_lock, read_lock
    from tasks.build import new_build_id
    from tasks.store import open_store

    spec = load_spec(Path(arguments.spec), arguments.overrides)  # before a server is started for a typo
    check_lock(spec, read_lock(spec))
    store, build_id = open_store(arguments.store), new_build_id()
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
    """Keys, hits, misses and reasons; stats files, reads none. A trtllm spec also shows how its server will be
    started."""
    from specs.load import load_spec
    from specs.lock import check_lock, read_lock
    from tasks.plan import plan as make_plan
    from tasks.store import open_store

    spec = load_spec(Path(arguments.spec), arguments.overrides)
    found: dict[str, Any] = {"lock": "ok"}
    try:
        check_lock(spec, read_lock(spec))
    except LockError as error:  # a plan is also for what cannot run yet
        found["lock"] = str(error)
    planned = make_plan(spec, open_store(arguments.store))
    text = planned.to_text() + (f"\n  lock {found['lock']}" if found["lock"] != "ok" else "")
    if spec.engine.backend == "trtllm":
        from engine_plugins.trtllm.kernels import record_kernels
        from engine_plugins.trtllm.render import render

        kernels = [asdict(kernel) for kernel in record_kernels(spec)]
        found["engine"] = {"rendered": render(spec).to_dict(), "kernels": kernels}
        text += "\n\n  kernels of the record at this shape\n"
        text += "\n".join(
            f"    {'runs    ' if row['runs'] else 'does not'} {row['name']:<28} {row['why']}" for row in kernels
        )
    print(json.dumps({**planned.to_dict(), **found}, indent=2) if arguments.as_json else text)
    return 0


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


def verify(arguments: argparse.Namespace) -> int:
    """Exit 1 when anything is wrong, naming each bad file."""
    from tasks.attest import trusted_keys
    from tasks.provenance import verify as check
    from tasks.store import open_store

    verdict = check(open_store(arguments.store), arguments.uri, trusted_keys(Path.cwd()))
    print(verdict.to_text())
    return 1 if verdict.wrong else 0


def lineage(arguments: argparse.Namespace) -> int:
    """A tree back to the source."""
    from tasks.provenance import lineage as ancestors
    from tasks.provenance import lineage_text
    from tasks.store import open_store

    print(lineage_text(ancestors(open_store(arguments.store), arguments.uri)))
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """One line per difference."""
    from tasks.provenance import diff as compare_artifacts
    from tasks.store import open_store

    print("\n".join(compare_artifacts(open_store(arguments.store), *arguments.artifacts)) or "no difference")
    return 0


def gc(arguments: argparse.Namespace) -> int:
    """Never a live, promoted or leased artifact."""
    from tasks.store import open_store
    from tasks.store.upkeep import gc as collect_garbage

    print(collect_garbage(open_store(arguments.store), arguments.keep, dry_run=not arguments.delete).to_text())
    return 0


def store(arguments: argparse.Namespace) -> int:
    """ls: one line per artifact. du: bytes by stage. push and pull: copy what the other side lacks."""
    from tasks.store import open_store, upkeep

    here = open_store(arguments.store)
    if arguments.action == "ls":
        for row in upkeep.listing(here):
            remark = "" if row["usable"] else "  (not a pass)"
            print(f"{row['created'][:19]}  {row['size_bytes'] / 1e6:12.1f} MB  {row['uri']}{remark}")
    elif arguments.action == "du":
        for stage, (count, size) in upkeep.usage(here).items():
            print(f"{stage:<14} {count:4d} artifacts {size / 1e6:12.1f} MB")
    else:
        if not arguments.other:
            raise InputError(
                f"store {arguments.action} needs the other store",
                "URI",
                f"kilotok store {arguments.action} s3://bucket/prefix",
            )
        there = open_store(arguments.other)
        pair = (here, there) if arguments.action == "push" else (there, here)
        print("\n".join(upkeep.copy(*pair)) or "nothing to copy")
    return 0


def lock(arguments: argparse.Namespace) -> int:
    """Write specs/locks/NAME.yaml, to be committed."""
    from specs.load import load_spec
    from specs.lock import write_lock
    from tasks.edges.hub import make_lock
    from tasks.job import Progress

    spec = load_spec(Path(arguments.spec), arguments.overrides)
    locked = make_lock(spec, Progress())
    print(f"locked {spec.name}: {len(locked.files)} files at {locked.revision} -> {write_lock(spec, locked)}")
    return 0


def schema(_arguments: argparse.Namespace) -> int:
    """JSON Schema; point an editor at it for completion."""
    from specs.schema import Spec

    print(json.dumps(Spec.json_schema(), indent=2))
    return 0


def serve(arguments: argparse.Namespace) -> int:
    """The native server, without a deployment around it."""
    from engine_plugins.native.server import main as serve_main

    return serve_main(["--bundle", str(arguments.bundle), "--host", arguments.host, "--port", str(arguments.port)])


def status(arguments: argparse.Namespace) -> int:
    """Deployments with slots and health, last builds with verdicts, leases with owners."""
    from tasks.status import collect, to_text
    from tasks.store import open_store

    found = collect(open_store(arguments.store), _name(arguments.name))
    print(json.dumps(found, indent=2) if arguments.as_json else to_text(found))
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Print the path of a report; with --compare write and print the page of two builds."""
    from tasks.status import build_record
    from tasks.store import open_store

    store = open_store(arguments.store)
    if arguments.compare:
        from tasks.report import compare

        before, after = (build_record(store, build) for build in arguments.compare)
        print(compare(before, after, out=Path(".kilotok")))
        return 0
    record = build_record(store, _name(arguments.name))
    if not record["report"]:
        raise InputError(
            f"build {record['build']} has no report",
            record["spec"],
            str((record["error"] or {}).get("what", "run it again")),
        )
    print(record["report"])
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Each check with what was found and what to do; exit 2 when something needed is missing."""
    from tasks.doctor import examine, to_text

    checks = examine(Path(arguments.store))
    print(json.dumps(checks, indent=2) if arguments.as_json else to_text(checks))
    return 2 if any(check["state"] == "missing" for check in checks) else 0


def drain(arguments: argparse.Namespace) -> int:
    """Stop admitting, finish what runs, stop."""
    from tasks.deployment import drain as drain_deployment
    from tasks.store import open_store

    stopped = drain_deployment(open_store(arguments.store), _name(arguments.spec) or "")
    print(f"drained {arguments.spec}: stopped {stopped} process{'es' if stopped != 1 else ''}", file=sys.stderr)
    return 0


def rollback(arguments: argparse.Namespace) -> int:
    """The previous slot becomes live again."""
    from tasks.deployment import rollback as rollback_deployment
    from tasks.store import open_store

    print(rollback_deployment(open_store(arguments.store), _name(arguments.spec) or ""))
    return 0


def _name(spec: str | None) -> str | None:
    """A spec may be given by path or by name where only its name matters."""
    if spec and spec.endswith((".yaml", ".yml")):
        from specs.load import load_spec

        return str(load_spec(Path(spec), []).name)
    return spec


if __name__ == "__main__":
    sys.exit(main())
