"""The tables of docs/predict.md: every measured row beside what is predicted without it, misses included.

A test compares the file with what this writes, so the document cannot drift from the data. Refuses to leave a row out.
Run it: `python -m tasks.predict.tables` rewrites them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tasks.predict.calibrate import CYCLE, THROUGHPUT, Measured, calibrate, native, published

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "predict.md"


def judged(rows: Sequence[Measured], row: Measured) -> tuple[float, float, float]:
    """(expected, low, high) of a row whose system was left out of its calibration."""
    found = calibrate(rows, row.stack, row.quantity, leave_out=row.system)
    return found.factor * row.modelled, found.low * row.modelled, found.high * row.modelled


def is_inside(rows: Sequence[Measured], row: Measured) -> bool:
    """Whether the 80% interval, made without the row's system, holds it."""
    _, low, high = judged(rows, row)
    return low <= row.measured <= high


def coverage(rows: Sequence[Measured], quantity: str) -> tuple[int, int]:
    """(rows inside, rows checked) of a quantity."""
    checked = [row for row in rows if row.quantity == quantity and row.check]
    return sum(is_inside(rows, row) for row in checked), len(checked)


def table(rows: Sequence[Measured], quantity: str, unit: str) -> str:
    """Markdown: one line per row, then how many intervals held."""
    lines = [f"| row | measured {unit} | predicted | 80% interval | error | inside | source |", "|" + "---|" * 7]
    for row in rows:
        if row.quantity != quantity:
            continue
        expected, low, high = judged(rows, row)
        held = "not counted" if not row.check else "yes" if low <= row.measured <= high else "**no**"
        error = 100 * (expected / row.measured - 1)
        lines.append(
            f"| {row.name} | {row.measured:,.0f} | {expected:,.0f} | {low:,.0f} to {high:,.0f} | {error:+.0f}% "
            f"| {held} | {row.source} |"
        )
    inside, checked = coverage(rows, quantity)
    return "\n".join([*lines, "", f"{inside} of {checked} rows lie inside ({100 * inside / checked:.0f}%)."])


def native_table() -> str:
    """The two shapes that the native engine's calibration has never seen."""
    rows = native()
    known = [row for row in rows if row.check]
    found = calibrate(known, "native", CYCLE)
    lines = [f"Factor and interval: {found.words}.", ""]
    lines += ["| shape and setting | measured us | predicted | 80% interval | error |", "|" + "---|" * 5]
    for row in rows:
        if not row.check:
            expected = found.factor * row.modelled
            lines.append(
                f"| {row.name} | {row.measured:,.0f} | {expected:,.0f} | {found.low * row.modelled:,.0f} to "
                f"{found.high * row.modelled:,.0f} | {100 * (expected / row.measured - 1):+.0f}% |"
            )
    return "\n".join(lines)


def render(text: str) -> str:
    """The document with its tables replaced, each between `<!-- NAME -->` and `<!-- end -->`."""
    made = {
        "cycle": table(published(), CYCLE, "us"),
        "throughput": table(published(), THROUGHPUT, "tokens/s"),
        "native": native_table(),
    }
    for name, body in made.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}{body}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(render(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
