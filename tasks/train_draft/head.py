"""The EAGLE-3 head: modelopt's module around the target's embeddings, and its export in TensorRT-LLM's layout.

modelopt 0.47 normalises the head's hidden input twice in training (its Llama layer applies `input_layernorm`, its hook
then `hidden_norm`); TensorRT-LLM, vLLM and SGLang serve it normalised once. We train what is served, and say so in the
config. Refuses to know how it is trained. Run it: `python -m pytest tests/tasks/test_train_draft.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from specs.errors import InputError, IntegrityError

ROPE_THETA = 10000.0
REQUIRED = (
    "fc",
    "norm",
    "lm_head",
    *(f"midlayer.{n}" for n in ("input_layernorm", "hidden_norm", "post_attention_layernorm")),
    *(f"midlayer.self_attn.{n}_proj" for n in "qkvo"),
    *(f"midlayer.mlp.{n}_proj" for n in ("gate", "up", "down")),
)


def intermediate_size(draft: Mapping[str, Any], config: Any) -> int:
    """Width of the head's MLP: as the spec says, else the target's dense MLP."""
    if draft.get("intermediate_size"):
        return int(draft["intermediate_size"])
    if draft.get("ffn_multiplier"):
        return max(32, round(draft["ffn_multiplier"] * config.hidden_size / 32) * 32)
    return int(getattr(config, "intermediate_size_mlp", None) or config.intermediate_size)


def convert(target: Any, layers: list[int], width: int, ttt_steps: int, d2t: torch.Tensor | None) -> Any:
    """Turn `target` into modelopt's EAGLE-3 model in place (its decoder layers are dropped) and initialise the head."""
    import modelopt.torch.speculative as speculative

    config = target.config
    architecture = {
        "num_hidden_layers": 1,
        "intermediate_size": width,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "use_input_layernorm_in_first_layer": False,
        "use_last_layernorm": True,
        "use_aux_hidden_state": True,
        "eagle_aux_hidden_state_layer_ids": layers,
        "has_lm_head": True,
        "draft_vocab_size": config.vocab_size if d2t is None else len(d2t),
        "rope_scaling": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "rope_theta": ROPE_THETA,
    }
    options = {
        "eagle_decoder_type": "llama",
        "eagle_offline": True,
        "eagle_use_torch_compile": False,
        "eagle_ttt_steps": ttt_steps,
        "eagle_architecture_config": architecture,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        speculative.convert(target, [("eagle", options)])
    _initialise(target, d2t)
    return target


@torch.no_grad()
def _initialise(model: Any, d2t: torch.Tensor | None) -> None:
    """The target's own head and final norm are a better start than noise: their output means the same."""
    eagle = model.eagle_module
    lm_head = model.lm_head.weight
    if d2t is not None:
        eagle.d2t.copy_(d2t)
        lm_head = lm_head[(torch.arange(len(d2t)) + d2t).to(lm_head.device)]
    eagle.lm_head.weight.copy_(lm_head)
    eagle.norm.weight.copy_(model.model.norm.weight)


class Earlier:
    """An earlier export to go on from. Raises InputError, before training, when it is another head than asked for."""

    def __init__(self, path: Path, layers: list[int]) -> None:
        self.path, self.tensors = path, load_file(path / "model.safetensors")
        self.d2t = self.tensors.pop("d2t", None)
        theirs = json.loads((path / "config.json").read_text())["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
        self._require(theirs == layers, f"it sees layers {theirs}, not {layers}")

    @torch.no_grad()
    def copy_to(self, model: Any) -> None:
        """Its weights into the converted model's head."""
        own = dict(model.eagle_module.named_parameters())
        theirs = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in self.tensors.items()}
        wrong = sorted(n for n in own | theirs if n not in own or n not in theirs or own[n].shape != theirs[n].shape)
        self._require(not wrong, f"{', '.join(wrong[:3])} has another shape")
        for name, parameter in own.items():
            parameter.copy_(theirs[name])

    def _require(self, fits: bool, what: str) -> None:
        if not fits:
            raise InputError(
                f"the head to start from does not fit: {what}", str(self.path), "draft.training.warm_start: null"
            )


@torch.no_grad()
def round_to_bf16(model: Any) -> None:
    """Give the head the values it is exported with, so that what is measured and compared is what is served."""
    for parameter in model.eagle_module.parameters():
        parameter.copy_(parameter.bfloat16())


def export(model: Any, out: Path) -> None:
    """modelopt's exporter, then TensorRT-LLM's names: config.json and model.safetensors in `out`."""
    from modelopt.torch.export import export_speculative_decoding

    scratch = out / ".scratch" / "export"
    export_speculative_decoding(model, export_dir=scratch)
    tensors = {}
    for name, tensor in load_file(scratch / "model.safetensors").items():
        tensor = tensor if name == "d2t" else tensor.bfloat16()
        tensors[name.replace("layers.0.", "midlayer.")] = tensor.contiguous()
    config = json.loads((scratch / "config.json").read_text())
    config.update(torch_dtype="bfloat16", rope_theta=ROPE_THETA, rope_scaling=None)
    config["draft_vocab_size"] = tensors["lm_head.weight"].shape[0]
    check_layout(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def check_layout(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Names, shapes and keys that TensorRT-LLM's EAGLE-3 loader needs."""
    if config.get("architectures") != ["LlamaForCausalLMEagle3"] or not config.get("draft_vocab_size"):
        raise IntegrityError(
            "not TensorRT-LLM's EAGLE-3 config", "config.json", "architectures and draft_vocab_size are required"
        )
    compressed = config["draft_vocab_size"] != config["vocab_size"]
    wanted = {f"{name}.weight" for name in REQUIRED} | ({"d2t"} if compressed else set())
    if set(shapes) != wanted:
        raise IntegrityError(
            f"tensors {sorted(set(shapes) ^ wanted)} are missing or unknown", "model.safetensors", "check head.py"
        )
    hidden = config["hidden_size"]
    for name, shape in (("fc.weight", (hidden, 3 * hidden)), ("lm_head.weight", (config["draft_vocab_size"], hidden))):
        if shapes[name] != shape:
            raise IntegrityError(f"shape is {shapes[name]}, not {shape}", name, "check head.py")
    if shapes["midlayer.self_attn.q_proj.weight"][1] != 2 * hidden:
        raise IntegrityError(
            "q_proj does not take embedding and hidden state", "midlayer.self_attn.q_proj.weight", "check head.py"
        )
