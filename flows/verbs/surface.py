"""What every verb shares: how it is declared, and how a spec is named where only its name matters.

Refuses to know any verb. Used by `flows/cli.py` and the modules beside this one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Protocol

DEFAULT_STORE = ".kilotok/store"


class Surface(Protocol):
    """Declares one verb: `add(name, function, help)` returns its parser, to which the verb adds what is its own."""

    def __call__(
        self, name: str, function: Any, text: str, *, spec: bool = True, store: bool = True, as_json: bool = False
    ) -> argparse.ArgumentParser: ...


def surface(top: argparse.ArgumentParser) -> Surface:
    """Verbs of `top`; the arguments that several share are spelled once, here."""
    verbs = top.add_subparsers(required=True, metavar="VERB")

    def add(
        name: str, function: Any, text: str, *, spec: bool = True, store: bool = True, as_json: bool = False
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(verb=function)
        if spec:
            sub.add_argument("spec", metavar="SPEC", help="path of a spec")
            sub.add_argument(
                "--set",
                dest="overrides",
                metavar="K=V",
                action="append",
                default=[],
                help="override a key: draft.training.epochs=3",
            )
        if store:
            sub.add_argument(
                "--store",
                metavar="URI",
                default=DEFAULT_STORE,
                help=f"directory or s3://bucket/prefix (default {DEFAULT_STORE})",
            )
        if as_json:
            sub.add_argument("--json", dest="as_json", action="store_true", help="print one JSON object on stdout")
        return sub

    return add


def spec_name(spec: str | None) -> str | None:
    """A spec may be given by path or by name where only its name matters."""
    if spec and spec.endswith((".yaml", ".yml")):
        from specs.load import load_spec

        return str(load_spec(Path(spec), []).name)
    return spec
