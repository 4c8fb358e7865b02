"""Errors say what, where and fix, and survive the trip between processes."""

import json
import pickle

import pytest

from specs import errors

EVERY = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.KilotokError)]


def test_reads_what_where_fix() -> None:
    assert str(errors.InputError("port 8311 is taken", "deploy.port", "choose another")) == "port 8311 is taken [deploy.port]: choose another"  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_crosses_processes_whole(kind: type[errors.KilotokError]) -> None:
    extra = {name: 7 if name in ("line", "column") else "x" for name in kind.extras}
    error = kind("what", "where", "fix", **extra)
    for back in (errors.from_dict(json.loads(json.dumps(error.to_dict()))), pickle.loads(pickle.dumps(error))):
        assert type(back) is kind and back.to_dict() == error.to_dict()


def test_unknown_class_does_not_crash_the_reader() -> None:
    assert isinstance(errors.from_dict({"class": "FromTheFuture", "what": "x"}), errors.StageFailed)


def test_docstring_lists_every_class() -> None:
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in EVERY)
