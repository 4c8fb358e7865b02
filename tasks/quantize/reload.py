"""Read an exported FP8 checkpoint back without modelopt and run it: the export's independent witness.

A plain transformers model in FP32: weights dequantised, activations and K/V rounded to E4M3 with the checkpoint's own
scales, exactly as an engine would. Refuses to be fast, and to know anything that is not in the directory.
Run it: nothing to run; `python -m pytest tests/tasks/test_quantize.py`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, AutoConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tasks.quantize.detectors import scale_name
from tasks.quantize.export import FP8, source_tensors

ATTENTION = "kilotok_fp8_kv"


def round_e4m3(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """x rounded to the nearest E4M3 multiple of `scale`, saturating."""
    return (x / scale).clamp(-448, 448).to(FP8).float() * scale


def reload(checkpoint: Path) -> Any:
    """The checkpoint as an FP32 model that computes with FP8 values."""
    tensors = dict(source_tensors(checkpoint))
    config_dict = json.loads((checkpoint / "config.json").read_text())
    config_dict.pop("quantization_config", None)
    config = AutoConfig.for_model(**config_dict)
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    with _no_init():
        architecture = getattr(transformers, config_dict["architectures"][0])
        model = architecture._from_config(config, dtype=torch.float32, attn_implementation=ATTENTION)
    state = {}
    for name, tensor in tensors.items():
        if tensor.dtype == FP8:
            state[name] = tensor.float() * tensors[scale_name(name, "weight")].float()
        elif not name.endswith("_scale"):
            state[name] = tensor.float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = (
        {n for n in missing if n.endswith("lm_head.weight")} if config.get_text_config().tie_word_embeddings else set()
    )
    if set(missing) - tied or unexpected:
        raise KeyError(f"missing {sorted(set(missing) - tied)[:3]}, unexpected {sorted(unexpected)[:3]}")
    model.tie_weights()
    _hook(model, tensors)
    return model.eval()


def _hook(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{name}.input_scale" in tensors:
            module.register_forward_pre_hook(_rounding(tensors[f"{name}.input_scale"].float()))
        elif type(module).__name__ == "Llama4TextExperts" and f"{name}.gate_up_proj_input_scale" in tensors:
            module.forward = _experts(module, tensors, name)
        elif f"{name}.k_proj.k_scale" in tensors:
            module.kv_scales = [tensors[f"{name}.{part}_proj.{part}_scale"].float() for part in "kv"]


def _rounding(scale: torch.Tensor) -> Any:
    return lambda module, args: (round_e4m3(args[0], scale), *args[1:])


def _experts(module: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    first, second = (tensors[f"{name}.{part}_proj_input_scale"].float() for part in ("gate_up", "down"))

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        hidden_END = hidden.view(module.num_experts, -1, module.hidden_size)
        gate, up = torch.bmm(round_e4m3(hidden_END, first), module.gate_up_proj).chunk(2, dim=-1)
        return torch.bmm(round_e4m3(up * module.act_fn(gate), second), module.down_proj).view(-1, module.hidden_size)

    return forward


def _attention(module: Any, query: Any, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any) -> Any:
    scales = getattr(module, "kv_scales", None)
    if scales is not None:
        key, value = round_e4m3(key, scales[0]), round_e4m3(value, scales[1])
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


@contextlib.contextmanager
def _no_init() -> Iterator[None]:
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield


def decoder_layers(model: Any) -> dict[str, Any]:
    """The text decoder's layers by module name."""
    return {name: module for name, module in model.named_modules() if type(module).__name__.endswith("DecoderLayer")}


@torch.no_grad()
def trace(model: Any, token_ids: list[int], inputs: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """Each decoder layer's output and the logits, for one sequence; with `inputs`, each layer is fed that instead."""
    outputs: list[torch.Tensor] = []
    handles = []
    for i, layer in enumerate(decoder_layers(model).values()):
        if inputs is not None and i > 0:
            handles.append(layer.register_forward_pre_hook(lambda module, args, x=inputs[i - 1]: (x, *args[1:])))
        handles.append(layer.register_forward_hook(lambda module, args, out: outputs.append(_first(out).clone())))
    try:
        logits = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return [*outputs, logits]


def _first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """|ours - theirs| / |theirs|, both flattened."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-30))
