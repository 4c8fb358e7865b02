"""Verbs about what is live: list, promote, roll back, drain. Imports are inside the verbs."""

from __future__ import annotations

import argparse
import json
import sys

from flows.verbs.surface import Surface, spec_name


def register(add: Surface) -> None:
    listed = add("deployments", deployments, "every deployment: slots, what is live, what it can go back to",
                 spec=False, as_json=True)  # fmt: skip
    listed.add_argument("name", nargs="?", metavar="SPEC", help="only this spec")
    promote_ = add("promote", promote, "make a build that passed its gates the live one, its server started if needed")
    promote_.add_argument("--build", metavar="ID", help="a build id (default: the spec's newest build)")
    add("rollback", rollback, "bring the previous deployment of a spec back")
    add("drain", drain, "finish what runs and stop the deployment of a spec")


def deployments(arguments: argparse.Namespace) -> int:
    """What is recorded and what is true, slot by slot."""
    from tasks.deployment import statuses, to_text
    from tasks.store import open_store

    found = statuses(open_store(arguments.store), spec_name(arguments.name))
    print(json.dumps(found, indent=2) if arguments.as_json else to_text(found))
    return 0


def promote(arguments: argparse.Namespace) -> int:
    """Without losing a request; exit 1 for a build that did not pass."""
    from tasks.deployment import promote_build
    from tasks.store import open_store

    name = spec_name(arguments.spec) or ""
    print(promote_build(open_store(arguments.store), name, arguments.build))
    return 0


def rollback(arguments: argparse.Namespace) -> int:
    """The previous slot becomes live again."""
    from tasks.deployment import rollback as rollback_deployment
    from tasks.store import open_store

    print(rollback_deployment(open_store(arguments.store), spec_name(arguments.spec) or ""))
    return 0


def drain(arguments: argparse.Namespace) -> int:
    """Stop admitting, finish what runs, stop."""
    from tasks.deployment import drain as drain_deployment
    from tasks.store import open_store

    stopped = drain_deployment(open_store(arguments.store), spec_name(arguments.spec) or "")
    print(f"drained {arguments.spec}: stopped {stopped} process{'es' if stopped != 1 else ''}", file=sys.stderr)
    return 0
