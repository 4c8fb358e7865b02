"""Secrets, resolved at the moment of use and nowhere else.

What it is: `${env:NAME}` and `prefect://secret/NAME` to their values.
What it refuses to be: a cache, a log line or a default. A value never enters a spec, a key, a receipt or an error.
Run it: nothing to run; `python -m pytest tests/tasks/test_download.py`.
"""

from __future__ import annotations

import os

from specs.errors import InputError

_PREFECT = "prefect://secret/"


def resolve_secret(reference: str | None) -> str | None:
    """The value behind a reference; None for None; InputError if nothing is there."""
    if reference is None:
        return None
    if reference.startswith("${env:") and reference.endswith("}"):
        name = reference[len("${env:") : -1]
        value = os.environ.get(name)
        if not value:
            raise InputError(f"environment variable {name} is not set", reference, f"export {name}=...")
        return value
    if reference.startswith(_PREFECT):
        return _from_prefect(reference)
    raise InputError("not a reference to a secret", "", "write ${env:NAME} or prefect://secret/NAME")


def _from_prefect(reference: str) -> str:
    # Imported here: Prefect takes two seconds, and most specs name no secret.
    from prefect.blocks.system import Secret

    name = reference[len(_PREFECT) :]
    try:
        value = Secret.load(name).get()  # type: ignore[union-attr]
    except ValueError:
        raise InputError(
            f"Prefect has no secret block {name}", reference, f"create a Secret block named {name}"
        ) from None
    return str(value)
