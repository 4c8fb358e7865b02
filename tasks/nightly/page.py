"""The page a person reads in the morning, and the same as Markdown: last night, what got worse and why, all trends.

Refuses to be the truth: both are drawn from the store's records at any time. Run it: `kilotok history SPEC --page`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.report.trends import render

if TYPE_CHECKING:
    from tasks.store import Store


def write(store: Store, name: str) -> Path:
    """Draw the page of a spec; returns its path on this machine."""
    records = {folder: _records(store, f"{folder}/{name}") for folder in ("builds", "nights")}
    path = store.local.root / "pages" / f"{name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    half.write_text(render(records["builds"], records["nights"]), encoding="utf-8")
    half.replace(path)
    return path


def _records(store: Store, folder: str) -> list[dict[str, Any]]:
    return [record for entry in store.list_json(folder) if (record := store.read_json(entry))]


def markdown(record: Mapping[str, Any]) -> str:
    """One night."""
    lines = [f"# {record['spec']}, night {record['night']}", "", record["summary"], ""]
    for finding in record["findings"]:
        lines.append(f"- **{finding['kind']}**{'' if finding['alarm'] else ' (known)'}: {finding['text']}")
        lines += [f"  - {cause['kind']}: {cause['what']}" for cause in finding["causes"][:5]]
    lines += [f"- built **{row['stage']}**: {row['reason']}" for row in record["plan"]]
    if (record["drift"] or {}).get("state") == "moved":
        lines += ["", "The source moved. To take it: `kilotok lock`, or apply", "", "```diff"]
        lines += [*record["drift"]["proposal"].splitlines(), "```"]
    return "\n".join(lines) + "\n"
