"""Measure this machine: the native engine's cycle on random Llama 4 shapes, the rows of `native.yaml`.

Random weights cost what trained ones do, and drafts are accepted by decree, so a shape needs no training to be timed.
Refuses to be a bench of a model, and to share the machine: other work shows up in every figure.
Run it: `python -m tasks.predict.measure > rows.yaml` (five minutes), then `python -m tasks.predict.fit_cpu`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

NEW_TOKENS = 96
ACCEPTANCE = 2.5  # by decree; changes only how many rows the first draft pass has


@dataclass(frozen=True)
class Random:
    """One random model; sizes in elements. Heads are 64 wide, or 32 in the small ones."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int  # of experts; dense layers have twice that
    experts: int
    vocab: int

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json, as far as anything here reads it."""
        return {
            "model_type": "llama4_text", "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": 64 if self.hidden >= 512 else 32, "intermediate_size": self.ffn,
            "intermediate_size_mlp": 2 * self.ffn, "num_local_experts": self.experts, "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2, "vocab_size": self.vocab, "attention_chunk_size": 128,
            "max_position_embeddings": 2048, "use_qk_norm": False, "floor_scale": 64, "attn_scale": 0.1,
        }  # fmt: skip


# The predictor is calibrated on these and judged on `HELD_OUT`.
SHAPES = (
    Random("1M", 128, 8, 4, 2, 192, 4, 512),
    Random("3M", 160, 8, 5, 1, 224, 4, 1024),
    Random("9M", 256, 8, 8, 2, 320, 4, 2048),
    Random("24M", 384, 8, 12, 4, 512, 4, 4096),
    Random("75M", 512, 12, 8, 2, 1024, 4, 8192),
    Random("150M", 768, 12, 12, 4, 1280, 4, 8192),
    Random("500M", 1280, 12, 20, 4, 2560, 4, 8192),
)
HELD_OUT = (Random("tiny-llama4", 192, 8, 6, 2, 256, 4, 1024), Random("300M", 1024, 12, 16, 4, 2048, 4, 8192))
# (draft tokens, users, prompt tokens)
SETTINGS = ((3, 1, 64), (0, 1, 64), (1, 1, 64), (7, 1, 64), (3, 4, 64), (3, 1, 512))


def write_checkpoint(shape: Random, folder: Path) -> Path:
    """An FP8 checkpoint as modelopt exports it (router, embedding and lm_head BF16), with random weights."""
    import torch
    from safetensors.torch import save_file

    generator, tensors = torch.Generator().manual_seed(0), {}
    config, hidden = shape.config, shape.hidden
    width, kv_width = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))

    def bf16(name: str, *size: int) -> None:
        tensors[name] = (torch.randn(*size, generator=generator) * size[-1] ** -0.5).to(torch.bfloat16)

    def fp8(name: str, *size: int, suffix: str = ".weight", join: str = ".") -> None:
        bits = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        tensors[name + suffix] = torch.where((bits & 0x7F) > 0x60, bits & 0xDF, bits).view(torch.float8_e4m3fn)
        tensors[f"{name}{join}weight_scale"] = torch.tensor(0.05 * size[-1] ** -0.5)
        tensors[f"{name}{join}input_scale"] = torch.tensor(0.02)

    bf16("model.embed_tokens.weight", shape.vocab, hidden)
    bf16("lm_head.weight", shape.vocab, hidden)
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for index in range(shape.layers):
        layer = f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        for part, rows in (("q", width), ("k", kv_width), ("v", kv_width)):
            fp8(f"{layer}.self_attn.{part}_proj", rows, hidden)
        for name in ("k", "v"):
            tensors[f"{layer}.self_attn.{name}_proj.{name}_scale"] = torch.tensor(0.02)
        fp8(f"{layer}.self_attn.o_proj", hidden, width)
        block, ffn = f"{layer}.feed_forward", 2 * shape.ffn
        if index % 2:
            bf16(f"{block}.router.weight", shape.experts, hidden)
            tensors[f"{block}.router.weight"] *= 4
            fp8(f"{block}.experts.gate_up_proj", shape.experts, hidden, ffn, suffix="", join="_")
            fp8(f"{block}.experts.down_proj", shape.experts, shape.ffn, hidden, suffix="", join="_")
            block, ffn = f"{block}.shared_expert", shape.ffn
        for part in ("gate", "up"):
            fp8(f"{block}.{part}_proj", ffn, hidden)
        fp8(f"{block}.down_proj", hidden, ffn)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Llama4ForCausalLM"]}))
    return folder


def write_draft(shape: Random, folder: Path) -> Path:
    """An EAGLE-3 head in TensorRT-LLM's layout, BF16, with the target's dense width and whole vocabulary."""
    import torch
    from safetensors.torch import save_file

    config, hidden = shape.config, shape.hidden
    width, kv_width = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    ffn, generator = 2 * shape.ffn, torch.Generator().manual_seed(1)
    sizes = {
        "fc": (hidden, 3 * hidden), "lm_head": (shape.vocab, hidden), "midlayer.self_attn.q_proj": (width, 2 * hidden),
        "midlayer.self_attn.k_proj": (kv_width, 2 * hidden), "midlayer.self_attn.v_proj": (kv_width, 2 * hidden),
        "midlayer.self_attn.o_proj": (hidden, width), "midlayer.mlp.gate_proj": (ffn, hidden),
        "midlayer.mlp.up_proj": (ffn, hidden), "midlayer.mlp.down_proj": (hidden, ffn),
    }  # fmt: skip
    tensors = {
        f"{name}.weight": (torch.randn(*size, generator=generator) * size[-1] ** -0.5).to(torch.bfloat16)
        for name, size in sizes.items()
    }
    for name in ("norm", *(f"midlayer.{n}" for n in ("input_layernorm", "hidden_norm", "post_attention_layernorm"))):
        tensors[f"{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    same = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    record = {**{name: config[name] for name in same}, "intermediate_size": ffn, "draft_vocab_size": shape.vocab,
              "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "rms_norm_eps": 1e-5,
              "max_position_embeddings": 2048}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def write_bundle(shape: Random, folder: Path, draft_tokens: int = 7) -> Path:
    """Checkpoint, draft and bundle of a random shape under `folder`; returns the bundle."""
    from engine_plugins.native.bundle import build_bundle

    checkpoint, draft = write_checkpoint(shape, folder / "checkpoint"), write_draft(shape, folder / "draft")
    build_bundle(
        checkpoint, folder / "bundle", draft=draft, draft_tokens=draft_tokens, max_seq_len=1024, max_batch_size=4
    )
    return folder / "bundle"


def sample_cycles(
    bundle: Path, draft_tokens: int, users: int, prompt_tokens: int, tokens: int = NEW_TOKENS
) -> list[dict[str, float]]:
    """One dict of microseconds per cycle with all users running: the engine's parts, and `caller`, what is left of the
    time that the engine's caller waits."""
    import numpy as np

    from engine_plugins.native.engine import Engine, SamplingParams

    record = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**record, "draft_tokens": draft_tokens}))
    acceptance = min(ACCEPTANCE, 1 + 0.5 * draft_tokens) if draft_tokens else None
    engine = Engine(bundle, forced_acceptance=acceptance, verify_digests=False)
    rng, cycles = np.random.default_rng(0), []  # type: np.random.Generator, list[dict[str, float]]
    try:
        prompts = [rng.integers(3, engine.config.vocab_size, prompt_tokens).tolist() for _ in range(users)]
        requests = [engine.submit(p, SamplingParams(max_tokens=tokens, ignore_eos=True)) for p in prompts]
        while any(not request.output_ids for request in requests):
            engine.step()
        while engine.has_work:
            full, before, begin = engine.num_running == users, engine.counters(), time.perf_counter()
            engine.step()
            spent, after = time.perf_counter() - begin, engine.counters()
            earlier = before["seconds_by_group"]
            parts = {name: 1e6 * (at - earlier[name]) for name, at in after["seconds_by_group"].items()}
            cycles += [{**parts, "caller": 1e6 * spent - sum(parts.values())}] if full else []
    finally:
        engine.close()
    return cycles


