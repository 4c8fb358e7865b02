"""Verbs about nights: history, bisect, check. Imports are inside the verbs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from flows.verbs.surface import Surface, spec_name
from specs.errors import InputError

HEADLINE = ("latency.tps_per_user.p50", "acceptance.length", "cycle.us", "accuracy.difference")


def register(add: Surface) -> None:
    history_ = add("history", history, "every night of a spec and how a figure moved", spec=False, as_json=True)
    history_.add_argument("name", nargs="?", metavar="SPEC", help="path or name of a spec; without it, all specs")
    history_.add_argument("--metric", metavar="NAME", help="one figure, night by night")
    history_.add_argument("--last", type=int, default=30, metavar="N", help="nights to show (default 30)")
    history_.add_argument("--page", action="store_true", help="draw the page of all trends and print its path")
    bisect_ = add("bisect", bisect, "swap changed inputs one at a time until the culprit is named", spec=False)
    bisect_.add_argument("builds", nargs=2, metavar=("GOOD", "BAD"), help="two builds, as `kilotok history` lists them")
    bisect_.add_argument("--metric", default=HEADLINE[0], metavar="NAME", help=f"the figure (default {HEADLINE[0]})")
    bisect_.add_argument("--runs", type=int, default=3, metavar="N", help="measurements per trial (default 3)")
    check_ = add("check", check, "what a spec edit would meet at night; builds nothing", spec=False, as_json=True)
    check_.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="specs, or folders of them")
    check_.add_argument("--unlocked", action="store_true", help="a missing lock is a note: CI has no hub")


def history(arguments: argparse.Namespace) -> int:
    """A table of nights with a sparkline; without --metric the headline figures, one line each."""
    from tasks.nightly import history as past
    from tasks.nightly import page
    from tasks.report.words import meaning
    from tasks.store import open_store

    store, name = open_store(arguments.store), spec_name(arguments.name)
    with past.history(store) as table:
        known = past.specs_of(table)
        if name is None or name not in known:
            if name is not None:
                raise InputError(f"no build of {name!r}", store.uri, f"known: {', '.join(known) or 'none yet'}")
            lines = [past.last_line(table, spec) for spec in known]
            print("\n".join(lines) or "no build yet")
            return 0
        if arguments.page:
            print(page.write(store, name))
            return 0
        wanted = (arguments.metric,) if arguments.metric else HEADLINE
        measured = past.metrics_of(table, name)
        if arguments.metric and arguments.metric not in measured:
            raise InputError(
                f"{arguments.metric} was never measured", name, f"measured: {', '.join(measured[:12])}, ..."
            )
        nights = past.rows(table, name, arguments.last)
        points = {
            metric: {source: past.series(table, name, metric, source) for source in ("build", "live")}
            for metric in wanted
            if metric in measured
        }
    if arguments.as_json:
        values = {m: {s: {p.night: p.values for p in found} for s, found in by.items()} for m, by in points.items()}
        print(json.dumps({"spec": name, "table": str(past.table_path(store)), "nights": nights, "figures": values}))
    elif arguments.metric:
        print(past.to_text(nights, points[arguments.metric], arguments.metric, meaning(arguments.metric).unit))
    else:
        print(past.overview(nights, points))
    return 0


def bisect(arguments: argparse.Namespace) -> int:
    """Exit 0 when a culprit is named, 1 when none of what can be swapped here did it."""
    from tasks.nightly.bisect import bisect as find
    from tasks.store import open_store

    def say(text: str) -> None:
        print(f"  {text}", file=sys.stderr)

    good, bad = arguments.builds
    verdict, left = find(open_store(arguments.store), Path.cwd(), good, bad, arguments.metric, arguments.runs, say)
    print(verdict.text)
    for text in left:
        print(f"not swapped: {text}")
    return 0 if verdict.culprit else 1


def check(arguments: argparse.Namespace) -> int:
    """Exit 2 when a spec would be refused."""
    from tasks.nightly.check import check as check_one
    from tasks.nightly.check import spec_files, to_text
    from tasks.store import open_store

    store = open_store(arguments.store)
    results = [check_one(path, store, locked=not arguments.unlocked) for path in spec_files(arguments.paths)]
    print(json.dumps([result.to_dict() for result in results]) if arguments.as_json else to_text(results))
    return 2 if any(result.wrong for result in results) else 0
