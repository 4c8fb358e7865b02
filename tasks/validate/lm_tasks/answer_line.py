"""Loads one domain's problems for lm-eval, without the Hub, without the network and without a cache to go stale.

It refuses to check them: `problems.read_problems` did, by file and line, before anything was asked.

Run: `lm-eval run --include_path FOLDER --tasks code ...` on a folder that `accuracy.write_tasks` wrote.
"""

from typing import Any


def load(path: str, **_: Any) -> dict[str, Any]:
    """{"test": dataset} from a JSON-lines file of one domain."""
    import json
    from pathlib import Path

    from datasets import Dataset

    return {
        "test": Dataset.from_list([json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()])
    }


def target(doc: dict[str, Any]) -> str:
    return doc["target"]