def undisturbed(cycles: list[dict[str, float]]) -> dict[str, float]:
    """Each part's lower quintile. A virtual machine loses milliseconds to its neighbours in some part of almost every
    long cycle; a mean or a median of whole cycles would time those."""
    import numpy as np

    return {name: round(float(np.percentile([cycle[name] for cycle in cycles], 20)), 2) for name in cycles[0]}


def measure(folder: Path, shapes: tuple[Random, ...], passes: int = 3) -> list[dict[str, Any]]:
    """Rows of every shape and setting. Passes go over all of them in turn, so that a slow minute of the machine falls
    on one pass of many rows and not on all passes of one."""
    samples: dict[tuple[str, tuple[int, int, int]], list[dict[str, float]]] = {}
    bundles = {shape.name: write_bundle(shape, folder / shape.name) for shape in shapes}
    for _ in range(passes):
        for shape in shapes:
            for setting in SETTINGS:
                samples.setdefault((shape.name, setting), []).extend(sample_cycles(bundles[shape.name], *setting))
    rows = []
    for (name, (draft_tokens, users, prompt_tokens)), cycles in samples.items():
        parts = undisturbed(cycles)
        context = prompt_tokens + NEW_TOKENS // 2
        rows.append({"shape": name, "draft_tokens": draft_tokens, "users": users, "context": context,
                     "cycle_us": round(sum(parts.values()), 1), "parts_us": parts})  # fmt: skip
    return rows


def to_yaml(rows: list[dict[str, Any]], shapes: tuple[Random, ...]) -> str:
    """The body of native.yaml; its head says by hand when and where."""
    held_out = {shape.name for shape in HELD_OUT}
    tree = {
        "shapes": {shape.name: shape.config for shape in shapes},
        "rows": [{**row, **({"held_out": True} if row["shape"] in held_out else {})} for row in rows],
    }
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=118)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    everything = {shape.name: shape for shape in (*SHAPES, *HELD_OUT)}
    parser.add_argument("--shapes", nargs="*", default=list(everything), choices=list(everything))
    parser.add_argument("--passes", type=int, default=3)
    arguments = parser.parse_args()
    shapes = tuple(everything[name] for name in arguments.shapes)
    with tempfile.TemporaryDirectory() as folder:
        print(to_yaml(measure(Path(folder), shapes, arguments.passes), shapes))


if __name__ == "__main__":
    main()
