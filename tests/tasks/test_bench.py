"""The GPU benches without a GPU: every case calls its op, and a slice reads the bytes that the predictor counts.

Run it: `python -m pytest tests/tasks/test_bench.py`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from specs.errors import InputError
from specs.load import load_spec
from tasks.bench import cases
from tasks.bench_slice import program
from tasks.predict.cost import cycle
from tasks.predict.hardware import load
from tasks.predict.prediction import draft_shape, setting_of, shape_of
from tasks.predict.shape import DraftShape, Shape

MAVERICK = Path(__file__).resolve().parents[2] / "specs" / "llama4-maverick-b200.yaml"
SMALL = Shape(
    hidden=64, layers=4, q_heads=16, kv_heads=8, head_dim=16, ffn_dense=128, vocab=512, moe_layers=2, ffn_expert=128,
    experts=4, shared_experts=1,
)  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 4])
def test_every_case_calls_its_op(tokens: int) -> None:
    ops = [case.op for case in cases(tokens, torch.device("cpu"), shrink=8) if case.make()() is not None]
    assert set(ops) >= {"qkv_attn_scaling", "fc13_swiglu", "moe_top1", "router", "allreduce_rmsnorm", "verify"}


def test_every_call_of_a_small_cycle_runs() -> None:
    steps = program(SMALL, DraftShape(ffn=256, vocab=512), 8, 3, 40, torch.device("cpu"))
    for step in steps:
        step.call()
    calls = Counter(step.operator for step in steps)
    assert (calls["qkv"], calls["norm"], calls["moe"], calls["dense_mlp"]) == (4, 9, 2, 4)
    assert (calls["draft_qkv"], calls["draft_fc"], calls["accept"]) == (3, 1, 1)


def test_a_slice_reads_what_the_predictor_counts() -> None:
    """At Maverick's real size, on a device without memory."""
    spec = load_spec(MAVERICK, [])
    shape, draft, b200 = shape_of(spec), draft_shape(spec, shape_of(spec)), load("b200")
    read: Counter[str] = Counter()
    for step in program(shape, draft, 8, 3, 1000, torch.device("meta")):
        read[step.operator] += step.bytes
    predicted = {row.name: row.bytes for row in cycle(b200, shape, draft, setting_of(spec, b200)).operators}
    for name in ("qkv", "attention", "o", "dense_mlp", "router", "lm_head", "draft_fc", "draft_qkv", "draft_lm_head"):
        assert read[name] == pytest.approx(predicted[name], rel=0.01), name
    experts = predicted["shared_expert"] + predicted["routed_experts"] * 4 / shape.distinct_experts(4)
    assert read["moe"] == pytest.approx(experts, rel=0.01)


def test_another_kind_of_model_is_refused() -> None:
    dense = Shape(hidden=64, layers=2, q_heads=8, kv_heads=8, head_dim=16, ffn_dense=128, vocab=512)
    with pytest.raises(InputError, match="top-1 experts"):
        program(dense, DraftShape(ffn=256, vocab=512), 1, 3, 40, torch.device("cpu"))
