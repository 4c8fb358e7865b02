"""Write prefect.yaml from the specs, so that a spec and its deployment cannot drift; a test holds the file in step.

One `rebuild/<spec>` for every spec, with its nightly schedule. A spec without `nightly` keeps an inactive
schedule, because
Prefect leaves an old schedule running when it disappears from the file.
Run it after adding or renaming a spec: `python infra/prefect/deployments.py --write`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from specs.load import load_spec

ROOT = Path(__file__).resolve().parents[2]
HEADER = """\
# Written by `python infra/prefect/deployments.py --write` from specs/*.yaml; a test holds it in step.
# Deploy: `python infra/prefect/setup.py` once (pools, automations), then `prefect --no-prompt deploy --all`.
# On another machine than this checkout, replace the pull step by git_clone (docs/operations.md).
"""
DEFAULT_POOL = "orchestrator"


def render(specs: list[Path]) -> str:
    """The whole file as text."""
    document = {
        "name": "kilotok",
        "pull": [{"prefect.deployments.steps.set_working_directory": {"directory": "{{ $PWD }}"}}],
        "deployments": [deployment(path) for path in sorted(specs)],
    }
    return HEADER + yaml.safe_dump(document, sort_keys=False, width=120)


def deployment(path: Path) -> dict[str, object]:
    """One spec's entry."""
    spec = load_spec(path, [])
    nightly = spec.nightly
    schedule = {
        "cron": nightly.cron if nightly else "0 2 * * *",
        "timezone": nightly.timezone if nightly else "UTC",
        "slug": "nightly",
        "active": nightly is not None,
    }
    return {
        "name": spec.name,
        "entrypoint": "flows/rebuild.py:rebuild",
        "description": f"Rebuild what changed of specs/{path.name}, measure it, promote it if every gate passes.",
        "tags": ["kilotok", spec.engine.backend],
        "parameters": {"spec": f"specs/{path.name}"},
        "work_pool": {"name": nightly.work_pool if nightly else DEFAULT_POOL},
        "concurrency_limit": {"limit": 1, "collision_strategy": "ENQUEUE"},
        "schedules": [schedule],
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
