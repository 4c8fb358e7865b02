"""BF16 to FP8 beside a plain copy, modelopt's export and llm-compressor's model-free path, on one synthetic checkpoint.

The checkpoint has Maverick's tensor shapes (5120 wide, packed experts) in 6.2 GB. Every step runs in a process of its
own, with the source evicted from the page cache before and the output on the disk (fsync) at the end. llm-compressor
knows no packed experts, so it gets the same bytes as one Linear per expert; it lives in another environment.
Run it: `python infra/bench_reports/quantize_streaming.py FOLDER [--peer PYTHON]`; it needs 30 GB and deletes them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

EXPERTS, LAYERS, HIDDEN, VOCAB = 8, 4, 5120, 8192
CONFIG = dict(
    vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=40, num_key_value_heads=8,
    head_dim=128, intermediate_size=8192, intermediate_size_mlp=16384, num_local_experts=EXPERTS, num_experts_per_tok=1,
    interleave_moe_layer_step=2, use_qk_norm=False, tie_word_embeddings=False, max_position_embeddings=4096,
)  # fmt: skip


def make(folder: Path, unpacked: bool) -> None:
    """Random weights, two shards per layer at most; `unpacked` writes an expert as three Linear weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    folder.mkdir(parents=True)
    config = Llama4TextConfig(**CONFIG, architectures=["Llama4ForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama4ForCausalLM(config).named_parameters()}
    torch.manual_seed(0)
    noise = torch.randn(1 << 26).bfloat16()

    def tensor(name: str) -> torch.Tensor:
        count = shapes[name].numel()
        start = sum(name.encode()) % 1000
        return noise[start:].repeat(count // (len(noise) - start) + 1)[:count].mul(0.02).reshape(shapes[name])

    groups: dict[str, list[str]] = defaultdict(list)
    for name in shapes:
        layer = ".".join(name.split(".")[1:3]) if ".layers." in name else "rest"
        groups[layer + (" experts" if ".experts." in name else "")].append(name)
    weight_map = {}
    for i, names in enumerate(groups.values()):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: tensor(name) for name in names}
        if unpacked:
            tensors = dict(one for name, packed in tensors.items() for one in unpack(name, packed))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    os.sync()


def unpack(name: str, packed):  # noqa: ANN001, ANN201 - torch is imported late
    """(name, tensor) of every expert's Linear weights [out, in]; other tensors as they are."""
    if "experts" not in name:
        yield name, packed
        return
    stem, part = name.rsplit(".", 1)
    for i, expert in enumerate(packed):
        halves = {"gate_proj": expert.chunk(2, -1)[0], "up_proj": expert.chunk(2, -1)[1]}
        matrices = halves.items() if part == "gate_up_proj" else [(part, expert)]
        for projection, weight in matrices:
            yield f"{stem}.{i}.{projection}.weight", weight.t().contiguous()


def evict(folder: Path) -> None:
    """Take the folder's files out of the page cache."""
    os.sync()
    for file in folder.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def settle(folder: Path) -> None:
    """All of the folder's bytes are on the disk."""
    for file in folder.glob("*.safetensors"):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def copy(source: Path, out: Path, scales: Path) -> float:
    started = time.perf_counter()
    for file in sorted(source.glob("*.safetensors")):
        shutil.copyfile(file, out / file.name)
    settle(out)
    return time.perf_counter() - started


def ours(source: Path, out: Path, scales: Path) -> float:
    from tasks.job import Progress
    from tasks.quantize.convert import convert

    wanted = json.loads(scales.read_text())
    started = time.perf_counter()
    convert(source, out, wanted, out / ".scratch", Progress())
    return time.perf_counter() - started


def modelopt(source: Path, out: Path, scales: Path) -> float:
    """Times the export alone: the model is loaded and calibrated before. Leaves its scales behind for `ours`."""
    import torch
    import transformers
    from modelopt.torch.export import export_hf_checkpoint

    from tasks.job import Progress
    from tasks.quantize import calibrate, coverage

    torch.set_grad_enabled(False)
    config = json.loads((source / "config.json").read_text())
    recipe = calibrate.read_recipe("general/ptq/fp8_default-kv_fp8", source)
    started = time.perf_counter()
    model = transformers.Llama4ForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    print(json.dumps({"load_s": time.perf_counter() - started}), file=sys.stderr)
    calibrate.calibrate(model, recipe, [list(range(8))], 1, Progress())
    calibrate.share_scales(model, coverage.fused_groups(sorted(coverage.expected(config, recipe["quant_cfg"]).weights)))
    scales.write_text(json.dumps(calibrate.exported_scales(calibrate.quantizers(model))))
    started = time.perf_counter()
    export_hf_checkpoint(model, dtype=torch.float32, export_dir=out)
    settle(out)
    return time.perf_counter() - started


def llmcompressor(source: Path, out: Path, scales: Path) -> float:
    """Dynamic activations, one scale per row: it has no static scheme without calibration. A worker per core."""
    from llmcompressor import model_free_ptq

    started = time.perf_counter()
    ignore = ["re:.*router", "re:.*lm_head", "re:.*embed_tokens", "re:.*norm"]
    model_free_ptq(source, out, scheme="FP8_DYNAMIC", ignore=ignore, max_workers=os.cpu_count() or 1, device="cpu")
    settle(out)
    return time.perf_counter() - started


STEPS: dict[str, Callable[[Path, Path, Path], float]] = {
    "copy": copy, "ours": ours, "modelopt": modelopt, "llmcompressor": llmcompressor,
}  # fmt: skip


def child(step: str, source: Path, out: Path, scales: Path) -> None:
    """One step in this process; its figures as the last line."""
    out.mkdir()
    evict(source)
    seconds = STEPS[step](source, out, scales)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(json.dumps({"step": step, "seconds": round(seconds, 2), "peak_rss_gb": round(peak_gb, 2),
                      "written_gb": round(written / 1e9, 2)}))  # fmt: skip


def run(folder: Path, step: str, python: str, source: str = "packed") -> dict:
    """A step in a process of its own, into a fresh directory."""
    out = folder / f"out-{step}"
    shutil.rmtree(out, ignore_errors=True)
    command = [python, __file__, "--child", step, str(folder / source), str(out), str(folder / "scales.json")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(line := done.stdout.splitlines()[-1], flush=True)
    return json.loads(line)


def tensors(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """(name, dtype, bytes) of a checkpoint's tensors."""
    import torch
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                value = shard.get_tensor(name)
                yield name, str(value.dtype), value.flatten().view(torch.uint8).numpy().tobytes()


def same(one: Path, other: Path) -> tuple[int, int]:
    """(tensors of `one`, those that `other` has with the same type and bytes)."""
    import hashlib

    known = {name: (kind, hashlib.sha256(data).digest()) for name, kind, data in tensors(other)}
    pairs = [(known.get(name), (kind, hashlib.sha256(data).digest())) for name, kind, data in tensors(one)]
    return len(pairs), sum(a == b for a, b in pairs)


def main() -> None:
    """Make, measure, compare, delete."""
    if sys.argv[1] == "--child":
        child(sys.argv[2], *map(Path, sys.argv[3:6]))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", help="the Python that has llm-compressor")
    parser.add_argument("--only", choices=("make", "measure", "compare", "delete"))
    given = parser.parse_args()
    folder = given.folder
    if given.only in (None, "make"):
        make(folder / "packed", unpacked=False)
        if given.peer:
            make(folder / "unpacked", unpacked=True)
    if given.only in (None, "measure"):
        run(folder, "modelopt", sys.executable)
        for _ in range(3):
            run(folder, "copy", sys.executable)
            run(folder, "ours", sys.executable)
        if given.peer:
            run(folder, "llmcompressor", given.peer, "unpacked")
    if given.only in (None, "compare"):
        print("tensors, of which identical to modelopt's:", *same(folder / "out-ours", folder / "out-modelopt"))
    if given.only in (None, "delete"):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
