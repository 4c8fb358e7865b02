"""Write prefect.yaml from the specs, so that a spec and its deployments cannot drift; a test holds the file in step.

`rebuild/<spec>` for every spec, run when asked; `nightly/<spec>` for each with a `nightly:` section, run by its cron.
Code is pulled from Git by branch at every run, into a folder that stays: a live server runs from it. Where from and
where to are variables of the Prefect server, set by `setup.py`, so that `prefect deploy --all` is the same anywhere.
Run it after adding or renaming a spec: `python infra/prefect/deployments.py --write`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from specs.load import load_spec
from specs.schema import Spec

ROOT = Path(__file__).resolve().parents[2]
HEADER = """\
# Written by `python infra/prefect/deployments.py --write` from specs/*.yaml; a test holds it in step.
# Deploy: `python infra/prefect/setup.py`, which is idempotent. It sets the server's variables kilotok_repository,
# _branch, _home and _store, creates pools and automations, runs `prefect deploy --all`, and prunes.
"""
DEFAULT_POOL = "orchestrator"


def render(specs: list[Path]) -> str:
    """The whole file as text."""
    clone = {
        "repository": "{{ prefect.variables.kilotok_repository }}",
        "branch": "{{ prefect.variables.kilotok_branch }}",
        "clone_directory_name": "checkout",  # never the store: a broken pull deletes the clone and clones again
    }
    document = {
        "name": "kilotok",
        "pull": [{"prefect.deployments.steps.git_clone": clone}],
        "deployments": [entry for path in sorted(specs) for entry in deployments(path)],
    }
    return HEADER + yaml.safe_dump(document, sort_keys=False, width=120)


def deployments(path: Path) -> list[dict[str, Any]]:
    """One spec's entries."""
    spec = load_spec(path, [])
    text = f"Rebuild what changed of specs/{path.name}, measure it, promote it if every gate passes."
    found = [entry(path, spec, "rebuild", text)]
    if spec.nightly:
        text = f"The night of specs/{path.name}: drift, rebuild, gates, A/A runs, regressions and their causes."
        schedule = {"cron": spec.nightly.cron, "timezone": spec.nightly.timezone, "slug": "nightly", "active": True}
        found.append({**entry(path, spec, "nightly", text), "schedules": [schedule]})
    return found


def entry(path: Path, spec: Spec, flow: str, description: str) -> dict[str, Any]:
    """What the two have in common."""
    pool = spec.nightly.work_pool if spec.nightly else DEFAULT_POOL
    return {
        "name": spec.name,
        "entrypoint": f"flows/{flow}.py:{flow}",
        "description": description,
        "tags": ["kilotok", flow, spec.engine.backend],
        "parameters": {"spec": f"specs/{path.name}", "store": "{{ prefect.variables.kilotok_store }}"},
        "work_pool": {"name": pool, "job_variables": {"working_dir": "{{ prefect.variables.kilotok_home }}"}},
        "concurrency_limit": {"limit": 1, "collision_strategy": "ENQUEUE"},
        "schedules": [],
    }


def main() -> int:
    """Print, or with --write replace, prefect.yaml."""
    text = render(list((ROOT / "specs").glob("*.yaml")))
    if "--write" in sys.argv:
        (ROOT / "prefect.yaml").write_text(text)
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
