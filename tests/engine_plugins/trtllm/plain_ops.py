"""torch.ops.kilotok.* in plain torch, from the calls that the adapter makes: what each op is given and must give back.

Refuses to stand in for the fused ops: those that the package itself defines are left as they are.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812

E4M3_MAX = 448.0
_library = torch.library.Library("kilotok", "FRAGMENT")


def _define(schema: str, function: object) -> None:
    name = schema.partition("(")[0]
    if not hasattr(torch.ops.kilotok, name):
        _library.define(schema)
        _library.impl(name, function, "CPU")


def _product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() @ weight.float().T * scale).to(torch.bfloat16)


def _fp8(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def router(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x.float() @ weight.float().T).to(torch.bfloat16)


def qkv(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    made = _product(x, weight, scale)
    if positions is not None:
        q = made.shape[1] * 5 // 7  # 5 query heads and one key and one value head per rank
        factor = torch.log(torch.floor((positions.float() + 1) / 8192) + 1) * 0.1 + 1
        made[:, :q] = (made[:, :q].float() * factor[:, None]).to(torch.bfloat16)
    return made


def fc13_swiglu(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, inv_output_scale: torch.Tensor
) -> torch.Tensor:
    gate, up = _product(x, weight, scale).float().chunk(2, dim=-1)
    return _fp8(F.silu(gate) * up * inv_output_scale)


def moe_top1(
    x: torch.Tensor, logits: torch.Tensor, w3_w1: torch.Tensor, w2: torch.Tensor, scales: list[torch.Tensor]
) -> torch.Tensor:
    fc1, quant, fc2 = (float(scale) for scale in scales[:3])
    score, expert = torch.sigmoid(logits.float()).max(dim=-1)
    hidden = torch.einsum("mk,mfk->mf", x.float(), w3_w1[expert].float()) * fc1 * score[:, None]
    up, gate = hidden.chunk(2, dim=-1)
    return (torch.einsum("mf,mkf->mk", _fp8(F.silu(gate) * up * quant).float(), w2[expert].float()) * fc2).bfloat16()


def allreduce_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, eps: float,
    workspace: torch.Tensor, group: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    residual = (x.float() + residual.float()).to(torch.bfloat16)
    wide = residual.float()
    norm = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()
    return _fp8(norm.bfloat16().float() / scale), residual


_define("router(Tensor x, Tensor weight) -> Tensor", router)
_define("qkv_attn_scaling(Tensor x, Tensor weight, Tensor scale, Tensor? positions) -> Tensor", qkv)
_define("fc13_swiglu(Tensor x, Tensor weight, Tensor scale, Tensor inv_output_scale) -> Tensor", fc13_swiglu)
_define("gemm_low_latency(Tensor x, Tensor weight, Tensor scale) -> Tensor", _product)
_define("moe_top1(Tensor x, Tensor logits, Tensor w3_w1, Tensor w2, Tensor[] scales) -> Tensor", moe_top1)
_define(
    "allreduce_rmsnorm(Tensor x, Tensor residual, Tensor weight, Tensor scale, float eps, Tensor workspace, "
    "int[] group) -> (Tensor, Tensor)",
    allreduce_rmsnorm,
)
