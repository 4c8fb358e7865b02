"""stages.parquet: one row per stage of a build, checked by pandera: what it took, cost, and why it was built.

Refuses to explain: the reasons are the plan's own words.
Read it: `python -c "import pandas as pd; print(pd.read_parquet('stages.parquet'))"`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pandera.pandas as pa

from tasks.tables import check, write

NUMBERS = ("seconds", "size_bytes", "cost")
STAGES = pa.DataFrameSchema(
    {
        "stage": pa.Column(str, pa.Check.str_length(min_value=1), unique=True),
        "state": pa.Column(str, pa.Check.str_length(min_value=1)),
        "seconds": pa.Column(float, pa.Check.ge(0), nullable=True),
        "size_bytes": pa.Column(float, pa.Check.ge(0), nullable=True),
        "reason": pa.Column(str),
        "key": pa.Column(str),
        "digest": pa.Column(str),
        "uri": pa.Column(str),
        "cost": pa.Column(float, pa.Check.ge(0), nullable=True),
        "currency": pa.Column(str),
    },
    strict=True,
    name="stages",
)


def write_stages(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Checks and writes the table."""
    frame = pd.DataFrame(list(rows), columns=list(STAGES.columns)).astype(dict.fromkeys(NUMBERS, float))
    write(check(frame, STAGES, path.name), path)
