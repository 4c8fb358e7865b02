"""Draw a record again, set two side by side, or show all builds, without the store.

    python -m tasks.report REPORT_JSON OUT_DIR
    python -m tasks.report --compare BEFORE_JSON AFTER_JSON OUT_HTML
    python -m tasks.report --history BUILDS_FOLDER OUT_HTML

Refuses to measure anything. `kilotok report` is the everyday command.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tasks.report import history
from tasks.report.comparison import render as compare
from tasks.report.markdown import render as markdown
from tasks.report.model_card import render as model_card
from tasks.report.page import render as page


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.report", description="Draw a report from its record.")
    parser.add_argument(
        "record", type=Path, nargs="+", help="report.json; two of them with --compare, a folder with --history"
    )
    parser.add_argument("out", type=Path, help="folder for the report, or the file for another page")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--compare", action="store_true", help="one page for two builds")
    kind.add_argument("--history", action="store_true", help="one page for all builds of a spec")
    args = parser.parse_args()
    paths = sorted(args.record[0].glob("*.json")) if args.history else args.record
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if not args.history and len(records) != (2 if args.compare else 1):
        parser.error("two records with --compare, one without")
    if args.compare or args.history:
        args.out.write_text(compare(*records) if args.compare else history(records), encoding="utf-8")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("index.html", page), ("report.md", markdown), ("README.md", model_card)):
        (args.out / name).write_text(draw(records[0]), encoding="utf-8")


if __name__ == "__main__":
    main()
