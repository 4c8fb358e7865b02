"""The fused ops on one GPU at Maverick's TP8 shapes, each beside the memory's floor and torch's own kernels.

What it is: calls captured in a CUDA graph and replayed. `cold_us` rotates over more weights than the L2 cache holds,
`warm_us` reads one set again and again. Both are per call in a row of calls, so that a start may hide behind the call
before, as in a cycle.
What it refuses to be: an estimate. Without a GPU it exits 2.
Run it: `kilotok bench ops --device cuda`.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine_plugins.ops import library
from engine_plugins.ops.compile import ARCHITECTURES, compile_cuda
from engine_plugins.ops.cuda.launch import inbox_bytes
from specs.errors import InputError
from tasks.predict.hardware import Gpu, known, load

Call = Callable[[], object]
OPS: Any = torch.ops.kilotok
MIN_COPIES, REPLAYS, REPEATS = 16, 20, 5
GOOD_T0_US = 2.0  # start to data flowing, of a kernel that is good; a library's is near 3


@dataclass(frozen=True)
class Case:
    """One row: an op at one shape. `make` gives a call over fresh weights. `peer` does the same work by torch, given
    `peer_weights()`: fresh ones."""

    op: str
    shape: str
    bytes: int  # weights, or cache, that one call must read
    make: Callable[[], Call]
    peer: Callable[[torch.Tensor], torch.Tensor] | None = None
    peer_weights: Callable[[], torch.Tensor] | None = None


def gpu_here() -> Gpu:
    """Constants of this GPU; sets up the compiled kernels. Raises InputError without one, or with an unknown one."""
    if not torch.cuda.is_available():
        raise InputError("no CUDA device", "--device cuda", "run it on a machine with an H200, H100 or B200")
    name = torch.cuda.get_device_name().lower()
    match = [entry for entry in known() if entry in name.replace("nvidia ", "").split()]
    if not match:
        raise InputError(f"no constants for {name!r}", "specs/hardware", f"add one; known: {', '.join(known())}")
    if library.architecture_of() in ARCHITECTURES:
        plugins = Path(tempfile.mkdtemp(prefix="kilotok-ops-"))
        compile_cuda(plugins, library.architecture_of())
        library.use_kernels(plugins)
    return load(match[0])


def graph_us(calls: Sequence[Call], replays: int = REPLAYS) -> float:
    """Median over REPEATS of the time per call, all calls in one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:  # compiles, allocates, chooses algorithms
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / (replays * len(calls)))
    return statistics.median(times)


def bench_ops(tokens: Sequence[int] = (1, 4)) -> list[dict[str, Any]]:
    """One row per op, shape and number of tokens."""
    gpu = gpu_here()
    return [_row(case, m, gpu) for m in tokens for case in cases(m, torch.device("cuda"))]


