"""Verbs about serving and looking: a server, status, reports, this machine. Imports are inside the verbs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from flows.verbs.surface import Surface, spec_name
from specs.errors import InputError


def register(add: Surface) -> None:
    serve_ = add("serve", serve, "serve a bundle in the foreground", spec=False, store=False)
    serve_.add_argument("bundle", metavar="BUNDLE", type=Path, help="a build_engine artifact")
    serve_.add_argument("--host", default="127.0.0.1")
    serve_.add_argument("--port", type=int, default=8000)
    status_ = add("status", status, "deployments, last builds and who holds what", spec=False, as_json=True)
    status_.add_argument("name", nargs="?", metavar="SPEC", help="only this spec")
    report_ = add("report", report, "where the last report is; --compare A B for two builds", spec=False)
    report_.add_argument("name", nargs="?", metavar="SPEC", help="path or name of a spec")
    report_.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two build ids")
    add("doctor", doctor, "check this machine: compiler, memory, disk, ports, GPU, Prefect", spec=False, as_json=True)


def serve(arguments: argparse.Namespace) -> int:
    """The native server, without a deployment around it."""
    from engine_plugins.native.server import main as serve_main

    return serve_main(["--bundle", str(arguments.bundle), "--host", arguments.host, "--port", str(arguments.port)])


def status(arguments: argparse.Namespace) -> int:
    """Deployments with slots and health, last builds with verdicts, leases with owners."""
    from tasks.status import collect, to_text
    from tasks.store import open_store

    found = collect(open_store(arguments.store), spec_name(arguments.name))
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
    record = build_record(store, spec_name(arguments.name))
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
