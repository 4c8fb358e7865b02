"""Draw a record again, or set two side by side, without the store.

    python -m tasks.report REPORT_JSON OUT_DIR
    python -m tasks.report --compare BEFORE_JSON AFTER_JSON OUT_HTML

Refuses to measure anything. `kilotok report` is the everyday command.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tasks.report import compare
from tasks.report.markdown import render as markdown
from tasks.report.model_card import render as model_card
from tasks.report.page import render as page


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.report", description="Draw a report from its record.")
    parser.add_argument("record", type=Path, nargs="+", help="report.json; two of them with --compare")
    parser.add_argument("out", type=Path, help="folder for the report, or the file for a comparison")
    parser.add_argument("--compare", action="store_true", help="one page for two builds")
    args = parser.parse_args()
    records = [json.loads(path.read_text(encoding="utf-8")) for path in args.record]
    if len(records) != (2 if args.compare else 1):
        parser.error("two records with --compare, one without")
    if args.compare:
        args.out.write_text(compare(*records), encoding="utf-8")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("index.html", page), ("report.md", markdown), ("README.md", model_card)):
        (args.out / name).write_text(draw(records[0]), encoding="utf-8")


if __name__ == "__main__":
    main()
