"""The GEMM tile and its formats on adversarial inputs. Run: `pytest tests/engine_plugins/test_kernels.py`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine_plugins.native.checkpoint import E4M3_TO_FLOAT
from engine_plugins.native.engine import Engine
from engine_plugins.native.layout import alternate, interleave_halves, pack, separate, to_bfloat16, unpack
from engine_plugins.native.native_backend import NativeBackend
from specs.errors import IntegrityError

FINITE_CODES = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)


@pytest.fixture(params=["avx2", "avx512", "avx512_bf16"])
def gemm(
    request: pytest.FixtureRequest, bundles: Path, open_engine: Callable[..., Engine]
) -> Callable[..., np.ndarray]:
    """y [M, N] = x [M, K] times codes [N, K] with a scale per row, through the library. Padding is poisoned by the
    caller."""
    try:
        backend = open_engine(bundles / "tiny", isa=request.param).backend
    except IntegrityError:
        pytest.skip(f"this CPU has no {request.param}")
    assert isinstance(backend, NativeBackend)

    def call(x: np.ndarray, weight: np.ndarray, scale: np.ndarray | None, input_scale: float) -> np.ndarray:
        packed, (n, k) = pack(weight), weight.shape
        groups, pairs = packed.shape[:2]
        scales = np.pad(scale, (0, groups * 16 - n)).astype(np.float32) if scale is not None else None
        matrix = backend._lib.kt_gemm_new(
            backend._handle,
            packed.ctypes.data,
            0 if scale is not None else 1,
            groups * 16,
            pairs * 2,
            scales.ctypes.data if scales is not None else None,
            ctypes.c_float(input_scale),
        )
        padded = np.zeros((len(x), pairs * 2), np.float32)
        padded[:, :k] = x
        y = np.full((len(x), groups * 16), np.nan, np.float32)
        assert backend._lib.kt_gemm(backend._handle, matrix, padded.ctypes.data, len(x), y.ctypes.data) == 0
        return y[:, :n]

    return call


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 16, 16), (1, 17, 18), (3, 33, 64), (4, 16, 130), (5, 48, 62), (9, 70, 64), (33, 31, 96)]
)
def test_fp8_gemm_is_exact_up_to_summation(gemm: Callable[..., np.ndarray], m: int, n: int, k: int) -> None:
    rng = np.random.default_rng(m * n * k)
    codes, scale = rng.choice(FINITE_CODES, (n, k)), rng.uniform(0.01, 2, n).astype(np.float32)
    x = rng.normal(size=(m, k)).astype(np.float32)
    rounded = (torch.from_numpy(x / np.float32(0.03)).clamp(-448, 448).to(torch.float8_e4m3fn).double() * 0.03).numpy()
    products = rounded[:, None, :] * (E4M3_TO_FLOAT[codes].astype(np.float64) * scale[:, None])[None]
    y = gemm(x, codes, scale, 0.03)
    assert (np.abs(y - products.sum(-1)) <= 2e-6 * np.abs(products).sum(-1) + 1e-30).all()


@pytest.mark.parametrize("m", [1, 2, 4, 7, 16])
def test_bf16_gemm(gemm: Callable[..., np.ndarray], m: int) -> None:
    rng = np.random.default_rng(m)
    weight, x = to_bfloat16(rng.normal(size=(50, 64)).astype(np.float32)), rng.normal(size=(m, 64)).astype(np.float32)
    values = (weight.astype(np.uint32) << 16).view(np.float32)
    assert np.abs(gemm(x, weight, None, 0.0) - x @ values.T).max() < 1e-4


def test_every_fp8_code_decodes_exactly(gemm: Callable[..., np.ndarray]) -> None:
    """Weights hold each finite code once, x picks it out: subnormals and both zeros included."""
    codes = np.zeros((len(FINITE_CODES), 2), np.uint8)
    codes[:, 0] = FINITE_CODES
    y = gemm(np.array([[1.0, 0.0]], np.float32), codes, np.ones(len(codes), np.float32), 1.0)
    assert np.array_equal(y[0], E4M3_TO_FLOAT[FINITE_CODES])


def test_inputs_round_as_torch_rounds(gemm: Callable[..., np.ndarray]) -> None:
    """Every midpoint of the E4M3 grid, its neighbours, saturated values and zero, against torch's cast."""
    grid = np.unique(np.abs(E4M3_TO_FLOAT[FINITE_CODES]))
    middles = ((grid[1:] + grid[:-1]) / 2).astype(np.float32)
    x = np.concatenate(
        [
            grid,
            middles,
            np.nextafter(middles, np.float32(0)),
            np.nextafter(middles, np.float32(999)),
            np.array([449, 1e6, 3e38], np.float32),
        ]
    )
    x = np.concatenate([x, -x]).astype(np.float32)
    expected = torch.from_numpy(x).clamp(-448, 448).to(torch.float8_e4m3fn).float().numpy()
    one = np.array([[0x38, 0]], np.uint8)  # 1.0
    ours = np.concatenate(
        [
            gemm(np.stack([part, np.zeros_like(part)], 1), one, np.ones(1, np.float32), 1.0)[:, 0]
            for part in np.array_split(x, len(x) // 100)
        ]
    )
    assert np.array_equal(ours, expected)


def test_a_row_has_the_same_bits_in_every_tile(gemm: Callable[..., np.ndarray]) -> None:
    rng = np.random.default_rng(1)
    codes, x = rng.choice(FINITE_CODES, (40, 64)), rng.normal(size=(23, 64)).astype(np.float32)
    scale = np.ones(40, np.float32)
    together = gemm(x, codes, scale, 0.1)
    for m in range(1, 10):
        assert np.array_equal(gemm(x[:m], codes, scale, 0.1), together[:m])


def test_a_matrix_too_big_for_the_scratch_is_refused(bundles: Path, open_engine: Callable[..., Engine]) -> None:
    backend = open_engine(bundles / "tiny").backend
    matrix = backend._lib.kt_gemm_new(backend._handle, np.zeros(32, np.uint16).ctypes.data, 1, 16, 2, None, 0.0)
    assert backend._lib.kt_gemm(backend._handle, matrix, None, 1 << 20, None) == -1


@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 2), (17, 3), (31, 64)])
def test_pack_and_unpack(n: int, k: int) -> None:
    weight = np.random.default_rng(0).integers(0, 255, (n, k)).astype(np.uint8)
    assert np.array_equal(unpack(pack(weight), n, k), weight)


def test_alternate_and_separate() -> None:
    gate, up = np.arange(40).reshape(20, 2), np.arange(40, 80).reshape(20, 2)
    both = separate(alternate(gate, up))
    assert np.array_equal(both[0][:20], gate)
    assert np.array_equal(both[1][:20], up)


def test_interleaved_halves_make_pairs() -> None:
    assert interleave_halves(8, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
