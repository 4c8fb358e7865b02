"""The problems file: JSON lines of id, domain, prompt, target, read strictly before anything is asked.

It refuses duplicates, empty domains and broken lines, each by file and line: a problem counted twice or not at all
shifts every figure of the report.

Run: `python -m pytest tests/tasks/test_accuracy.py`
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from specs.errors import InputError
from specs.validation import NAMED_TASKS


@dataclass(frozen=True)
class Problem:
    """One question with its right answer."""

    id: str
    domain: str
    prompt: str
    target: str


def read_problems(path: Path) -> list[Problem]:
    """All problems, in file order. Raises InputError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"the problems file cannot be read: {error.strerror}", str(path), "check validate.accuracy.problems"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"the problems file is not UTF-8 at byte {error.start}", str(path), "save it as UTF-8"
        ) from error
    seen: dict[str, int] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        problem = _parse(line, where)
        if problem.id in seen:
            raise InputError(
                f"id {problem.id!r} is already on line {seen[problem.id]}", where, "give each problem its own id"
            )
        seen[problem.id] = number
        problems.append(problem)
    if not problems:
        raise InputError(
            "the problems file is empty", str(path), "one JSON object per line: id, domain, prompt, target"
        )
    return problems


def _parse(line: str, where: str) -> Problem:
    fix = "one JSON object per line with the strings id, domain, prompt, target"
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InputError(f"not JSON: {error}", where, fix) from error
    if not isinstance(entry, dict):
        raise InputError(f"not an object but {type(entry).__name__}", where, fix)
    values = []
    for name in ("id", "domain", "prompt", "target"):
        value = entry.get(name)
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{name} is {'missing' if value is None else f'{value!r}'}", where, fix)
        values.append(value)
    return Problem(*values)


def by_task(
    problems: Sequence[Problem], tasks: Sequence[str], samples: int | None, where: str
) -> dict[str, list[Problem]]:
    """The local tasks among `tasks` with their problems, at most `samples` each.

    Raises InputError for an empty domain.
    """
    found: dict[str, list[Problem]] = {}
    for task in tasks:
        members = [problem for problem in problems if problem.domain == task]
        if members:
            found[task] = members[:samples] if samples else members
        elif task not in NAMED_TASKS:
            domains = ", ".join(sorted({problem.domain for problem in problems})) or "none"
            known = ", ".join(NAMED_TASKS)
            raise InputError(f"task {task!r} has no problems", where, f"domains there: {domains}; lm-eval's: {known}")
    return found
