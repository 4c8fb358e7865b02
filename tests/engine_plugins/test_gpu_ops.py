"""Seven GPU ops, CUDA and Triton, against their references on adversarial inputs: odd sizes, saturation, zeros, poison.

CUDA runs on the emulator (every index, predicate, fragment and barrier of the real source), Triton in its interpreter.
Run it: `python -m pytest tests/engine_plugins/test_gpu_ops.py` (needs g++, no GPU and no nvcc).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine_plugins.ops.allreduce_rmsnorm.reference import allreduce_rmsnorm
from engine_plugins.ops.attention_decode.reference import attention_decode
from engine_plugins.ops.compile import compile_cuda
from engine_plugins.ops.cuda.launch import inbox_bytes
from engine_plugins.ops.fc13_swiglu.reference import fc13_swiglu
from engine_plugins.ops.formats import Linear
from engine_plugins.ops.library import architecture_of
from engine_plugins.ops.moe_top1.reference import moe_top1
from engine_plugins.ops.qkv_attn_scaling.reference import qkv_attn_scaling
from tests.engine_plugins.devices import OPS, Emulated, Interpreted, OnGpu, build
from tests.engine_plugins.formats import E4M3, assert_within_one_step, codes, normal, uniform

Gpu = Emulated | Interpreted | OnGpu


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(build(tmp_path_factory.mktemp("emulated") / "kernels.so"))


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> OnGpu:
    if not torch.cuda.is_available() or shutil.which("nvcc") is None:
        pytest.skip("no GPU, or no nvcc")
    plugins = tmp_path_factory.mktemp("compiled")
    record = compile_cuda(plugins, architecture_of())
    assert record is not None
    return OnGpu(plugins / record["file"])


@pytest.fixture(params=["emulated", "interpreted", "on_gpu"])
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    device = Interpreted() if request.param == "interpreted" else request.getfixturevalue(request.param)
    yield device
    assert device.finish() == ""


def gemm(gpu: Gpu, x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    gpu.made_before(w)
    gpu.made_by_the_kernel_before(x)
    y = gpu.gemm_low_latency(x, w, scale)
    assert gpu.finish() == ""
    return y


def check_gemm(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> None:
    products = x.double()[:, None, :] * (w.double() * scale.double()[:, None])[None]
    assert_within_one_step(y, products.sum(-1), 2e-6 * products.abs().sum(-1))


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 8, 16), (1, 1, 16), (2, 9, 48), (4, 17, 80), (5, 896, 640), (8, 40, 656), (9, 33, 48), (16, 24, 5120)],
)
def test_fp8_gemm(gpu: Gpu, m: int, n: int, k: int) -> None:
    x, w, scale = codes(m, k, seed=m), codes(n, k, seed=n + 1), uniform(n, low=1e-4, high=2.0)
    check_gemm(gemm(gpu, x, w, scale), x, w, scale)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 8), (4, 21, 264), (8, 8, 10240), (13, 8, 72)])
def test_bf16_gemm(gpu: Gpu, m: int, n: int, k: int) -> None:
    x, w = normal(m, k).bfloat16(), normal(n, k, seed=1).bfloat16()
    check_gemm(gemm(gpu, x, w, None), x, w, torch.ones(n))


def test_a_row_larger_than_the_registers_is_loaded_in_batches(gpu: Gpu) -> None:
    x, w, scale = codes(3, 16384, seed=3), codes(8, 16384, seed=4), torch.ones(8)
    check_gemm(gemm(gpu, x, w, scale), x, w, scale)


def test_one_scale_for_all_rows(gpu: Gpu) -> None:
    x, w = codes(3, 64), codes(24, 64, seed=1)
    check_gemm(gemm(gpu, x, w, torch.tensor([0.125])), x, w, torch.full((24,), 0.125))


@pytest.mark.parametrize("value", [448.0, -448.0, 2.0**-9, 0.0])
def test_saturated_smallest_and_zero_operands(gpu: Gpu, value: float) -> None:
    x, w = torch.full((4, 96), value).to(E4M3), torch.full((16, 96), value).to(E4M3)
    check_gemm(gemm(gpu, x, w, torch.ones(16)), x, w, torch.ones(16))


@pytest.mark.parametrize("m", [1, 4, 8])
@pytest.mark.parametrize("rope", [True, False])
def test_qkv(gpu: Gpu, m: int, rope: bool) -> None:
    heads, kv_heads, dim, hidden, in_scale = 3, 1, 16, 96, 0.02
    q_rows, k_rows, rows = heads * dim, kv_heads * dim, (heads + 2 * kv_heads) * dim
    x, w, scale = codes(m, hidden), codes(rows, hidden, seed=1), uniform(rows, low=1e-3, high=1e-2)
    position = torch.tensor([0, 1, 8190, 8191, 8192, 20000, 131071, 7])[:m]
    inv_freq = 500000.0 ** -(torch.arange(0, dim, 2) / dim)
    angle = torch.arange(131072).float()[:, None] * inv_freq
    table = torch.stack((angle.cos(), angle.sin()), dim=-1).contiguous() if rope else None
    gpu.made_before(w)
    gpu.made_before(position)
    gpu.made_by_the_kernel_before(x)
    y = gpu.qkv_attn_scaling(x, w, scale * in_scale, position, table, q_rows, k_rows, dim, 0.0 if rope else 8192.0, 0.1)
    parts = [Linear(part, in_scale) for part in (w.float() * scale[:, None]).split((q_rows, k_rows, k_rows))]
    expected = qkv_attn_scaling(
        x.float() * in_scale,
        *parts,
        position,
        head_dim=dim,
        inv_freq=inv_freq if rope else None,
        interleaved=True,
        qk_norm_eps=None,
        temperature=(8192.0, 0.1),
    )
    sums = (x.double().abs() @ (w.double().abs() * scale.double()[:, None]).T) * in_scale
    assert_within_one_step(y, torch.cat([part.flatten(1) for part in expected], 1), 8e-6 * sums)


@pytest.mark.parametrize("bf16", [False, True])
def test_qkv_writes_the_cache(gpu: Gpu, bf16: bool) -> None:
    """Keys and values at their positions, in units of their scales, and nothing else."""
    m, dim, hidden, inverse = 3, 16, 96, (2.0, 40.0)
    x, w = codes(m, hidden), codes(3 * dim, hidden, seed=1)
    x, w = (x.bfloat16(), w.bfloat16()) if bf16 else (x, w)
    position, scale = torch.tensor([5, 6, 9]), torch.full((1,), 0.01)
    caches = [torch.full((12, 1, dim), 0x55, dtype=torch.uint8).view(E4M3) for _ in range(2)]
    gpu.made_before(w)
    gpu.made_before(position)
    gpu.made_by_the_kernel_before(x)
    y = gpu.qkv_attn_scaling(x, w, scale, position, None, dim, dim, dim, 0.0, 0.1, *caches, *inverse)
    expected = x.double() @ w.double().T * 0.01
    assert_within_one_step(y, expected, 1e-6 * expected.abs().max())
    for cache, part, inv in zip(caches, expected.split(dim, 1)[1:], inverse, strict=True):
        assert_within_one_step(cache[position, 0], part * inv, 1e-5 * part.abs() * inv)
        untouched = [p for p in range(12) if p not in position.tolist()]
        assert cache.view(torch.uint8)[untouched].eq(0x55).all()


@pytest.mark.parametrize(
    ("positions", "chunk", "group", "kv_heads"),
    [
        ([0], 0, 1, 1),  # one key
        ([1000, 1001, 1002, 1003], 0, 5, 1),  # 20 rows: two tiles of rows
        ([126, 127, 128, 129], 128, 5, 2),  # rows of one step on both sides of a chunk border
        ([300], 128, 2, 2),  # a chunk that starts inside a block
        ([63, 64], 0, 3, 1),
    ],
)
def test_attention(gpu: Gpu, positions: list[int], chunk: int, group: int, kv_heads: int) -> None:
    """Head size 128. What no row may see is NaN in the cache; queries are a slice of wider rows."""
    dim, m, k_scale, v_scale = 128, len(positions), 0.02, 0.25
    rows = normal(m, kv_heads * group * dim + 64, seed=1).bfloat16() * 4
    q = rows[:, : kv_heads * group * dim].unflatten(1, (-1, dim))
    k, v = (codes(1200, kv_heads, dim, seed=seed, high=4.0) for seed in (2, 3))
    position = torch.tensor(positions)
    expected = attention_decode(q.float(), k.float() * k_scale, v.float() * v_scale, position, chunk)
    first = min(positions) // chunk * chunk if chunk else 0
    for cache in (k, v):
        cache.view(torch.uint8)[max(positions) + 1 :] = 0x7F
        cache.view(torch.uint8)[:first] = 0x7F
    fresh = [cache[p : p + 1] for cache in (k, v) for p in positions]
    gpu.made_before(position, k, v)
    gpu.made_by_the_kernel_before(rows, *fresh)
    y = gpu.attention_decode(q, k, v, position, k_scale, v_scale, chunk)
    assert_within_one_step(y, expected, 2e-3 * v_scale * 4)
    y8 = gpu.attention_decode(q, k, v, position, k_scale, v_scale, chunk, torch.tensor([50.0]))
    assert_within_one_step(y8, expected * 50.0, 2e-3 * v_scale * 4 * 50.0)


def test_attention_survives_scores_that_overflow_exp(gpu: Gpu) -> None:
    q, k = torch.full((2, 1, 128), 100.0).bfloat16(), torch.full((8, 1, 128), 448.0).to(E4M3)
    v, position = codes(8, 1, 128, high=2.0), torch.tensor([6, 7])
    gpu.made_before(position)
    gpu.made_by_the_kernel_before(q, k, v)
    y = gpu.attention_decode(q, k, v, position, 1.0, 1.0, 0)
    assert_within_one_step(y[1, 0], v.float()[:, 0].mean(0), 2e-3)


@pytest.mark.parametrize(("m", "f", "k"), [(1, 8, 8), (4, 13, 264), (8, 24, 5120)])
def test_fc13_swiglu_in_bf16(gpu: Gpu, m: int, f: int, k: int) -> None:
    x, w = normal(m, k).bfloat16(), (normal(2 * f, k, seed=1) * k**-0.5).bfloat16()
    gpu.made_before(w)
    gpu.made_by_the_kernel_before(x)
    h = gpu.fc13_swiglu(x, w, None, None)
    expected = fc13_swiglu(x.float(), *(Linear(part.float()) for part in w.chunk(2)))
    assert_within_one_step(h, expected, 0.01 * expected.abs() + 1e-3)  # Triton rounds gate and up on the way


@pytest.mark.parametrize(("m", "f", "k", "gain"), [(1, 8, 16, 1), (4, 13, 96, 1), (8, 24, 5120, 1), (3, 16, 64, 1e4)])
def test_fc13_swiglu(gpu: Gpu, m: int, f: int, k: int, gain: float) -> None:
    """A gain of 1e4 saturates gate, up and the output."""
    in_scale, out_scale = 0.02, 0.01
    x, w, scale = codes(m, k), codes(2 * f, k, seed=2, high=4.0), uniform(2 * f, low=1e-3, high=1e-2) * gain
    gpu.made_before(w)
    gpu.made_by_the_kernel_before(x)
    h = gpu.fc13_swiglu(x, w, scale * in_scale, torch.tensor([1 / out_scale]))
    gate, up = (Linear(part, in_scale) for part in (w.float() * scale[:, None]).chunk(2))
    expected = fc13_swiglu(x.float() * in_scale, gate, up) / out_scale
    assert_within_one_step(h, expected, 1e-5 * expected.abs())
    assert gain == 1 or (h.float().abs() == 448).any()


@pytest.mark.parametrize(("m", "e", "k"), [(1, 3, 8), (4, 128, 5120), (8, 5, 10248)])
def test_router_logits(gpu: Gpu, m: int, e: int, k: int) -> None:
    x, w = normal(m, k).bfloat16(), normal(e, k, seed=1).bfloat16()
    gpu.made_before(w)
    gpu.made_by_the_kernel_before(x)
    logits = gpu.router(x, w)
    products = x.double()[:, None, :] * w.double()[None]
    assert_within_one_step(logits, products.sum(-1), 1e-6 * products.abs().sum(-1))


@pytest.mark.parametrize(
    ("m", "experts", "hidden", "width", "routing"),
    [
        (1, 3, 16, 16, "any"),
        (4, 128, 96, 48, "any"),
        (8, 5, 80, 32, "any"),  # some experts are shared by tokens
        (8, 9, 48, 48, "all different"),
        (3, 4, 16, 2112, "any"),  # FC2 rows longer than the registers
        (5, 7, 32, 16, "tie"),  # every logit equal: the lowest index wins
        (4, 2, 5120, 64, "one"),
    ],
)
def test_moe_top1(gpu: Gpu, m: int, experts: int, hidden: int, width: int, routing: str) -> None:
    in_scale, routed_in, shared_h, routed_h = 0.02, 0.015, 0.004, 0.003
    x = normal(m, hidden, seed=5).bfloat16()
    x8 = (x.float() / in_scale).clamp(-448, 448).to(E4M3)
    w13, w2 = (
        codes(experts + 1, 2 * width, hidden, seed=6, high=2.0),
        codes(experts + 1, hidden, width, seed=7, high=2.0),
    )
    s13, s2 = uniform(experts + 1, 2 * width, low=1e-3, high=1e-2), uniform(experts + 1, low=1e-3, high=1e-2, seed=1)
    router_EK = normal(experts, hidden, seed=8)
    if routing == "tie":
        router_EK = torch.zeros(experts, hidden)
    if routing == "one":
        router_EK[1] = -router_EK[0]
        x, x8 = x[:1].expand(m, -1).contiguous(), x8[:1].expand(m, -1).contiguous()
    logits = x.float() @ router_EK.T
    if routing == "all different":  # token m likes expert m best
        router_EK = torch.linalg.pinv(x.float()) @ torch.eye(m, experts) * 3
        router_EK, logits = router_EK.T.contiguous(), x.float() @ router_EK
    shared13, routed13, shared2, routed2 = w13[0], w13[1:].contiguous(), w2[0], w2[1:].contiguous()
    gpu.made_before(shared13, shared2, routed13, routed2)
    gpu.made_by_the_kernel_before(x8, x, logits)
    y = gpu.moe_top1(
        *(x8, x, logits, shared13, s13[0] * in_scale, shared2, s2[:1] * shared_h),
        *(
            routed13,
            s13[1:] * routed_in,
            routed2,
            s2[1:] * routed_h,
            torch.tensor([1 / routed_in, 1 / shared_h, 1 / routed_h]),
        ),
    )

    def expert(i: int, scale: float, h_scale: float) -> tuple[Linear, Linear, Linear]:
        gate, up = (Linear(part, scale) for part in (w13[i].float() * s13[i][:, None]).chunk(2))
        return gate, up, Linear(w2[i].float() * s2[i], h_scale)

    routed = [expert(i + 1, routed_in, routed_h) for i in range(experts)]
    expected = moe_top1(x.float(), router_EK, routed, expert(0, in_scale, shared_h))
    if routing == "all different":
        assert len(set(logits.argmax(1).tolist())) == m
    assert_within_one_step(y, expected, 1e-5 * expected.abs().max())


@pytest.mark.parametrize(("ranks", "m", "hidden"), [(1, 3, 264), (2, 1, 256), (4, 8, 72), (8, 2, 512)])
def test_allreduce_rmsnorm(gpu: Gpu, ranks: int, m: int, hidden: int) -> None:
    """Every rank is a set of buffers. Three calls: both parities of the inbox, and the first again."""
    eps, scale, weight = 1e-5, 0.01, uniform(hidden, low=0.5, high=2.0)
    inboxes = [gpu.zeros(inbox_bytes(ranks, hidden), torch.uint8) for _ in range(ranks)]
    addresses = torch.tensor([inbox.data_ptr() for inbox in inboxes])
    epochs = [gpu.zeros(8, torch.int32) for _ in range(ranks)]
    for call in range(3):
        parts = [normal(m, hidden, seed=10 * call + r).bfloat16() for r in range(ranks)]
        residual = normal(m, hidden, seed=99).bfloat16() * 3
        gpu.made_by_the_kernel_before(residual, *parts)
        outputs = gpu.allreduce_of_all_ranks(
            parts, residual, weight, addresses, epochs=epochs, eps=eps, inv_scale=torch.tensor([1 / scale])
        )
        y, new = allreduce_rmsnorm([p.float() for p in parts], residual.float(), weight, eps)
        for y8, y16, residual_out in outputs:
            assert_within_one_step(residual_out, new, 1e-6)
            assert_within_one_step(y16, y, 1e-6 * y.abs())
            assert_within_one_step(y8, y / scale, 1e-5 * y.abs() / scale)
        for output in outputs[1:]:  # the same bits on every rank
            assert all(
                torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(output, outputs[0], strict=True)
            )
    assert [epoch[:m].tolist() for epoch in epochs] == [[3] * m] * ranks


def test_a_rank_that_never_comes_is_a_deadlock_not_a_wrong_sum(emulated: Emulated) -> None:
    inboxes = [torch.zeros(inbox_bytes(2, 64), dtype=torch.uint8) for _ in range(2)]
    part, weight = normal(1, 64).bfloat16(), torch.ones(64)
    emulated.together(True)
    emulated.made_before(part)
    addresses, epoch = torch.tensor([inbox.data_ptr() for inbox in inboxes]), torch.zeros(8, dtype=torch.int32)
    emulated.allreduce_rmsnorm(part, part, weight, addresses, epoch, 0, 1e-5, torch.ones(1))
    said = emulated.finish()
    emulated.together(False)
    assert "deadlock" in said


@pytest.mark.parametrize(
    ("broken", "instead"),
    [
        (r"  grid_wait\(\);\n  multiply", "  multiply"),  # reads activations that the kernel before has not made yet
        (r"e4m3x2_to_f16x2\(c\),(\s+)e4m3x2_to_f16x2\(c >> 16\)", r"e4m3x2_to_f16x2(c >> 16),\1e4m3x2_to_f16x2(c)"),
    ],
)
def test_the_emulator_sees_a_broken_kernel(tmp_path: Path, broken: str, instead: str) -> None:
    ops = tmp_path / "ops"
    shutil.copytree(OPS, ops, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    source = ops / "gemm_low_latency" / "kernel.cuh"
    text, count = re.subn(broken, instead, source.read_text())
    assert count == 1
    source.write_text(text)
    gpu = Emulated(build(tmp_path / "broken.so", ops))
    x, w, scale = codes(4, 96, seed=1), codes(16, 96, seed=2), torch.ones(16)
    with pytest.raises(AssertionError):
        check_gemm(gemm(gpu, x, w, scale), x, w, scale)
