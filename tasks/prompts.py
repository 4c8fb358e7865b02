"""Prompt files and chat templates, as the stages that read them agree on.

A prompts file is JSON Lines: `id`, `domain`, `prompt`, and optionally `answer`. Every fault is named by file and line.
Refuses to be a dataset library: no sampling policy beyond "the same share of every domain, in file order".
Run it: nothing to run; `python -m pytest tests/tasks/test_synthesize.py`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specs.errors import InputError, IntegrityError, LockError
from tasks.job import Job

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "generation_config.json",
    TEMPLATE_FILE,
)


@dataclass(frozen=True)
class Prompt:
    """One line of a prompts file."""

    id: str
    domain: str
    prompt: str
    answer: str = ""


def resolve(uri: str, job: Job) -> Path:
    """The local path of a data file; relative ones start at the repository root.

    One in a bucket or on a hub is fetched into the job's scratch and must be what the lock says, byte for byte.
    """
    if "://" in uri and not uri.startswith("file://"):
        return _fetch(uri, job)
    path = Path(uri.removeprefix("file://").removeprefix("file:"))
    return path if path.is_absolute() else job.root / path


def _fetch(uri: str, job: Job) -> Path:
    from tasks.edges.hub import open_file  # late: boto3 and huggingface_hub are slow, and rarely needed

    locked = ((job.lock or {}).get("data") or {}).get(uri)
    if locked is None:
        raise LockError("the lock does not have this data file", uri, "run: kilotok lock SPEC")
    target = job.scratch / "data" / hashlib.sha256(uri.encode()).hexdigest()[:12]
    if target.is_file():  # of an earlier attempt; it was checked before it got this name
        return target
    target.parent.mkdir(exist_ok=True)
    part, digest = target.with_suffix(".part"), hashlib.sha256()
    source, path = open_file(uri, job.root)
    with open(part, "wb") as stream:
        for piece in source.read(path):
            digest.update(piece)
            stream.write(piece)
    if digest.hexdigest() != locked["sha256"]:
        part.unlink()
        what = f"not what was locked: sha256 {digest.hexdigest()}, expected {locked['sha256']}"
        raise IntegrityError(what, uri, "restore the file; if the change is meant, run: kilotok lock SPEC")
    return part.rename(target)


def read_prompts(path: Path) -> list[Prompt]:
    """Every line of `path`; a broken one is refused by number, a skipped one would shift the balance."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError("prompts file not found", str(path), "check the path in the spec") from None
    except UnicodeDecodeError as error:
        raise InputError(f"prompts file is not UTF-8: {error.reason}", str(path), "re-encode it as UTF-8") from None
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt = _parse(line, f"{path}:{number}")
        if prompt.id in seen:
            raise InputError(
                f"id {prompt.id!r} is used twice", f"{path}:{number}", f"first used on line {seen[prompt.id]}"
            )
        seen[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise InputError("prompts file is empty", str(path), "one JSON object per line: id, domain, prompt")
    return prompts


def _parse(line: str, where: str) -> Prompt:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"broken JSON: {error.msg} at column {error.colno}", where, "fix or delete the line") from None
    if not isinstance(record, dict):
        raise InputError("line is not a JSON object", where, "one object per line: id, domain, prompt")
    for name in ("id", "domain", "prompt"):
        if not isinstance(record.get(name), str) or not record[name].strip():
            raise InputError(
                f"{name!r} is missing or not a non-empty string", where, "every line has id, domain, prompt"
            )
    answer = record.get("answer") or ""
    if not isinstance(answer, str):
        raise InputError("'answer' is not a string", where, "leave it out or write text")
    return Prompt(record["id"], record["domain"], record["prompt"], answer)


def balanced(prompts: list[Prompt], samples: int, path: Path) -> list[Prompt]:
    """`samples` prompts with equal shares per domain, in file order, domains interleaved.

    A domain with fewer prompts than its share is refused: the draft would silently train on less than the spec says.
    """
    by_domain: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_domain.setdefault(prompt.domain, []).append(prompt)
    domains = sorted(by_domain)
    shares = {domain: samples // len(domains) + (i < samples % len(domains)) for i, domain in enumerate(domains)}
    for domain, share in shares.items():
        have = len(by_domain[domain])
        if have < share:
            raise InputError(
                f"domain {domain!r} has {have} prompts, {share} are asked for ({samples} over {len(domains)} domains)",
                str(path),
                "add prompts or lower the number of samples",
            )
    rounds = max(shares.values())
    return [by_domain[d][i] for i in range(rounds) for d in domains if i < shares[d]]


def template_sha256(checkpoint: Path) -> str:
    """The digest of the chat template that `checkpoint` is served with; a missing template is refused."""
    path = checkpoint / TEMPLATE_FILE
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    config = checkpoint / "tokenizer_config.json"
    template = json.loads(config.read_text()).get("chat_template") if config.is_file() else None
    if not isinstance(template, str):
        raise InputError("the model has no chat template", str(path), "drafts are only good on the template they saw")
    return hashlib.sha256(template.encode()).hexdigest()


def chat_token_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of one user turn through the chat template, ready for the answer."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    return [int(token) for token in ids]
