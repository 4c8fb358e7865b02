"""The torch operators: registration, tracing, refusal of shapes, the all-reduce over processes. Run: `pytest
tests/engine_plugins/test_library.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch.library import opcheck

from engine_plugins.ops import library
from engine_plugins.ops.allreduce_rmsnorm.reference import allreduce_rmsnorm, allreduce_rmsnorm_of_group
from engine_plugins.ops.cuda.launch import symmetric_inboxes
from specs.errors import InputError
from tests.engine_plugins.formats import E4M3, assert_within_one_step, codes, normal, uniform

DRAFT = torch.tensor([1, 2])


def arguments() -> dict[str, tuple[object, ...]]:
    """Small valid arguments of every operator."""
    x, ones = codes(2, 32), torch.ones(48)
    moe = (codes(2, 32), normal(2, 32).bfloat16(), normal(2, 3), codes(32, 32), ones[:32], codes(32, 16), ones[:1])
    routed = (codes(3, 32, 32), torch.ones(3, 32), codes(3, 32, 16), ones[:3], ones[:3] * 9)
    part, p = normal(2, 16).bfloat16(), torch.softmax(normal(3, 8), -1)
    inbox, epoch = torch.zeros(1, dtype=torch.int64), torch.zeros(8, dtype=torch.int32)
    return {
        "gemm_low_latency": (x, codes(16, 32), ones[:16]),
        "qkv_attn_scaling": (x, codes(48, 32), ones, torch.tensor([3, 9000]), None, 16, 16, 16, 8192.0, 0.1),
        "qkv_attn_scaling_cache": (
            *(x, codes(48, 32), ones, torch.tensor([3, 7]), None, 16, 16, 16, 8192.0, 0.1),
            *(codes(9, 1, 16), codes(9, 1, 16), 0.5, 0.5),
        ),
        "fc13_swiglu": (x, codes(32, 32), ones[:1], ones[:1] * 9),
        "router": (normal(2, 32).bfloat16(), normal(5, 32).bfloat16()),
        "moe_top1": (*moe, *routed),
        "allreduce_rmsnorm": (part, part.clone(), torch.ones(16), inbox, epoch, 0, 1e-5, ones[:1] * 9),
        "attention_decode": (
            *(normal(2, 4, 16).bfloat16(), codes(9, 2, 16), codes(9, 2, 16)),
            *(torch.tensor([4, 5]), 0.1, 0.1, 0),
        ),
        "verify_greedy": (normal(3, 8), DRAFT),
        "verify_sampling": (p, p[:2].clone(), DRAFT, torch.tensor([0.1, 0.2, 0.3])),
    }


@pytest.mark.parametrize("op", arguments())
def test_an_operator_keeps_torch_s_contract(op: str) -> None:
    """No hidden mutation, and a fake implementation with the real one's shapes and types."""
    given = arguments()[op]
    eight_bit = any(isinstance(a, torch.Tensor) and a.dtype == E4M3 for a in given)  # torch cannot compare those
    tests = ("test_faketensor",) if eight_bit else ("test_schema", "test_faketensor")
    opcheck(getattr(torch.ops.kilotok, op).default, given, test_utils=tests)


def on_gpu(op: str) -> list[torch.Tensor]:
    """What the op gives for small arguments on the GPU, and after a replay of its captured graph."""
    given = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments()[op]]
    call = getattr(torch.ops.kilotok, op)
    call(*given)  # compiles what must be compiled
    if op == "allreduce_rmsnorm":
        given[4] = torch.zeros_like(given[4])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(*given)
    graph.replay()
    torch.cuda.synchronize()
    return [t.cpu() for t in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("op", arguments())
def test_a_captured_operator_is_its_reference(op: str) -> None:
    result = getattr(torch.ops.kilotok, op)(*arguments()[op])
    for got, expected in zip(on_gpu(op), result if isinstance(result, tuple) else (result,), strict=True):
        if got.is_floating_point():
            assert_within_one_step(got, expected.double(), 1e-4 * expected.double().abs().max())
        else:
            assert torch.equal(got, expected)


def test_what_really_ran_is_counted() -> None:
    before = library.served["router", "reference"]
    torch.ops.kilotok.router(*arguments()["router"])
    assert library.served["router", "reference"] == before + 1


def test_a_shape_that_the_gpu_cannot_take_is_refused_while_tracing() -> None:
    with torch.device("meta"), pytest.raises(InputError, match=r"M=9 is outside the contract \[router\]: 1 <= M <= 8"):
        torch.ops.kilotok.router(torch.empty(9, 32).bfloat16(), torch.empty(4, 32).bfloat16())


def test_any_process_that_imports_the_package_has_the_operators() -> None:
    """As a TensorRT-LLM worker would: no spec, no store, no working directory of ours."""
    code = "import torch, engine_plugins.ops.library; print(torch.ops.kilotok.moe_top1.default)"
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env={"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert run.stdout.strip() == "kilotok.moe_top1.default", run.stderr


def _rank(rank: int, ranks: int, file: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    parts = [normal(3, 32, seed=r).bfloat16() for r in range(ranks)]
    residual, weight = normal(3, 32, seed=9).bfloat16(), uniform(32, low=0.5, high=2.0)
    expected = allreduce_rmsnorm([p.float() for p in parts], residual.float(), weight, 1e-5, 0.01)
    got = allreduce_rmsnorm_of_group(parts[rank].float(), residual.float(), weight, 1e-5, 0.01)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    inboxes, epoch = torch.zeros(ranks, dtype=torch.int64), torch.zeros(8, dtype=torch.int32)
    y8, _, _ = torch.ops.kilotok.allreduce_rmsnorm(
        parts[rank], residual, weight, inboxes, epoch, rank, 1e-5, torch.tensor([100.0])
    )
    assert torch.equal(y8.float(), (expected[0] / 0.01).clamp(-448, 448).to(E4M3).float())
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 4])
def test_allreduce_over_processes(ranks: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (ranks, str(tmp_path / "rendezvous")), nprocs=ranks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_inboxes_in_symmetric_memory(tmp_path: Path) -> None:
    """One rank, because one GPU: the rendezvous, and an all-reduce whose addresses it gave."""
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        inboxes, kept = symmetric_inboxes(32, torch.distributed.group.WORLD)
        assert inboxes.tolist() == [kept.data_ptr()]
        part, residual, weight = (
            normal(3, 32).bfloat16(),
            normal(3, 32, seed=9).bfloat16(),
            uniform(32, low=0.5, high=2.0),
        )
        tensors = [t.cuda() for t in (part, residual, weight)]
        epoch, inverse = torch.zeros(8, dtype=torch.int32).cuda(), torch.tensor([100.0]).cuda()
        _, y, _ = torch.ops.kilotok.allreduce_rmsnorm(*tensors, inboxes, epoch, 0, 1e-5, inverse)
        expected, _ = allreduce_rmsnorm([part.float()], residual.float(), weight, 1e-5)
        assert_within_one_step(y.cpu(), expected, 1e-4)
    finally:
        torch.distributed.destroy_process_group()
