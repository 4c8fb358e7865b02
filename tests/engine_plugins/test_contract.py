"""Every op folder has a contract and a reference, and shapes outside it are refused. Run: `pytest
tests/engine_plugins`."""

from __future__ import annotations

import importlib

import pytest

from engine_plugins.native.compiler import OPS, OPS_DIR
from specs.errors import InputError


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_contract_reference_and_cpu_source(op: str) -> None:
    assert importlib.import_module(f"engine_plugins.ops.{op}.contract").CONTRACT.name == op
    assert importlib.import_module(f"engine_plugins.ops.{op}.reference")
    assert (OPS_DIR / op / "cpu.h").exists()


def test_a_shape_outside_names_axis_value_and_limit() -> None:
    contract = importlib.import_module("engine_plugins.ops.attention_decode.contract").CONTRACT
    contract.check(M=4, D=128)
    with pytest.raises(InputError, match=r"D=24 is outside.*multiple of 16"):
        contract.check(D=24)
