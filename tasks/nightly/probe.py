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


def probe(spec: Spec, store: Store, runs: int) -> list[dict[str, float]]:
    """Metrics of each run; [] when nothing is live or the build that is live is no longer in the store."""
    from specs.receipts import Receipt
    from tasks.deployment import live_url
    from tasks.validate.live import measure_live

    url = live_url(store, spec.name)
    good = store.read_json(f"last_good/{spec.name}") or {}
    uri = next((row["uri"] for row in good.get("stages") or () if row["stage"] == "download"), "")
    if not url or not uri or runs < 1:
        return []
    checkpoint = store.path(Receipt("download", "", "cached", uri=uri))
    with tempfile.TemporaryDirectory() as folder:
        return measure_live(spec, checkpoint, url, runs, Path(folder))
