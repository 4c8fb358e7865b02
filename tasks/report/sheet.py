"""A page that is not a build's report: a title, a few lines, then sections of one drawing and one table each.

Refuses to know what it shows: `kilotok explain --plot` and `kilotok sweep` fill it. Colours, widths and head are the
report's, so that it opens offline, on a phone and in the dark as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from tasks.report.page import environment
from tasks.report.plots import responsive


@dataclass(frozen=True)
class Part:
    """One section. `draw` makes an SVG of a given width; a cell of `rows` is text."""

    title: str
    said: str = ""
    draw: Callable[[float], str] | None = None
    note: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")

    @property
    def drawing(self) -> Markup | None:
        return Markup(responsive(self.draw)) if self.draw else None


def write(path: Path, title: str, lines: Sequence[str], parts: Sequence[Part], crumb: str = "kilotok") -> Path:
    """Write the page; returns its path. The first of `lines` is the one to read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    page = environment().get_template("sheet.html.jinja")
    anchors = [(part.anchor, part.title) for part in parts]
    text = page.render(title=title, lines=lines, sections=parts, anchors=anchors, crumb=crumb)
    path.write_text(text, encoding="utf-8")
    return path
