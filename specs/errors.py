"""Every error kilotok raises on purpose.

What it is: one tree of twelve, each saying what happened, where, and what to do about it.

    KilotokError(what, where, fix)
      Transient                 retried; exit 3
        NetworkError            a hub, bucket or server did not answer
        LeaseHeld               another run owns the thing
      Terminal                  never retried; exit 3
        InputError              the user's input is wrong; exit 2
          SpecError             ... in the spec, at file, line and column
          LockError             ... the lock is missing or does not match the source
        IntegrityError          a hash, shape or scale is wrong
        StageFailed             a stage died; carries its log's path
        StoreError              the store is read-only, full or broken
        GateFailed              the build is fine but not good enough; exit 1

What it refuses to be: a class per message. A new message needs no new class.
Run it: nothing to run; `python -m pytest tests/specs/test_errors.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar


class KilotokError(Exception):
    """Base of all: str(e) is "what [where]: fix"."""

    exit_code: ClassVar[int] = 3
    extras: ClassVar[tuple[str, ...]] = ()  # attributes beyond what/where/fix, kept across process borders

    def __init__(self, what: str, where: str = "", fix: str = "", **extra: Any) -> None:
        unknown = set(extra) - set(self.extras)
        if unknown:
            raise TypeError(f"{type(self).__name__} takes no {sorted(unknown)}")
        self.what, self.where, self.fix = what, where, fix
        for name in self.extras:
            setattr(self, name, extra.get(name))
        super().__init__(what, where, fix)

    def __str__(self) -> str:
        place = f" [{self.where}]" if self.where else ""
        advice = f": {self.fix}" if self.fix else ""
        return f"{self.what}{place}{advice}"

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would lose the extras, and errors travel between processes.
        return (from_dict, (self.to_dict(),))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able record; `from_dict` brings the same error back in another process."""
        record: dict[str, Any] = {"class": type(self).__name__, "what": self.what, "where": self.where, "fix": self.fix}
        for name in self.extras:
            value = getattr(self, name)
            record[name] = value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
        return record

    @staticmethod
    def from_dict(record: dict[str, Any]) -> KilotokError:
        """See the module's function of the same name."""
        return from_dict(record)


class Transient(KilotokError):
    """May succeed when tried again."""


class NetworkError(Transient):
    """A hub, bucket or server did not answer."""


class LeaseHeld(Transient):
    """Another run owns the thing."""


class Terminal(KilotokError):
    """Trying again would fail again."""


class InputError(Terminal):
    """The user's input is wrong."""

    exit_code = 2


class SpecError(InputError):
    """The spec is wrong at a line and column: the key, its value and the rule it breaks."""

    extras = ("file", "line", "column", "key", "value", "rule")
    file: str | None
    line: int | None
    column: int | None
    key: str | None
    value: str | None
    rule: str | None


class LockError(InputError):
    """The lock is missing, or does not match the spec or the source."""


class IntegrityError(Terminal):
    """A hash, a shape or a scale is not what it must be."""


class StageFailed(Terminal):
    """A stage died; `log_path` tells the story."""

    extras = ("log_path",)
    log_path: str | None


class StoreError(Terminal):
    """The store is read-only, full or broken."""


class GateFailed(Terminal):
    """The build is sound but not good enough."""

    exit_code = 1


def from_dict(record: dict[str, Any]) -> KilotokError:
    """The error that `to_dict` wrote down; an unknown class comes back as StageFailed, never as a crash."""
    classes: dict[str, type[KilotokError]] = {"KilotokError": KilotokError, **_below(KilotokError)}
    kind = classes.get(str(record.get("class")), StageFailed)
    what, where, fix = (str(record.get(name) or "") for name in ("what", "where", "fix"))
    return kind(what, where, fix, **{name: record.get(name) for name in kind.extras})


def _below(kind: type[KilotokError]) -> dict[str, type[KilotokError]]:
    found: dict[str, type[KilotokError]] = {}
    for child in kind.__subclasses__():
        found[child.__name__] = child
        found.update(_below(child))
    return found
