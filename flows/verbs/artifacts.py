"""Verbs about artifacts rather than specs: verify, lineage, differences, upkeep. Imports are inside the verbs."""

from __future__ import annotations

import argparse
from pathlib import Path

from flows.verbs.surface import Surface
from specs.errors import InputError


def register(add: Surface) -> None:
    verify_ = add("verify", verify, "rehash an artifact, check its signature and its lineage", spec=False)
    verify_.add_argument("--deep", action="store_true", help="rehash what it was made from as well")
    lineage_ = add("lineage", lineage, "an artifact and what it was made from", spec=False)
    for verb in (verify_, lineage_):
        verb.add_argument("uri", metavar="URI", help="as printed by `kilotok store ls`")
    diff_ = add("diff", diff, "what changed between two artifacts, in words", spec=False)
    diff_.add_argument("artifacts", nargs=2, metavar=("A", "B"))
    gc_ = add("gc", gc, "what is no longer needed; a dry run unless --delete", spec=False)
    gc_.add_argument("--keep", type=int, default=2, metavar="N", help="builds to keep per spec (default 2)")
    gc_.add_argument("--delete", action="store_true", help="really delete")
    store_ = add("store", store, "list artifacts, sum sizes, copy to or from another store", spec=False)
    store_.add_argument("action", choices=("ls", "du", "pull", "push"))
    store_.add_argument("other", nargs="?", metavar="URI", help="the other store, for pull and push")


def verify(arguments: argparse.Namespace) -> int:
    """Exit 1 when anything is wrong, naming each bad file."""
    from tasks.attest import trusted_keys
    from tasks.provenance import verify as check
    from tasks.store import open_store

    verdict = check(open_store(arguments.store), arguments.uri, trusted_keys(Path.cwd()), arguments.deep)
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
