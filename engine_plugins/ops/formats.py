"""FP8 E4M3 as modelopt simulates it: the one place that says how a value is rounded.

What it is: torch fp32 fake quantization shared by every op's reference, and the linear layer record they pass around.
What it refuses to be: fast; it is the oracle.
Run it: `python -m pytest tests/engine_plugins/test_formats.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

E4M3_MAX = 448.0


def fake_quantize_e4m3(x: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Round x to the E4M3 grid of step `scale` (amax/448), saturating; None leaves x as it is."""
    if scale is None:
        return x
    clamped = (x.float() * (1.0 / scale)).clamp(-E4M3_MAX, E4M3_MAX)
    return clamped.to(torch.float8_e4m3fn).float() * scale


@dataclass(frozen=True)
class Linear:
    """A linear layer's dequantized weight [out, in] and the static scale of its input (None: not quantized)."""

    weight_NK: torch.Tensor
    input_scale: float | None = None

    def __call__(self, x_MK: torch.Tensor) -> torch.Tensor:
        return fake_quantize_e4m3(x_MK, self.input_scale) @ self.weight_NK.T
