"""Which blocks stay in BF16, when a spec gives quantization a budget: those that cost most divergence per byte saved.

Divergence is KL(BF16 || quantized) in nats per token, on the held-back prompts. A block is a layer's attention or its
feed-forward part, so that matrices an engine fuses stay together. Decoding is bound by weights read, so microseconds
saved are bytes read per token at one bandwidth. Refuses a budget that not even BF16 weights would keep.
Run it: `kilotok run SPEC --set quantize.max_divergence=0.002`.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from specs.errors import InputError
from tasks.job import Progress
from tasks.quantize.coverage import quantizer_target
from tasks.quantize.reload import decoder_layers


@contextlib.contextmanager
def disabled(quantizers: Iterable[Any]) -> Iterator[None]:
    """These quantizers pass everything through."""
    off = [quantizer for quantizer in quantizers if quantizer.is_enabled]
    for quantizer in off:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in off:
            quantizer.enable()


@torch.no_grad()
def log_probabilities(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """[B, T, V] in FP32."""
    return model(input_ids=ids_BT, use_cache=False).logits.float().log_softmax(-1)


def divergence(reference_BTV: torch.Tensor, other_BTV: torch.Tensor) -> float:
    """KL(reference || other) in nats per token; both are log probabilities."""
    return float((reference_BTV.exp() * (reference_BTV - other_BTV)).sum(-1).mean())


def blocks(model: Any, quantizers: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of the weight and input quantizers of each block, by the block's module name."""
    found: dict[str, list[str]] = defaultdict(list)
    layers = decoder_layers(model)
    for name in quantizers:
        layer = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        if layer and quantizer_target(name)[1] != "kv":
            found[f"{layer}.{name.removeprefix(f'{layer}.').split('.')[0]}"].append(name)
    return dict(found)


def bytes_read_per_token(model: Any, names: Iterable[str]) -> int:
    """What FP8 saves of these weights for one token: a byte per element; of the experts, only the chosen ones."""
    total = 0
    text = model.config.get_text_config()
    for name in names:
        weight, kind = quantizer_target(name)
        if kind == "weight":
            tensor = model.get_parameter(weight)
            share = text.num_experts_per_tok / text.num_local_experts if tensor.ndim == 3 else 1.0
            total += int(tensor.numel() * share)
    return total


def keep(
    model: Any, quantizers: Mapping[str, Any], ids_BT: torch.Tensor, budget: float | None, progress: Progress
) -> tuple[list[str], float]:
    """(blocks whose quantizers were switched off for good, the divergence that is left); none without a budget."""
    with disabled(quantizers.values()):
        reference_BTV = log_probabilities(model, ids_BT)

    def measure() -> float:
        return divergence(reference_BTV, log_probabilities(model, ids_BT))

    left = measure()
    kept: list[str] = []
    if budget is None or left <= budget:
        return kept, left
    by_block = blocks(model, quantizers)
    cost: dict[str, float] = {}
    for i, (block, names) in enumerate(by_block.items()):
        others = [quantizers[name] for other in by_block if other != block for name in by_block[other]]
        with disabled(others):
            cost[block] = measure() / bytes_read_per_token(model, names)
        progress(i + 1, len(by_block), "sensitivity")

    def switch(block: str, quantized: bool) -> float:
        for name in by_block[block]:
            (quantizers[name].enable if quantized else quantizers[name].disable)()
        return measure()

    for block in sorted(cost, key=lambda name: -cost[name]):
        left = switch(block, quantized=False)
        kept.append(block)
        if left <= budget:
            break
    else:
        raise _out_of_reach(left, budget)
    # A small block costs much per byte and may be worth little in all: what is not needed goes back, the largest first.
    for block in sorted(kept, key=lambda name: -bytes_read_per_token(model, by_block[name])):
        without = switch(block, quantized=True)
        if without <= budget:
            kept.remove(block)
            left = without
        else:
            switch(block, quantized=False)
    return kept, left


def _out_of_reach(left: float, budget: float) -> InputError:
    return InputError(
        f"divergence is {left:.2g} nats per token with every weight in BF16, {budget:.2g} is asked for",
        "quantize.max_divergence",
        "raise it, or take a recipe that leaves K and V alone",
    )
