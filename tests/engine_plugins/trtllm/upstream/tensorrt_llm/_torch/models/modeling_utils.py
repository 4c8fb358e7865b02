"""As upstream: the registry of model classes, where the last registration of a name wins."""

from __future__ import annotations

from typing import Any

MODEL_CLASS_MAPPING: dict[str, type] = {}


def register_auto_model(name: str) -> Any:
    def decorator(cls: type) -> type:
        MODEL_CLASS_MAPPING[name] = cls
        return cls

    return decorator
