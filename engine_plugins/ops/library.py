"""The fused ops as torch operators, `torch.ops.kilotok.<op>`: importing this module registers them.

What it is: for each op a CPU implementation (the reference), one for CUDA tensors (the compiled library, else Triton,
else the reference with a warning) and a fake one for tracing. On a GPU none synchronizes or reads a size from the
device, so all can be captured in a CUDA graph. `served` counts which implementation really ran. The compiled kernels
read weights, scales, positions and older rows of a cache before the kernel in front of them has ended: on one stream
those must be older than that kernel.
What it refuses to be: an engine, or tied to one; any process that has the package installed may import it.
Run it: `python -m pytest tests/engine_plugins/test_library.py`.
Legend: M tokens, N outputs, K inputs, F intermediate, E experts, H hidden or heads, G kv heads, D head size, S
positions, P pairs of a head, R ranks or rows, V vocabulary. E4M3 tensors hold codes; scales are fp32
tensors, one number or one per row, and multiply them; inverse scales divide what is rounded to E4M3.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from engine_plugins.contract import OpContract
from engine_plugins.ops.allreduce_rmsnorm import reference as allreduce_reference
from engine_plugins.ops.attention_decode.reference import attention_decode as attention_reference
from engine_plugins.ops.compile import read_record
from engine_plugins.ops.cuda.launch import HEAD_DIM, CudaLibrary
from engine_plugins.ops.fc13_swiglu.reference import fc13_swiglu as fc13_reference
from engine_plugins.ops.formats import E4M3_MAX, Linear
from engine_plugins.ops.gemm_low_latency.reference import gemm_low_latency as gemm_reference
from engine_plugins.ops.moe_top1.reference import Expert, routed
from engine_plugins.ops.qkv_attn_scaling.reference import attention_temperature, rotate, write_cache
from engine_plugins.ops.router.reference import top1
from engine_plugins.ops.verify import reference as verify_reference
from specs.errors import IntegrityError

E4M3 = torch.float8_e4m3fn
MUTATED = {"allreduce_rmsnorm": ("epoch_M",), "qkv_attn_scaling_cache": ("k_SGD", "v_SGD")}
served: Counter[tuple[str, str]] = Counter()  # (op, "reference" | "triton" | "cuda"); a captured call counts once
_cuda: CudaLibrary | None = None


def architecture_of(device: int = 0) -> str:
    """Such as sm_90a: the architecture whose features this GPU has."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}a"


def use_kernels(plugins: Path) -> None:
    """Serve CUDA tensors from a bundle's `plugins/` from now on; refuses a changed library, or one for another GPU."""
    global _cuda
    record = read_record(plugins)
    if record is None:
        warnings.warn(f"{plugins} holds no kernels for a GPU: Triton serves the ops", stacklevel=2)
        return
    path, architecture = plugins / record["file"], record["architecture"]
    here = architecture_of() if torch.cuda.is_available() else "none"
    if architecture != here:
        raise IntegrityError(
            f"the kernels were built for {architecture}, this GPU is {here}",
            str(path),
            f"set engine.gpu_architecture: {here} and build again",
        )
    _cuda = CudaLibrary(path)


def _define(cpu: Callable[..., Any], axes: Callable[..., dict[str, int]], fake: Callable[..., Any]) -> Any:
    """Register kilotok::<name of cpu>, less its underscore; `axes` gives the sizes that its contract limits."""
    name = cpu.__name__.removeprefix("_")
    folder = "verify" if name.startswith("verify_") else name.removesuffix("_cache")
    contract: OpContract = importlib.import_module(f"engine_plugins.ops.{folder}.contract").CONTRACT

    def traced(*arguments: Any) -> Any:
        contract.check(arguments[0].device.type, **axes(*arguments))
        return fake(*arguments)

    def on_gpu(*arguments: Any) -> Any:
        contract.check("cuda", **axes(*arguments))
        implementation, function = _gpu_function(folder, name, arguments)
        served[name, implementation] += 1
        return function(*arguments) if function else _through_the_host(cpu, arguments)

    def on_cpu(*arguments: Any) -> Any:
        contract.check("cpu", **axes(*arguments))
        served[name, "reference"] += 1
        return cpu(*arguments)

    mutated = MUTATED.get(name, ())
    schema = torch.library.infer_schema(cpu, mutates_args=mutated)
    op = custom_op(f"kilotok::{name}", on_cpu, mutates_args=mutated, device_types="cpu", schema=schema)
    op.register_kernel("cuda")(on_gpu)
    op.register_fake(traced)
    return op


