"""Stage events to wherever somebody looks: the terminal of `kilotok run`, Prefect's logs, Prefect's artifacts.

Refuses to decide anything. The record of a build is in the store; what is written here is for people.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, cast
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from tasks.build import Build

TERMINAL: ContextVar[Callable[[Any], None] | None] = ContextVar("terminal", default=None)
PROGRESS_EVERY_S = 5.0  # an update is a request to the server; a page that moves every few seconds is alive enough

log = logging.getLogger("kilotok")
log.setLevel(logging.INFO)  # without it Prefect drops the lines


def narrate() -> Callable[[Any], None]:
    """A listener for one flow run."""
    narrator = _Narrator(TERMINAL.get())
    log.propagate = narrator.terminal is None  # the terminal has its own lines
    return narrator


class _Narrator:
    def __init__(self, terminal: Callable[[Any], None] | None) -> None:
        self.terminal = terminal
        self._bar: UUID | None = None
        self._last = 0.0

    def __call__(self, event: Any) -> None:
        if self.terminal:
            self.terminal(event)
        if event.kind == "started":
            self._bar, self._last = None, time.monotonic()
        elif event.kind == "progress":
            self._progress(event)
        elif event.kind == "finished":
            if self._bar:
                update_progress_artifact(self._bar, progress=100.0)
            receipt = event.receipt
            log.info(
                "%s %s in %.1f s: %s", receipt.stage, receipt.state, receipt.seconds, receipt.reason or receipt.uri
            )

    def _progress(self, event: Any) -> None:
        # Nothing that ends within the first interval gets a bar.
        if time.monotonic() - self._last < PROGRESS_EVERY_S or not event.total:
            return
        self._last, percent = time.monotonic(), min(100.0, 100.0 * event.done / event.total)
        if self._bar is None:
            self._bar = cast(UUID, create_progress_artifact(percent, key=None, description=event.stage))
        else:
            update_progress_artifact(self._bar, progress=percent, description=f"{event.stage}: {event.text}")


def publish_record(build: Build, record: dict[str, Any]) -> None:
    """The stage table, the gates and the report's Markdown as Prefect artifacts, by spec, with version history."""
    name = re.sub(r"[^a-z0-9]+", "-", build.spec.name.lower())
    create_table_artifact(record["stages"], key=f"stages-{name}", description=f"build {build.id}: {record['verdict']}")
    create_table_artifact(record["gates"] or [{"gate": "none"}], key=f"gates-{name}", description=record["verdict"])
    markdown = build.store.path(build.receipts["report"]) / "report.md"
    create_markdown_artifact(markdown.read_text(), key=f"report-{name}", description=str(record["report"]))
