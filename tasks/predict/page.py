"""One drawing of the report's as a page of its own, with the report's colours: opens offline.

Refuses to be a report. Written by `kilotok explain --plot` and `kilotok sweep`.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

STYLE = Path(__file__).resolve().parents[1] / "report" / "style.css"


def write(path: Path, title: str, drawing: str, lines: tuple[str, ...] = ()) -> Path:
    """`lines` are said under the drawing."""
    told = "".join(f'<p class="note">{escape(line)}</p>' for line in lines)
    body = f"<main><h2>{escape(title)}</h2><figure>{drawing}</figure>{told}</main>"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE.read_text(encoding="utf-8")}</style>'
    path.write_text(f"<!doctype html>\n{head}\n{body}\n", encoding="utf-8")
    return path
