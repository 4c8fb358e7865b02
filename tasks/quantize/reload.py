"""Read an exported checkpoint back without modelopt and run it: the export's independent witness.

A plain transformers model in FP32 that reads each layer from the files when its turn comes: weights dequantised,
activations and K/V rounded with the checkpoint's own scales, exactly as an engine would. It holds one matrix or one
expert at a time, so it can witness a checkpoint of any size. Refuses to be fast, and to know what is not in the files.
Run it: nothing to run; `python -m pytest tests/tasks/test_quantize.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AttentionInterface, AutoConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from specs.errors import IntegrityError
from tasks.quantize.coverage import scale_name
from tasks.quantize.rounding import BLOCK, E2M1, FP8, round_e4m3, round_nvfp4
from tasks.quantize.shards import read_header, shard_files

ATTENTION = "kilotok_fp8_kv"


class Weights(Mapping[str, torch.Tensor]):
    """The checkpoint's tensors in FP32, dequantised as they are asked for."""

    def __init__(self, checkpoint: Path, tied: bool) -> None:
        self._files = {tensor.name: file for file in shard_files(checkpoint) for tensor in read_header(file)}
        self._aliases = {}
        if tied:
            embedding = next(name for name in self._files if name.endswith("embed_tokens.weight"))
            head = embedding.replace("model.embed_tokens", "lm_head")
            self._aliases = {} if head in self._files else {head: embedding}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.part(name, None)

    def __iter__(self) -> Iterator[str]:
        return (name for name in (*self._files, *self._aliases) if not name.endswith(("_scale", "_scale_2")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def scale(self, weight: str, role: str) -> torch.Tensor | None:
        """The scale of a weight or of its input; None where there is none."""
        name = scale_name(weight, role)
        return self.stored(name).float() if name in self._files else None

    def part(self, name: str, expert: int | None) -> torch.Tensor:
        """A tensor, or one expert's slice of it."""
        name = self._aliases.get(name, name)
        stored = self.stored(name, expert)
        if stored.dtype == FP8:
            return stored.float() * self.stored(scale_name(name, "weight")).float()
        if stored.dtype == torch.uint8:
            scales = self.stored(scale_name(name, "weight"), expert).float()
            scales = scales * self.stored(scale_name(name, "weight_2")).float()
            dim = stored.ndim - 1 if name.endswith(".weight") else stored.ndim - 2  # packed experts are [in, out]
            codes = torch.stack([stored & 15, stored >> 4], dim + 1).flatten(dim, dim + 1).long()
            values = E2M1[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
            return values * scales.repeat_interleave(BLOCK, dim)
        return stored.float()

    def stored(self, name: str, expert: int | None = None) -> torch.Tensor:
        """A tensor, or one expert's slice of it, as it is in the file."""
        if name not in self._files:
            raise IntegrityError("the export lost a tensor", name, "do not serve it")
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name) if expert is None else file.get_slice(name)[expert]


def reload(checkpoint: Path) -> Any:
    """The checkpoint as an FP32 model that computes with its quantized values."""
    from accelerate import cpu_offload, init_empty_weights

    config_dict = json.loads((checkpoint / "config.json").read_text())
    config_dict.pop("quantization_config", None)
    config = AutoConfig.for_model(**config_dict)
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    architecture = getattr(transformers, config_dict["architectures"][0])
    with init_empty_weights(include_buffers=False):
        model = architecture._from_config(config, dtype=torch.float32, attn_implementation=ATTENTION)
    weights = Weights(checkpoint, config.get_text_config().tie_word_embeddings)
    wrong = sorted(set(dict(model.named_parameters(remove_duplicate=False))) ^ set(weights))
    if wrong:
        raise IntegrityError("the export lost or invented a tensor", wrong[0], "do not serve it")
    model.eval()
    model.set_input_embeddings(_Embedding(weights))
    cpu_offload(model, execution_device=torch.device("cpu"), state_dict=weights)
    described = json.loads((checkpoint / "hf_quant_config.json").read_text())["quantization"]
    _hook(model, weights, described.get("kv_cache_quant_algo") == "FP8")
    return model


class _Embedding(torch.nn.Module):
    """Rows from the file; transformers asks where `weight` lies before it has been read."""

    weight = torch.empty(0)

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._weights = weights
        self._name = next(name for name in weights if name.endswith("embed_tokens.weight"))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._weights.stored(self._name)[ids].float()


def _hook(model: Any, weights: Weights, rounds_kv: bool) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and weights.scale(f"{name}.weight", "input") is not None:
            module.register_forward_pre_hook(_rounding(weights, f"{name}.weight"))
        elif type(module).__name__ == "Llama4TextExperts":
            module.forward = _experts(module, weights, name)
        elif rounds_kv and name.endswith(".self_attn"):
            module.kv_scales = [weights.scale(f"{name}.{part}_proj.{part}_scale", "kv") for part in "kv"]


def _rounding(weights: Weights, name: str) -> Any:
    rounded = _activation(weights, name)
    return lambda module, args: (rounded(args[0]), *args[1:])


def _activation(weights: Weights, name: str) -> Any:
    """How the input of this weight is rounded, read off the files."""
    scale = weights.scale(name, "input")
    if scale is None:
        return lambda x: x
    if weights.scale(name, "weight_2") is not None:
        return lambda x: round_nvfp4(x, scale)
    return lambda x: round_e4m3(x, scale)


def _experts(module: Any, weights: Weights, name: str) -> Any:
    gate_up, down = f"{name}.gate_up_proj", f"{name}.down_proj"
    before_gate_up, before_down = _activation(weights, gate_up), _activation(weights, down)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        hidden_END = hidden.view(module.num_experts, -1, module.hidden_size)
        out_END = torch.zeros_like(hidden_END)
        for expert in range(module.num_experts):
            chosen = hidden_END[expert].any(-1)  # tokens of other experts come as zeros, and leave as zeros
            if chosen.any():
                x_TD = before_gate_up(hidden_END[expert, chosen])
                gate, up = (x_TD @ weights.part(gate_up, expert)).chunk(2, dim=-1)
                out_END[expert, chosen] = before_down(up * module.act_fn(gate)) @ weights.part(down, expert)
        return out_END.view(-1, module.hidden_size)

    return forward


def _attention(module: Any, query: Any, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any) -> Any:
    scales = getattr(module, "kv_scales", None)
    if scales is not None:
        key, value = (round_e4m3(x, 1.0 if s is None else s) for x, s in zip((key, value), scales, strict=True))
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def decoder_layers(model: Any) -> dict[str, Any]:
    """The text decoder's layers by module name."""
    return {name: module for name, module in model.named_modules() if type(module).__name__.endswith("DecoderLayer")}


def one_length(sequences: list[list[int]], max_tokens: int) -> torch.Tensor:
    """[B, T]: the shorter ones are said again until they are as long as the longest. Padding would be measured too."""
    length = min(max_tokens, max(map(len, sequences)))
    return torch.tensor([(ids * (length // len(ids) + 1))[:length] for ids in sequences])


@torch.no_grad()
def trace(model: Any, ids_BT: torch.Tensor) -> list[torch.Tensor]:
    """Each decoder layer's output [B, T, D] and the logits [B, T, V], on the CPU."""
    outputs: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, args, out: outputs.append(_first(out).cpu()))
        for layer in decoder_layers(model).values()
    ]
    try:
        logits = model(input_ids=ids_BT, use_cache=False).logits.cpu()
    finally:
        for handle in handles:
            handle.remove()
    return [*outputs, logits]


@torch.no_grad()
def compare(model: Any, ids_BT: torch.Tensor, traces: list[torch.Tensor]) -> tuple[dict[str, list[float]], list[float]]:
    """Relative differences per prompt: of each layer given the traced input, and of the logits of a free run.

    Both in one pass, as two halves of a batch, because at full size a pass reads the whole checkpoint.
    """
    batch = len(ids_BT)
    found: dict[str, list[float]] = {}
    handles = []

    def feed(i: int) -> Any:
        return lambda module, args: (torch.cat([traces[i - 1].float(), args[0][batch:]]), *args[1:])

    def check(i: int, name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            pairs = zip(_first(output)[:batch], traces[i], strict=True)
            found[name] = [relative_difference(ours, theirs) for ours, theirs in pairs]

        return hook

    for i, (name, layer) in enumerate(decoder_layers(model).items()):
        if i > 0:
            handles.append(layer.register_forward_pre_hook(feed(i)))
        handles.append(layer.register_forward_hook(check(i, name)))
    try:
        logits = model(input_ids=ids_BT.repeat(2, 1), use_cache=False).logits[batch:]
    finally:
        for handle in handles:
            handle.remove()
    return found, [relative_difference(ours, theirs) for ours, theirs in zip(logits, traces[-1], strict=True)]


def _first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """|ours - theirs| / |theirs|, both flattened."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-30))
