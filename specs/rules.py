"""The rules for single values of a spec, each with the sentence the user reads when it is broken.

What it is: validators for URIs, names, versions, cron lines and secret references, and the search for literal secrets.
What it refuses to be: aware of sections. Rules between fields are in schema.py.
Run it: `python -m pytest tests/specs/test_schema.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A part of the spec: frozen, strict, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def measured(default: Any, unit: str, description: str, **limits: Any) -> Any:
    """A field with a unit, which the JSON Schema carries as `x-unit`."""
    return Field(default, description=description, json_schema_extra={"x-unit": unit}, **limits)


def section(kind: type[Section]) -> Any:
    """A section that may be left out; its docstring is its description."""
    return Field(default_factory=kind, description=kind.__doc__)


PLUGINS = (
    "gemm_low_latency",
    "qkv_attn_scaling",
    "fc13_swiglu",
    "moe_top1",
    "router",
    "allreduce_rmsnorm",
    "attention_decode",
    "verify",
)
REFERENCE = re.compile(r"\$\{env:[A-Za-z_][A-Za-z0-9_]*\}|prefect://secret/[A-Za-z0-9_-]+")
_LITERAL_SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    "an AWS access key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_|github_pat_)[A-Za-z0-9_]{20,}"),
    "an API key": re.compile(r"\b(?:sk|nvapi|xox[abp])-[A-Za-z0-9_-]{20,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a password in a URI": re.compile(r"^[a-z0-9+]+://[^/@\s]+:[^/@\s]+@"),
}
_SECRET_KEY = re.compile(r"(?:^|_)(?:password|passwd|secret|api_key|access_key|private_key|hf_token)$", re.IGNORECASE)


def find_secrets(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """(path, kind) of every literal secret, and of every `${...}` that is no reference."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from find_secrets(below, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, below in enumerate(value):
            yield from find_secrets(below, (*path, index))
    elif isinstance(value, str):
        kind = _secret_kind(value, str(path[-1]) if path else "")
        if kind:
            yield path, kind


def _secret_kind(text: str, key: str) -> str:
    if REFERENCE.fullmatch(text):
        return ""
    for kind, pattern in _LITERAL_SECRETS.items():
        if pattern.search(text):
            return kind
    if _SECRET_KEY.search(key) and text:
        return "a secret by the name of its key"
    return "a reference of unknown form" if "${" in text or text.startswith("prefect://") else ""


def _matches(pattern: str, sentence: str) -> AfterValidator:
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise ValueError(sentence)
        return value

    return AfterValidator(check)


def _checked(check: Callable[[str], str | None]) -> AfterValidator:
    def run(value: str) -> str:
        complaint = check(value)
        if complaint:
            raise ValueError(complaint)
        return value

    return AfterValidator(run)


def _source(value: str) -> str | None:
    if re.fullmatch(r"hf://[\w.-]+/[\w.-]+(/[^\s]+)?|s3://[a-z0-9][a-z0-9.-]+(/[^\s]*)?|file:[^\s].*", value):
        if value.startswith("file:") and ".." in value[5:].split("/"):
            return "a file: path climbs with `..`; write it relative to the repository root"
        return None
    return "no source kilotok can read; write hf://ORG/NAME, s3://BUCKET/PREFIX or file:PATH"


def _plugin(value: str) -> str | None:
    if value in PLUGINS:
        return None
    close = get_close_matches(value, PLUGINS, 1)
    return f"no such op; {f'did you mean {close[0]}?' if close else 'the ops are ' + ', '.join(PLUGINS)}"


_CRON_LIMITS = (("minute", 0, 59), ("hour", 0, 23), ("day", 1, 31), ("month", 1, 12), ("weekday", 0, 7))
_CRON_PART = re.compile(r"(?:\*|(\d+)(?:-(\d+))?)(?:/(\d+))?")


def _cron(value: str) -> str | None:
    fields = value.split()
    if len(fields) != len(_CRON_LIMITS):
        return f'{len(fields)} cron fields, not five; write minute hour day month weekday, such as "0 2 * * *"'
    for text, (name, low, high) in zip(fields, _CRON_LIMITS, strict=True):
        for part in text.split(","):
            match = _CRON_PART.fullmatch(part)
            if match is None or any(not low <= int(number) <= high for number in match.groups()[:2] if number):
                return f"cron {name} {text!r} is wrong; it goes from {low} to {high}"
    return None


def _timezone(value: str) -> str | None:
    if value == "UTC":  # a machine without tzdata knows no zone at all, and UTC needs none
        return None
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return "no such time zone; write an IANA name such as Europe/Berlin"
    return None


SOURCE = _checked(_source)
PLUGIN = _checked(_plugin)
CRON = _checked(_cron)
TIMEZONE = _checked(_timezone)
NAME = _matches(
    r"[a-z0-9][a-z0-9.-]{0,62}", "no usable name; take at most 63 lower-case letters, digits, dots and dashes"
)
METRIC = _matches(r"[a-z][\w-]*(\.[\w-]+)+", "no metric name; write a dotted one such as latency.tps_per_user.p50")
VERSION = _matches(r"\d+\.\d+(\.\d+)?(rc\d+)?", "no version; write one such as 1.2.1 or 1.3.0rc22")
RECIPE = _matches(
    r"(file:)?[\w.-]+(/[\w.-]+)*",
    "no recipe; write a name such as general/ptq/fp8_default-kv_fp8, or file:PATH of a YAML",
)
ARTIFACT = _matches(
    r"last_good|(\S+/)?train_draft/[0-9a-f]{8,64}",
    "no draft to start from; write last_good, or an artifact such as train_draft/3fa9c2d1 (kilotok store ls)",
)
SECRET_REFERENCE = _checked(
    lambda value: (
        None
        if REFERENCE.fullmatch(value)
        else "not a reference to a secret; write ${env:NAME} or prefect://secret/NAME"
    )
)
