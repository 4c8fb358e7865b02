"""Tell the commit how its night ended, through a webhook of the form that GitHub's commit status API has.

Slack and e-mail are Prefect's: automations set up by `infra/prefect/setup.py`. Refuses to fail a night that ended, and
to let a token out: it is resolved here, sent as a header, and in no record and no message.
Run it: by the nightly flow, for a spec with `nightly.commit_status`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from specs.errors import KilotokError
from tasks.edges.secrets import resolve_secret
from tasks.edges.service import post_json

if TYPE_CHECKING:
    from specs.schema import Spec

TIMEOUT_S = 20.0
LONGEST = 140  # characters of a description, by GitHub's rule
_STATES = {"unchanged": "success", "promoted": "success", "kept": "failure"}
log = logging.getLogger("kilotok")


def commit_status(spec: Spec, record: Mapping[str, Any]) -> bool:
    """Whether it was told; a failure is a line in the log."""
    nightly, commit = spec.nightly, str((record["git"] or {}).get("commit") or "")
    if nightly is None or nightly.commit_status is None or not commit:
        return False
    worse = any(finding["alarm"] for finding in record["findings"])
    state = "failure" if worse else _STATES.get(record["state"], "error")
    body = {"state": state, "context": f"kilotok/{spec.name}", "description": record["summary"][:LONGEST]}
    try:
        token = resolve_secret(nightly.token)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        post_json(nightly.commit_status.replace("{commit}", commit), body, headers, TIMEOUT_S)
    except (KilotokError, OSError, ValueError) as error:
        log.warning("the commit's status was not told: %s", error)
        return False
    return True
