"""What a bundle leaves open until it is started: {checkpoint}, {draft}, {args}, {host} and {port} in its plain data.

Refuses to be a template language. Used by `render` and, inside the engine's environment, by `front`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def filled(value: Any, values: Mapping[str, str]) -> Any:
    """Plain data with every {name} of `values` in its texts replaced."""
    if isinstance(value, dict):
        return {key: filled(below, values) for key, below in value.items()}
    if isinstance(value, list):
        return [filled(below, values) for below in value]
    if isinstance(value, str):
        for name, text in values.items():
            value = value.replace(f"{{{name}}}", text)
    return value
