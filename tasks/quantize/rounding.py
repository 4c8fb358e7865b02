"""E4M3 and NVFP4 by their definitions, in torch and on any device: what the witness computes with.

modelopt's own NVFP4 arithmetic needs a GPU, so without one it is given ours, through its registry of backends.
Run it: nothing to run; `python -m pytest tests/tasks/test_quantize_convert.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

FP8 = torch.float8_e4m3fn
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
BLOCK = 16  # elements that share a scale in NVFP4


def round_e4m3(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """x rounded to the nearest E4M3 multiple of `scale`, saturating."""
    return (x / scale).clamp(-448, 448).to(FP8).float() * scale


def round_nvfp4(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x rounded to NVFP4: blocks of 16 along the last dimension, whose own E4M3 scale is a multiple of `scale`."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    step = (blocks.abs().amax(-1, keepdim=True) / (6 * scale)).clamp(2**-9, 448).to(FP8).float() * scale
    values = blocks / step
    between = (E2M1[1:] + E2M1[:-1]) / 2
    code = torch.bucketize(values.abs(), between)  # a tie goes down; to even where it is the upper that is even:
    tie = (code < 7) & (code % 2 == 1) & (values.abs() == between[code.clamp(max=6)])
    return (E2M1[code + tie.long()] * values.sign() * step).flatten(-2)


def lend_nvfp4(quantizers: Iterable[Any]) -> None:
    """Let modelopt's NVFP4 quantizers round with `round_nvfp4`."""
    from modelopt.torch.quantization.nn import register_quant_backend
    from modelopt.torch.quantization.nn.modules.tensor_quantizer import is_registered_quant_backend

    name = "kilotok_nvfp4"
    if not is_registered_quant_backend(name):
        register_quant_backend(
            name, lambda x, quantizer: round_nvfp4(x.float(), quantizer.amax.float() / (6 * 448)).to(x.dtype)
        )
    for quantizer in quantizers:
        if quantizer.num_bits == (2, 1):
            quantizer.backend = name