def _gpu_function(folder: str, name: str, arguments: tuple[Any, ...]) -> tuple[str, Callable[..., Any] | None]:
    compiled = name != "attention_decode" or (arguments[0].shape[-1] == HEAD_DIM and arguments[1].dtype == E4M3)
    if _cuda is not None and hasattr(_cuda, name) and compiled:
        return "cuda", getattr(_cuda, name)
    if importlib.util.find_spec("triton"):
        return "triton", getattr(importlib.import_module(f"engine_plugins.ops.{folder}.kernel"), name)
    warnings.warn(f"{name} has neither compiled kernels nor Triton: the slow reference runs", stacklevel=2)
    return "reference", None


def _through_the_host(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    device = arguments[0].device
    result = function(*(a.cpu() if isinstance(a, Tensor) else a for a in arguments))
    return tuple(t.to(device) for t in result) if isinstance(result, tuple) else result.to(device)


def _linear(w_NK: Tensor, scale: Tensor | None, input_scale: float | None = None) -> Linear:
    weight = w_NK.float()
    return Linear(weight if scale is None else weight * scale.reshape(-1, 1), input_scale)


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def _product(x_MK: Tensor, w_NK: Tensor, scale: Tensor | None) -> Tensor:
    y_MN = gemm_reference(x_MK.float(), Linear(w_NK.float()))
    return y_MN if scale is None else y_MN * scale


def _gemm_low_latency(x_MK: Tensor, w_NK: Tensor, scale: Tensor | None) -> Tensor:
    return _product(x_MK, w_NK, scale).bfloat16()


def _qkv_attn_scaling(
    x_MK: Tensor,
    w_NK: Tensor,
    scale: Tensor | None,
    position_M: Tensor | None,
    cos_sin_SP2: Tensor | None,
    q_rows: int,
    k_rows: int,
    head_dim: int,
    floor_scale: float,
    attn_scale: float,
) -> Tensor:
    y_MN, widths = _product(x_MK, w_NK, scale), (q_rows, k_rows, head_dim)
    return _positioned(y_MN, position_M, cos_sin_SP2, widths, (floor_scale, attn_scale)).bfloat16()


def _qkv_attn_scaling_cache(
    x_MK: Tensor,
    w_NK: Tensor,
    scale: Tensor | None,
    position_M: Tensor,
    cos_sin_SP2: Tensor | None,
    q_rows: int,
    k_rows: int,
    head_dim: int,
    floor_scale: float,
    attn_scale: float,
    k_SGD: Tensor,
    v_SGD: Tensor,
    inv_k_scale: float,
    inv_v_scale: float,
) -> Tensor:
    """Also writes keys and values, times their inverse scales, at their positions of an E4M3 cache."""
    y_MN, widths = _product(x_MK, w_NK, scale), (q_rows, k_rows, head_dim)
    y_MN = _positioned(y_MN, position_M, cos_sin_SP2, widths, (floor_scale, attn_scale))
    write_cache(y_MN[:, q_rows:], position_M, (k_SGD, v_SGD), (inv_k_scale, inv_v_scale))
    return y_MN.bfloat16()


def _positioned(
    y_MN: Tensor,
    position_M: Tensor | None,
    cos_sin_SP2: Tensor | None,
    widths: tuple[int, int, int],
    temperature: tuple[float, float],
) -> Tensor:
    q_heads, k_heads, heads_MHD = widths[0] // widths[2], widths[1] // widths[2], y_MN.unflatten(1, (-1, widths[2]))
    if cos_sin_SP2 is not None and position_M is not None:
        cos, sin = cos_sin_SP2[position_M][:, None].unbind(-1)
        turned = rotate(heads_MHD[:, : q_heads + k_heads], cos, sin, interleaved=True)
        heads_MHD = torch.cat((turned, heads_MHD[:, q_heads + k_heads :]), dim=1)
    if temperature[0] > 0 and position_M is not None:
        heads_MHD[:, :q_heads] *= attention_temperature(position_M, *temperature)[:, None, None]
    return heads_MHD.flatten(1)


def _fc13_swiglu(x_MK: Tensor, w_2FK: Tensor, scale: Tensor | None, inv_out_scale: Tensor | None) -> Tensor:
    gate, up = (Linear(half) for half in _linear(w_2FK, scale).weight_NK.chunk(2))
    h_MF = fc13_reference(x_MK.float(), gate, up)
    return h_MF.bfloat16() if inv_out_scale is None else _e4m3(h_MF * inv_out_scale)


def _router(x_MK: Tensor, w_EK: Tensor) -> Tensor:
    return x_MK.float() @ w_EK.float().T


def _moe_top1(
    x8_MK: Tensor,
    x_MK: Tensor,
    logits_ME: Tensor,
    shared13_2FK: Tensor,
    shared13_scale_2F: Tensor,
    shared2_KF: Tensor,
    shared2_scale: Tensor,
    routed13_E2FK: Tensor,
    routed13_scale_E2F: Tensor,
    routed2_EKF: Tensor,
    routed2_scale_E: Tensor,
    inv_scale_3: Tensor,
) -> Tensor:
    routed_in, shared_h, routed_h = (1.0 / inv_scale_3.double()).tolist()

    # A scale holds its input's scale too; the reference's Linear applies that to the input, so it is taken out again.
    def expert(w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, in_scale: float | None, h_scale: float) -> Expert:
        gate, up = (
            _linear(w, s / (in_scale or 1.0), in_scale) for w, s in zip(w13.chunk(2), s13.chunk(2), strict=True)
        )
        return gate, up, Linear(w2.float() * (s2 / h_scale), h_scale)

    gate, up, down = expert(shared13_2FK, shared13_scale_2F, shared2_KF, shared2_scale, None, shared_h)
    shared = down(fc13_reference(x8_MK.float(), gate, up))
    expert_M, score_M = top1(logits_ME)
    chosen = {
        e: expert(
            *(routed13_E2FK[e], routed13_scale_E2F[e], routed2_EKF[e], routed2_scale_E[e]),
            *(routed_in, routed_h),
        )
        for e in expert_M.unique().tolist()
    }
    return (shared + routed(x_MK.float(), expert_M, score_M, chosen)).bfloat16()


def _allreduce_rmsnorm(
    part_MH: Tensor,
    residual_MH: Tensor,
    weight_H: Tensor,
    inbox_R: Tensor,
    epoch_M: Tensor,
    rank: int,
    eps: float,
    inv_out_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    part, residual = part_MH.float(), residual_MH.float()
    if len(inbox_R) == 1:
        y_MH, residual = allreduce_reference.allreduce_rmsnorm([part], residual, weight_H, eps)
    else:
        y_MH, residual = allreduce_reference.allreduce_rmsnorm_of_group(part, residual, weight_H, eps)
    epoch_M[: len(part)] += 1
    return _e4m3(y_MH * inv_out_scale), y_MH.bfloat16(), residual.bfloat16()


def _attention_decode(
    q_MHD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    position_M: Tensor,
    k_scale: float,
    v_scale: float,
    chunk_size: int,
    inv_out_scale: Tensor | None = None,
) -> Tensor:
    used = int(position_M.max()) + 1  # what lies behind was never written
    k, v = k_SGD[:used].float() * k_scale, v_SGD[:used].float() * v_scale
    y_MHD = attention_reference(q_MHD.float(), k, v, position_M, chunk_size)
    return (y_MHD.bfloat16() if inv_out_scale is None else _e4m3(y_MHD * inv_out_scale)).contiguous()


def _padded(tokens: list[int], rows: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(tokens + [-1] * (rows - len(tokens))), torch.tensor([len(tokens)], dtype=torch.int32)


def _verify_greedy(logits_RV: Tensor, draft_K: Tensor) -> tuple[Tensor, Tensor]:
    return _padded(verify_reference.verify_greedy(logits_RV.float().numpy(), draft_K.tolist()), len(logits_RV))


def _verify_sampling(p_RV: Tensor, q_KV: Tensor, draft_K: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    numbers = iter(uniform_R.tolist())
    drawn = verify_reference.verify_sampling(p_RV.numpy(), q_KV.numpy(), draft_K.tolist(), lambda: next(numbers))
    return _padded(drawn, len(p_RV))


def _rows(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], width), dtype=dtype)


def _gemm_axes(x: Tensor, w: Tensor, *_: Any) -> dict[str, int]:
    return {"M": x.shape[0], "N": w.shape[0], "K": x.shape[1]}


def _decided(rows: Tensor, draft_K: Tensor) -> tuple[Tensor, Tensor]:
    return draft_K.new_empty(rows.shape[0]), draft_K.new_empty(1, dtype=torch.int32)


gemm_low_latency = _define(_gemm_low_latency, _gemm_axes, lambda x, w, scale: _rows(x, w.shape[0], torch.bfloat16))


def _qkv_axes(x: Tensor, *rest: Any) -> dict[str, int]:
    return {"M": x.shape[0], "H": x.shape[1], "D": rest[6]}


qkv_attn_scaling = _define(_qkv_attn_scaling, _qkv_axes, lambda x, w, *_: _rows(x, w.shape[0], torch.bfloat16))
qkv_attn_scaling_cache = _define(
    _qkv_attn_scaling_cache, _qkv_axes, lambda x, w, *_: _rows(x, w.shape[0], torch.bfloat16)
)
fc13_swiglu = _define(
    _fc13_swiglu,
    lambda x, w, *_: {"M": x.shape[0], "K": x.shape[1], "F": w.shape[0] // 2},
    lambda x, w, *_: _rows(x, w.shape[0] // 2, x.dtype),
)
router = _define(
    _router,
    lambda x, w: {"M": x.shape[0], "K": x.shape[1], "E": w.shape[0]},
    lambda x, w: _rows(x, w.shape[0], torch.float32),
)
moe_top1 = _define(
    _moe_top1,
    lambda *a: {"M": a[1].shape[0], "K": a[1].shape[1], "E": a[2].shape[1], "F": a[5].shape[1]},
    lambda *a: torch.empty_like(a[1]),
)
allreduce_rmsnorm = _define(
    _allreduce_rmsnorm,
    lambda part, *a: {"M": part.shape[0], "H": part.shape[1], "R": a[2].shape[0]},
    lambda part, *_: (torch.empty_like(part, dtype=E4M3), torch.empty_like(part), torch.empty_like(part)),
)
attention_decode = _define(
    _attention_decode,
    lambda q, k, *_: {"M": q.shape[0], "D": q.shape[2], "S": k.shape[0]},
    lambda q, *a: q.new_empty(q.shape, dtype=E4M3 if len(a) > 6 and a[6] is not None else q.dtype),
)
verify_greedy = _define(
    _verify_greedy, lambda logits, draft: {"k": draft.shape[0], "V": logits.shape[1]}, lambda *a: _decided(*a[:2])
)
verify_sampling = _define(
    _verify_sampling,
    lambda p, q, draft, _: {"k": draft.shape[0], "V": p.shape[1]},
    lambda p, q, draft, _: _decided(p, draft),
)
