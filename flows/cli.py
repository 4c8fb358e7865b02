"""The `kilotok` command. Exit 0 pass, 1 a gate failed, 2 the input is wrong, 3 a stage failed.

Refuses to hold logic: it joins the verbs of `flows/verbs/` and maps errors to one line and an exit code.
Run it: `kilotok --help`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from flows.verbs import artifacts, bench, build, deployments, endpoint, nightly, predict
from flows.verbs.surface import surface
from specs.errors import KilotokError

THEMES = (build, predict, nightly, endpoint, deployments, artifacts, bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run one verb, map errors to one line and an exit code."""
    arguments = parser().parse_args(argv)
    try:
        code = int(arguments.verb(arguments) or 0)
        sys.stdout.flush()
        return code
    except KilotokError as error:
        print(f"kilotok: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("kilotok: interrupted; run again to resume where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `kilotok explain SPEC | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return 0


def parser() -> argparse.ArgumentParser:
    """The whole surface; a test holds it against the README."""
    top = argparse.ArgumentParser(
        prog="kilotok", description="From one YAML spec to a served, measured, promoted LLM endpoint."
    )
    add = surface(top)
    for theme in THEMES:
        theme.register(add)
    return top


if __name__ == "__main__":
    sys.exit(main())