def rotation(case: Case) -> int:
    """How many copies of a case's weights exceed twice the L2 cache of this GPU."""
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return max(MIN_COPIES, 2 * cache_bytes // max(case.bytes, 1 << 16) + 1)


def _row(case: Case, tokens: int, gpu: Gpu) -> dict[str, Any]:
    copies = rotation(case)
    before = dict(library.served)
    cold = graph_us([case.make() for _ in range(copies)])
    warm = graph_us([case.make()] * MIN_COPIES)
    ran = {how for (op, how), n in library.served.items() if op.startswith(case.op) and n > before.get((op, how), 0)}
    floor, good = case.bytes / gpu.bytes_per_us, case.bytes / (gpu.bytes_per_us * gpu.hbm_eff) + GOOD_T0_US
    row = {
        "op": case.op,
        "shape": case.shape,
        "tokens": tokens,
        "ran": "+".join(sorted(ran)),
        "cold_us": cold,
        "warm_us": warm,
        "floor_us": floor,
        "good_us": good,
        "share_of_roof": floor / cold,
        "device": torch.cuda.get_device_name(),
    }
    if case.peer and case.peer_weights:
        weights = [case.peer_weights() for _ in range(copies)]
        row["torch_us"] = graph_us([partial(case.peer, w) for w in weights])
        row["torch_compile_us"] = graph_us([partial(torch.compile(case.peer, dynamic=False), w) for w in weights])
    return row


def codes(*shape: int, device: torch.device) -> torch.Tensor:
    """Random E4M3 values of moderate size."""
    raw = torch.randint(0, 0x50, shape, dtype=torch.uint8, device=device)
    return raw.bitwise_or_(torch.randint(0, 2, shape, dtype=torch.uint8, device=device) << 7).view(library.E4M3)


@dataclass(frozen=True)
class Maker:
    """Makes calls of `tokens` tokens over fresh random weights; inputs and scales are shared. Legend: library.py."""

    tokens: int
    device: torch.device

    def e4m3(self, *shape: int) -> torch.Tensor:
        return codes(*shape, device=self.device)

    def bf16(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device).bfloat16()

    def ones(self, *shape: int) -> torch.Tensor:
        return torch.ones(shape, device=self.device)

    def gemm(self, n: int, k: int) -> Case:
        x, one = self.e4m3(self.tokens, k), self.ones(1)

        def make() -> Call:
            w = self.e4m3(n, k)
            return lambda: OPS.gemm_low_latency(x, w, one)

        return Case("gemm_low_latency", f"{n} <- {k}", n * k, make, _scaled_mm(x, one), lambda: self.e4m3(n, k))

    def gemm_bf16(self, n: int, k: int) -> Case:
        x = self.bf16(self.tokens, k)

        def make() -> Call:
            w = self.bf16(n, k)
            return lambda: OPS.gemm_low_latency(x, w, None)

        peer = partial(torch.nn.functional.linear, x)
        return Case("gemm_low_latency", f"{n} <- {k} BF16", 2 * n * k, make, peer, lambda: self.bf16(n, k))

    def router(self, experts: int, hidden: int) -> Case:
        x = self.bf16(self.tokens, hidden)

        def make() -> Call:
            w = self.bf16(experts, hidden)
            return lambda: OPS.router(x, w)

        shape = f"{experts} <- {hidden} BF16"
        peer = partial(torch.nn.functional.linear, x)
        return Case("router", shape, 2 * experts * hidden, make, peer, lambda: self.bf16(experts, hidden))

    def qkv(self, q_heads: int, kv_heads: int, head_dim: int, hidden: int, position: int) -> Case:
        """With its write to the cache."""
        x, one, n = self.e4m3(self.tokens, hidden), self.ones(1), (q_heads + 2 * kv_heads) * head_dim
        positions = torch.arange(position, position + self.tokens, device=self.device)
        rows = (q_heads * head_dim, kv_heads * head_dim, head_dim)

        def make() -> Call:
            w, cache = self.e4m3(n, hidden), self.e4m3(2, position + self.tokens, kv_heads, head_dim)
            return lambda: OPS.qkv_attn_scaling_cache(x, w, one, positions, None, *rows, 8192.0, 0.1, *cache, 1.0, 1.0)

        return Case(
            "qkv_attn_scaling",
            f"{n} <- {hidden}",
            n * hidden,
            make,
            _scaled_mm(x, one),
            lambda: self.e4m3(n, hidden),
        )

    def draft_qkv(self, q_heads: int, kv_heads: int, head_dim: int, hidden: int, position: int) -> Case:
        """A draft's: BF16, from an embedding and a hidden state side by side, rotated."""
        x, n = self.bf16(self.tokens, 2 * hidden), (q_heads + 2 * kv_heads) * head_dim
        positions = torch.arange(position, position + self.tokens, device=self.device)
        table = torch.rand(position + self.tokens, head_dim // 2, 2, device=self.device)
        rows = (q_heads * head_dim, kv_heads * head_dim, head_dim)

        def make() -> Call:
            w, cache = self.bf16(n, 2 * hidden), self.e4m3(2, position + self.tokens, kv_heads, head_dim)
            return lambda: OPS.qkv_attn_scaling_cache(x, w, None, positions, table, *rows, 0.0, 0.0, *cache, 1.0, 1.0)

        return Case("qkv_attn_scaling", f"{n} <- {2 * hidden} BF16", 4 * n * hidden, make)

    def fc13(self, width: int, hidden: int) -> Case:
        x, one = self.e4m3(self.tokens, hidden), self.ones(1)

        def make() -> Call:
            w = self.e4m3(2 * width, hidden)
            return lambda: OPS.fc13_swiglu(x, w, one, one)

        product = _scaled_mm(x, one)

        def peer(w: torch.Tensor) -> torch.Tensor:
            gate, up = product(w).float().chunk(2, dim=-1)
            return (torch.nn.functional.silu(gate) * up).clamp(-448, 448).to(library.E4M3)

        shape, weights = f"2 x {width} <- {hidden}", lambda: self.e4m3(2 * width, hidden)
        return Case("fc13_swiglu", shape, 2 * width * hidden, make, peer, weights)

    def fc13_bf16(self, width: int, hidden: int) -> Case:
        x = self.bf16(self.tokens, hidden)

        def make() -> Call:
            w = self.bf16(2 * width, hidden)
            return lambda: OPS.fc13_swiglu(x, w, None, None)

        def peer(w: torch.Tensor) -> torch.Tensor:
            gate, up = torch.nn.functional.linear(x, w).chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * up

        shape, weights = f"2 x {width} <- {hidden} BF16", lambda: self.bf16(2 * width, hidden)
        return Case("fc13_swiglu", shape, 4 * width * hidden, make, peer, weights)

    def moe(self, experts: int, hidden: int, width: int) -> Case:
        """One set of experts; each call routes its tokens to others, which rotates the weights."""
        m, inverse = self.tokens, self.ones(3)
        w13, w2 = self.e4m3(experts, 2 * width, hidden), self.e4m3(experts, hidden, width)
        s13, s2 = self.ones(experts, 2 * width), self.ones(experts)
        x8, x = self.e4m3(m, hidden), self.bf16(m, hidden)

        def make() -> Call:
            logits = torch.full((m, experts), -9.0, device=self.device)
            logits[torch.arange(m), torch.randperm(experts)[:m]] = 1.0
            shared = (self.e4m3(2 * width, hidden), s13[0], self.e4m3(hidden, width), s2[:1])
            return lambda: OPS.moe_top1(x8, x, logits, *shared, w13, s13, w2, s2, inverse)

        shape = f"shared + {m} of {experts}, {hidden} x {width}"
        return Case("moe_top1", shape, (1 + m) * 3 * hidden * width, make)

    def norm(self, hidden: int) -> Case:
        """One GPU has no peers: residual, norm and rounding, with an inbox of its own."""
        m, weight, one = self.tokens, self.ones(hidden), self.ones(1)

        def make() -> Call:
            part, residual = self.bf16(m, hidden), self.bf16(m, hidden)
            inbox = torch.zeros(inbox_bytes(1, hidden), dtype=torch.uint8, device=self.device)
            address = torch.tensor([inbox.data_ptr()], device=self.device)
            epoch = torch.zeros(8, dtype=torch.int32, device=self.device)
            return lambda: (OPS.allreduce_rmsnorm(part, residual, weight, address, epoch, 0, 1e-5, one), inbox)

        return Case("allreduce_rmsnorm", f"{hidden}, 1 rank", m * hidden * 9, make)

    def attention(self, q_heads: int, kv_heads: int, head_dim: int, context: int, rounded: bool = True) -> Case:
        """Of queries that stand in QKV's rows; `rounded` to E4M3 for an output projection in it."""
        positions = torch.arange(context - self.tokens, context, device=self.device)
        inverse = self.ones(1) if rounded else None

        def make() -> Call:
            q = self.bf16(self.tokens, q_heads + 2 * kv_heads, head_dim)[:, :q_heads]
            k, v = self.e4m3(context, kv_heads, head_dim), self.e4m3(context, kv_heads, head_dim)
            return lambda: OPS.attention_decode(q, k, v, positions, 0.01, 1.0, 0, inverse)

        shape = f"{q_heads} heads, {context} positions"
        return Case("attention_decode", shape, 2 * context * kv_heads * head_dim, make)

    def verify(self, vocab: int, drafts: int | None = None) -> Case:
        """Greedy, of every token but the last, or of none: then it chooses a draft's token."""
        draft = torch.zeros(self.tokens - 1 if drafts is None else drafts, dtype=torch.int64, device=self.device)

        def make() -> Call:
            logits = self.bf16(len(draft) + 1, vocab)
            return lambda: OPS.verify_greedy(logits, draft)

        return Case("verify", f"{len(draft)} drafts of {vocab}", 2 * (len(draft) + 1) * vocab, make)


def cases(tokens: int, device: torch.device, shrink: int = 1, maker: type[Maker] = Maker) -> list[Case]:
    """Rank 0's shapes at TP8; `shrink` divides them, so that a test can call every case on a CPU."""
    make, hidden, experts = maker(tokens, device), 5120 // shrink, 128 // shrink
    return [
        *(make.gemm(hidden, k // shrink) for k in (640, 2048, 1024)),
        make.gemm_bf16(25256 // shrink, hidden),
        make.qkv(5, 1, 128 // shrink, hidden, position=1000 // shrink),
        make.fc13(2048 // shrink, hidden),
        make.fc13(1024 // shrink, hidden),
        make.fc13_bf16(4096 // shrink, hidden),
        make.router(experts, hidden),
        make.moe(experts, hidden, 1024 // shrink),
        make.norm(hidden),
        make.attention(5, 1, 128 // shrink, 1024 // shrink),
        make.attention(5, 1, 128 // shrink, 8192 // shrink),
        make.verify(202048 // shrink),
    ]


def _scaled_mm(x: torch.Tensor, one: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """torch's FP8 GEMM wants 16 rows: what is missing is zero."""
    rows = torch.zeros((16, x.shape[1]), dtype=torch.uint8, device=x.device).view(x.dtype)
    rows.view(torch.uint8)[: len(x)] = x.view(torch.uint8)
    return lambda w: torch._scaled_mm(rows, w.T, scale_a=one[0], scale_b=one[0], out_dtype=torch.bfloat16)[: len(x)]
