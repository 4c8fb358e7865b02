"""layers.parquet: one row per quantized tensor, checked by pandera before anyone reads it.

Refuses to hold judgements: limits live in `detectors.py`.
Read it: `python -c "import pandas as pd; print(pd.read_parquet('layers.parquet'))"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pandera.pandas as pa

from tasks.quantize.detectors import TensorRow
from tasks.tables import check, write

LAYERS = pa.DataFrameSchema(
    {
        "name": pa.Column(str),
        "kind": pa.Column(str, pa.Check.isin(["weight", "input", "kv"])),
        "scale": pa.Column(float, pa.Check.gt(0)),
        "amax": pa.Column(float, pa.Check.ge(0)),
        "sqnr_db": pa.Column(float, pa.Check.in_range(-20, 200)),
        "saturation_share": pa.Column(float, pa.Check.in_range(0, 1)),
    },
    unique=["name", "kind"],
    strict=True,
    name="layers",
)


def write_layers(rows: Sequence[TensorRow], path: Path) -> pd.DataFrame:
    """Checks and writes the table; returns it for the metrics."""
    frame = check(pd.DataFrame([asdict(row) for row in rows]), LAYERS, path.name)
    write(frame, path)
    return frame
