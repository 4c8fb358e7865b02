"""modelopt's FP8 export of a random model, with the inputs and outputs of its own quantized layers. Run: by
conftest.py."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from tests.engine_plugins.models import tokens


def _share_scales(model: torch.nn.Module) -> None:
    """Fused parts get one weight scale before export, so that the export has nothing left to round again."""
    for layer in model.model.layers:
        attention, block = layer.self_attn, layer.feed_forward
        block = getattr(block, "shared_expert", block)
        for parts in ((attention.q_proj, attention.k_proj, attention.v_proj), (block.gate_proj, block.up_proj)):
            highest = max(part.weight_quantizer.amax for part in parts)
            for part in parts:
                part.weight_quantizer.amax = highest.clone()


def export_fp8(checkpoint: Path, out: Path) -> Path:
    """Quantize (recipe general/ptq/fp8_default-kv_fp8), export, and record every quantized layer's call on one text."""
    import modelopt.torch.quantization as mtq
    from modelopt.recipe import load_recipe
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import Llama4ForCausalLM

    model = Llama4ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    recipe = load_recipe("general/ptq/fp8_default-kv_fp8").quantize
    calibration = [torch.tensor([tokens(150, seed)]) for seed in range(20, 24)]
    config = recipe if isinstance(recipe, dict) else recipe.model_dump()
    model = mtq.quantize(model, config, lambda m: [m(batch) for batch in calibration])
    _share_scales(model)
    calls: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith(("_proj", ".experts", "self_attn")):
            module.register_forward_hook(_recorder(calls, name), with_kwargs=True)
    ids = tokens(100, seed=30)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    torch.save({"ids": ids, "logits": logits, "calls": calls}, out / "fake.pt")
    model.config.architectures = ["Llama4ForCausalLM"]
    export_hf_checkpoint(copy.deepcopy(model), export_dir=out)
    return out


def _recorder(calls: dict[str, tuple[torch.Tensor, torch.Tensor]], name: str):  # noqa: ANN202 - a hook
    def record(module: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        result = output[0] if isinstance(output, tuple) else output
        calls[name] = (given.detach().clone(), result.detach().clone())

    return record
