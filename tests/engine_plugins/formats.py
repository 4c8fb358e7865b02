"""Steps of BF16 and E4M3, random codes, and the one comparison that kernel tests use. Imported by the kernel tests."""

from __future__ import annotations

import torch

E4M3 = torch.float8_e4m3fn


def codes(*shape: int, seed: int = 0, high: float = 448.0) -> torch.Tensor:
    """Random E4M3 values: every finite code up to `high` may appear, both signs, subnormals and zeros included."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    raw[(raw & 0x7F) == 0x7F] = 0x80  # the only NaNs become minus zero
    return raw.view(E4M3).float().clamp(-high, high).to(E4M3)


def uniform(*shape: int, low: float, high: float, seed: int = 0) -> torch.Tensor:
    return torch.empty(shape).uniform_(low, high, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step_of(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance between neighbours of `dtype` around a value (fp32: a few of its steps are spent on summation)."""
    mantissa, least = {torch.bfloat16: (7, -126), E4M3: (3, -6), torch.float32: (20, -126)}[dtype]
    exponent = torch.floor(torch.log2(value.abs().double().clamp(min=2.0**-140))).clamp(min=least)
    return torch.pow(2.0, exponent - mantissa)


def assert_within_one_step(
    actual: torch.Tensor, expected: torch.Tensor, slack: torch.Tensor | float = 0.0, dtype: torch.dtype | None = None
) -> None:
    """|actual - expected| is at most a step of the output format, plus what fp32 summation may lose (`slack`)."""
    expected, values = expected.double(), actual.double()
    if actual.dtype == E4M3:
        expected = expected.clamp(-448, 448)
    assert values.isfinite().all(), "NaN or infinity"
    excess = (values - expected).abs() - step_of(expected, dtype or actual.dtype) - slack
    worst = int(excess.argmax())
    assert excess.max() <= 0, (
        f"{values.flatten()[worst]} is not {expected.flatten()[worst]} at {worst} of {list(actual.shape)}"
    )
