"""Tokens per second of a server with as many requests as fit, prefill included.

Each request costs one prefill, bound by arithmetic, and its output tokens, each a share of a batch's cycle. Refuses to
know queues and service levels: it is the saturated rate. Run it: `kilotok predict SPEC`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tasks.predict.cost import Setting, cycle, weight_bytes_per_gpu
from tasks.predict.hardware import Gpu
from tasks.predict.shape import DraftShape, Shape

USABLE = 0.9  # of the memory: the stacks' own default for the KV cache; activations and graphs take the rest
MAX_BATCH = 2048  # requests per scheduler; trtllm-bench's own ceiling


@dataclass(frozen=True)
class Load:
    """What is sent: tokens in and tokens out of one request."""

    input_tokens: int = 1000
    output_tokens: int = 1000


def requests_that_fit(gpu: Gpu, shape: Shape, setting: Setting, tokens: int) -> float:
    """Requests of `tokens` tokens whose KV cache fits beside the weights; 0 when not even the weights do."""
    split = 1 if setting.attention_dp else setting.tensor_parallel
    free = USABLE * gpu.memory_gb * 1e9 - weight_bytes_per_gpu(shape, setting)
    each = tokens * shape.layers * shape.kv_elements(split) * setting.kv_bytes
    per_gpu = free / each
    return max(0.0, per_gpu * (setting.tensor_parallel if setting.attention_dp else 1))


def prefill_us(gpu: Gpu, shape: Shape, setting: Setting, tokens: float) -> float:
    """Time of all GPUs for one prompt, in a long stream of them: multiply-adds over the sustained rate."""
    linear = 2 * (shape.active_params - shape.head_params) * tokens
    width = shape.latent.nope + shape.latent.rope + shape.latent.value if shape.latent else 2 * shape.head_dim
    attended = shape.kv_tokens(tokens) * tokens / 2  # causal: half of the square
    if shape.chunk and tokens > shape.chunk:
        local = shape.layers - shape.global_layers
        attended = shape.global_layers * tokens**2 / 2 + local * tokens * shape.chunk / 2
    flops = linear + 2 * attended * shape.q_heads * width
    return flops / setting.tensor_parallel / gpu.flops_per_us(setting.weight_bytes)


def tokens_per_s(
    gpu: Gpu, shape: Shape, draft: DraftShape | None, setting: Setting, load: Load, acceptance: float = 1.0
) -> float:
    """Output tokens per second at `setting.batch` requests in flight; kernels level, without the stack's overhead."""
    at = replace(setting, context=load.input_tokens + load.output_tokens / 2)
    decode_us = load.output_tokens / acceptance * cycle(gpu, shape, draft, at).kernels_us
    total_us = decode_us + setting.batch * prefill_us(gpu, shape, setting, load.input_tokens)
    return 1e6 * setting.batch * load.output_tokens / total_us


def saturated(gpu: Gpu, shape: Shape, setting: Setting, load: Load) -> tuple[float, float]:
    """(tokens per second, requests in flight) with as many requests as fit."""
    most = MAX_BATCH * (setting.tensor_parallel if setting.attention_dp else 1)
    batch = min(most, requests_that_fit(gpu, shape, setting, load.input_tokens + load.output_tokens))
    if batch < 1:
        return 0.0, 0.0
    return tokens_per_s(gpu, shape, None, replace(setting, batch=batch, draft_tokens=0), load), batch
