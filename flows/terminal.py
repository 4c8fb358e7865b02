"""What a person sees while a build runs: one calm line per stage, a bar on long work, a verdict at the end.

Refuses to be a log: details go to the stage's log file and to Prefect. Everything is written to stderr, so
that stdout stays
free for `--json`. Run it: `kilotok run SPEC`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tasks.plan import size_words

MARKS = {"built": "[green]✓[/]", "cached": "[blue]≡[/]", "failed": "[red]✗[/]"}


class Terminal:
    """Listens to stage events; also usable as a context manager that owns the live bar."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(file=sys.stderr, highlight=False, quiet=quiet, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, event: Any) -> None:
        """One StageEvent: heading, started, progress, note or finished."""
        if event.kind == "heading":
            self.say(f"\n  [bold]{escape(event.stage)}[/]")
        elif event.kind == "started":
            self._open(event.stage)
        elif event.kind in ("progress", "note"):
            self._advance(event)
        elif event.kind == "finished":
            self._close()
            self.line(event.receipt)

    def _open(self, stage: str) -> None:
        # A bar that nobody watches is noise in a CI log: there the finished line is all.
        if not self.console.is_terminal:
            return
        columns = (
            TextColumn("  [dim]…[/] {task.fields[stage]:<13}"),
            BarColumn(24),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(*columns, console=self.console, transient=True, refresh_per_second=5)
        self._task = self._bar.add_task("", total=None, stage=stage)
        self._bar.start()

    def _advance(self, event: Any) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, completed=event.done, total=event.total or None, description=escape(event.text)
            )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def line(self, receipt: Any) -> None:
        """The stage's one line: mark, name, state, seconds, size, and why it was not a hit."""
        reason = "" if receipt.reason == "unchanged" else f"  [dim]{escape(receipt.reason)}[/]"
        size = size_words(receipt.size_bytes) if receipt.size_bytes else ""
        done = f"{receipt.state:<7} {receipt.seconds:7.1f} s"
        self.console.print(f"  {MARKS[receipt.state]} {receipt.stage:<13} {done} {size:>10}{reason}")

    def say(self, text: str) -> None:
        self.console.print(text)


def verdict_lines(record: Mapping[str, Any]) -> list[str]:
    """The end of a run: verdict with the split of TPS/user, the gates that failed, the report and the endpoint."""
    metrics = record["metrics"]
    tps, length = metrics.get("latency.tps_per_user.p50"), metrics.get("acceptance.length")
    headline = ""
    if tps and length:
        headline = f"{tps:,.0f} tokens/s for one user = acceptance {length:.2f} / cycle {1000 * length / tps:.2f} ms"
    if tps and metrics.get("baseline.tps_per_user.p50"):
        headline += f", {tps / metrics['baseline.tps_per_user.p50']:.1f}x the BF16 baseline"
    colour = {"PASS": "green", "UNDERPOWERED": "yellow"}.get(record["verdict"], "red")
    lines = ["", f"  verdict   [bold {colour}]{record['verdict']}[/]  {headline}"]
    lines += [
        f"            [red]✗[/] {gate['metric']}: {escape(gate['reason'])}"
        for gate in record["gates"]
        if gate["verdict"] != "PASS"
    ]
    lines += [f"  {name:<9} {record[name]}" for name in ("report", "endpoint") if record.get(name)]
    return lines
