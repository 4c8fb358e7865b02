"""How every table of the pipeline is checked and written: pandera first, Parquet after.

A broken table raises IntegrityError naming row, column and value; nothing is coerced into looking right.
It refuses to hold schemas: each stage keeps its own beside what fills it.

Run: `python -m pytest tests/tasks/test_tables.py`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pandera.pandas as pa

from specs.errors import IntegrityError


def check(frame: pd.DataFrame, schema: Any, where: str = "") -> pd.DataFrame:
    """`frame`, checked against a pandera model or schema.

    Raises IntegrityError with the first broken row, column, value and rule, and how many there are.
    """
    try:
        checked: pd.DataFrame = schema.validate(frame, lazy=True)
        return checked
    except pa.errors.SchemaErrors as broken:
        cases = broken.failure_cases
        first = cases.iloc[0]
        row = "" if pd.isna(first["index"]) else f" row {int(first['index'])}"
        column = first["column"] if first["schema_context"] == "Column" else "(row)"
        value = first["failure_case"]
        value = value.item() if hasattr(value, "item") else value  # numpy's repr is not what was measured
        broke = f"column {column} value {value!r} breaks {first['check']}"
        name = (getattr(schema, "__name__", None) or schema.name or "").lower()
        raise IntegrityError(
            f"table {name}:{row} {broke} ({len(cases)} in all)", where, "the measurement is not usable; see the log"
        ) from broken


def write(frame: pd.DataFrame, path: Path) -> None:
    frame.to_parquet(path, index=False)
