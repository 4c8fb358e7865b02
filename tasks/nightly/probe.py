"""The nightly A/A run: what is live, measured a few times with nothing changed in between.

Refuses to build, to start and to judge. Run it: `python -m tasks.validate.live SPEC RUNS`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specs.schema import Spec
    from tasks.store import Store


NOTHING_LIVE, BUSY = "nothing is live", "the machine was busy with other work"


def probe(spec: Spec, store: Store, runs: int) -> tuple[list[dict[str, float]], str]:
    """(metrics of each run, why there are none); the live build's tokenizer must still be in the store."""
    from specs.receipts import Receipt
    from tasks.deployment import live_url
    from tasks.validate.live import measure_live

    url = live_url(store, spec.name)
    good = store.read_json(f"last_good/{spec.name}") or {}
    uri = next((row["uri"] for row in good.get("stages") or () if row["stage"] == "download"), "")
    if runs < 1:
        return [], ""
    if not url or not uri:
        return [], NOTHING_LIVE
    checkpoint = store.path(Receipt("download", "", "cached", uri=uri))
    with tempfile.TemporaryDirectory() as folder:
        measured = measure_live(spec, checkpoint, url, runs, Path(folder))
    return measured, "" if measured else BUSY
