"""The report of a build: index.html, report.md, report.json and stages.parquet, from what earlier stages left.

Refuses to judge and to fetch: verdicts are `validate`'s, and the page asks no server for anything.
Run it: `kilotok run SPEC` (stage `report`); `python -m tasks.report REPORT_JSON OUT` draws a record again.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from specs.errors import InputError
from tasks.job import Job, Progress


def build(job: Job, progress: Progress) -> dict[str, float]:
    """Write the report into `job.out`; returns the page's size. What was not measured is shown as such."""
    from tasks.report.collect import collect
    from tasks.report.markdown import render as markdown
    from tasks.report.model_card import render as model_card
    from tasks.report.page import render as page
    from tasks.report.table import write_stages

    progress(0, 3, "reading what the stages left")
    report = collect(job)
    progress(1, 3, "drawing")
    html = page(report)
    (job.out / "index.html").write_text(html, encoding="utf-8")
    (job.out / "report.md").write_text(markdown(report), encoding="utf-8")
    (job.out / "README.md").write_text(model_card(report), encoding="utf-8")
    (job.out / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    write_stages(report["stages"], job.out / "stages.parquet")
    progress(3, 3, "drawn")
    return {"report.bytes": float(len(html.encode()))}


def compare(before: dict[str, Any], after: dict[str, Any], out: Path) -> Path:
    """Write the page of two builds into the folder `out`; both are build records (or report records). Returns its path.

    Raises InputError for a build without a report, and for a folder that cannot be written.
    """
    from tasks.report.comparison import read_report, render

    reports = [read_report(record) for record in (before, after)]
    names = [re.sub(r"[^\w.-]+", "-", str(report["build"] or "build")) for report in reports]
    page = out / f"compare-{names[0]}-{names[1]}.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        page.write_text(render(*reports), encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot write the page: {error.strerror}", str(page), "use a folder that can be written"
        ) from error
    return page


def history(records: list[dict[str, Any]]) -> str:
    """The page of all builds of a spec; `records` are build records as `kilotok run --json` prints them."""
    from tasks.report.trends import render

    return render(records)


__all__ = ["build", "compare", "history"]
