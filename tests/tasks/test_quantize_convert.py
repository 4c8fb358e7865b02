"""Streaming conversion: the same bytes as modelopt, no more memory than its buffers, and nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from specs.errors import InputError, IntegrityError
from tasks.job import Progress
from tasks.quantize import cast, convert, coverage, rounding, shards
from tests.tasks.random_checkpoints import write_checkpoint

ALL_BF16 = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
CASTERS = {"c++": cast.caster(), "torch": cast.Caster()}


def cast_bytes(kernel: cast.Caster, weight: torch.Tensor, scale: float) -> tuple[np.ndarray, cast.Loss]:
    dtype = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[weight.dtype]
    out = np.empty(weight.numel(), np.uint8)
    return out, kernel.cast(weight.contiguous().view(torch.uint8).numpy().copy(), dtype, scale, out)


@pytest.mark.parametrize("kernel", CASTERS.values(), ids=CASTERS)
@pytest.mark.parametrize("exponent", [-20, -3, 0, 9])
def test_every_bf16_value_becomes_modelopts_byte(kernel: cast.Caster, exponent: int) -> None:
    from modelopt.torch.export.quant_utils import to_quantized_weight

    for mantissa in (1.0, 1.1, 1.337, 1.99):
        scale = torch.tensor(mantissa * 2.0**exponent)
        values = ALL_BF16[ALL_BF16.float().abs() / scale <= 448]
        theirs = to_quantized_weight(values.float(), scale, "fp8")
        ours, _ = cast_bytes(kernel, values, float(scale))
        assert np.array_equal(ours, theirs.view(torch.uint8).numpy())


@pytest.mark.parametrize("kernel", CASTERS.values(), ids=CASTERS)
def test_the_loss_is_what_was_lost(kernel: cast.Caster) -> None:
    torch.manual_seed(0)
    weight = torch.randn(10_007).bfloat16()  # no multiple of a vector or block
    scale = float(weight.abs().max() / 448) / 2  # half of the range: the outermost saturate
    out, loss = cast_bytes(kernel, weight, scale)
    back = torch.from_numpy(out).view(torch.float8_e4m3fn).double() * scale
    assert loss.signal == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
    assert loss.noise == pytest.approx(float((weight.double() - back).square().sum()), rel=1e-4)
    assert loss.clipped == int((weight.float().abs() > 448 * scale).sum()) > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_amax_lets_no_nan_or_inf_hide(bad: float, dtype: str) -> None:
    for position in (0, 4999, 9999):
        weight = torch.zeros(10_000, dtype=cast.SOURCE_DTYPES[dtype])
        weight[position] = bad
        assert not np.isfinite(cast.caster().amax(weight.view(torch.uint8).numpy(), dtype))


def test_nvfp4_rounding_is_modelopts() -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    torch.manual_seed(0)
    weight = torch.randn(64, 128).bfloat16().float()
    weight[0, :16] = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0] * 2)  # every tie
    scale = weight.abs().max() / (6 * 448)
    quantized, blocks, _ = NVFP4QTensor.quantize(weight, 16, None, scale, try_tensorrt=False)
    theirs = quantized.dequantize(torch.float32, scale=blocks, double_scale=scale, block_sizes={-1: 16})
    assert torch.equal(rounding.round_nvfp4(weight, scale), theirs)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint in three shards."""
    path = write_checkpoint(tmp_path / "source")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(3):
        file = f"model-0000{i + 1}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[i::3], file)
    (path / shards.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def scales_of(source: Path) -> dict[str, float]:
    """Every scale that FP8 needs; the activations' are made up."""
    config = json.loads((source / "config.json").read_text())
    found = convert.scan(source, Progress())
    weights = coverage.matrices(config)
    scales = {coverage.scale_name(name, "weight"): found[name] / 448 for name in weights}
    scales |= {coverage.scale_name(name, "input"): 0.125 for name in weights}
    return scales | {f"{a}.{p}_proj.{p}_scale": 0.25 for a in coverage.attention_modules(config) for p in "kv"}


def run(source: Path, out: Path) -> list:
    out.mkdir(exist_ok=True)
    return convert.convert(source, out, scales_of(source), out / ".scratch", Progress())


def test_shards_come_out_as_they_went_in(source: Path, tmp_path: Path) -> None:
    rows = run(source, tmp_path / "out")
    index = json.loads((tmp_path / "out" / shards.INDEX).read_text())
    before = {name: tensor for file in shards.shard_files(source) for name, tensor in load_file(file).items()}
    after = {}
    for file in shards.shard_files(tmp_path / "out"):
        tensors = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in tensors)
        after |= tensors
    scales = scales_of(source)
    assert set(after) == set(before) | set(scales)
    assert len(rows) == len(coverage.matrices(json.loads((source / "config.json").read_text())))
    for name, weight in before.items():
        scale = scales.get(coverage.scale_name(name, "weight"))
        wanted = weight if scale is None else (weight.float() / torch.tensor(scale)).to(torch.float8_e4m3fn)
        assert torch.equal(after[name].view(torch.uint8), wanted.view(torch.uint8)), name
    assert all(float(after[name]) == np.float32(value) for name, value in scales.items())


def test_a_tensor_of_many_chunks_is_seamless(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    weight = torch.randn(3, 1009, 5003).bfloat16()  # 30 MB; no chunk ends where an expert does
    (tmp_path / "out").mkdir()
    save_file({name: weight, "z": weight[0].clone()}, tmp_path / "model.safetensors")
    convert.convert(tmp_path, tmp_path / "out", {f"{name}_weight_scale": 0.01}, tmp_path / "scratch", Progress())
    after = load_file(tmp_path / "out" / "model.safetensors")
    wanted = (weight.float() / torch.tensor(0.01)).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(after[name].view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(after["z"], weight[0])


def test_a_second_run_writes_only_what_is_missing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = run(source, out)
    first, second, third = shards.shard_files(out)
    second.unlink()
    third.with_suffix(".part").write_bytes(b"half")
    (out / ".scratch" / f"{third.name}.json").unlink()  # killed before the shard was done
    untouched = first.stat().st_mtime_ns, third.stat().st_mtime_ns
    assert run(source, out) == rows
    assert second.is_file()
    assert first.stat().st_mtime_ns == untouched[0]
    assert third.stat().st_mtime_ns > untouched[1]
    assert not list(out.glob("*.part"))


def test_other_scales_are_other_shards(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    scales = {name: 2 * value for name, value in scales_of(source).items()}
    convert.convert(source, out, scales, out / ".scratch", Progress())
    tensors = {name: t for file in shards.shard_files(out) for name, t in load_file(file).items()}
    assert all(float(tensors[name]) == np.float32(value) for name, value in scales.items())


def test_a_scale_without_a_tensor_is_refused(source: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("out").mkdir()
    scales = {**scales_of(source), "model.layers.9.self_attn.q_proj.weight_scale": 0.5}
    with pytest.raises(IntegrityError, match="no tensor for this scale.*layers.9"):
        convert.convert(source, tmp_path / "out", scales, tmp_path / "scratch", Progress())
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["model.layers.1.feed_forward.experts.down_proj", "model.norm.weight"])
def test_nan_leaves_no_shard_behind(source: Path, tmp_path: Path, name: str) -> None:
    scales = scales_of(source)
    file = source / json.loads((source / shards.INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name].view(-1)[7] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=f"NaN or Inf.*{name}"):
        convert.scan(source, Progress())
    (tmp_path / "out").mkdir()
    with pytest.raises(IntegrityError, match=f"NaN or Inf.*{name}"):
        convert.convert(source, tmp_path / "out", scales, tmp_path / "scratch", Progress())
    assert not (tmp_path / "out" / file.name).exists()


def test_a_missing_shard_and_a_short_one_are_named(source: Path) -> None:
    file = shards.shard_files(source)[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(IntegrityError, match=f"cut short.*{file.name}"):
        convert.scan(source, Progress())
    file.unlink()
    with pytest.raises(IntegrityError, match=f"{file.name} is missing"):
        convert.scan(source, Progress())
    for other in source.glob("*.safetensors"):
        other.unlink()
    with pytest.raises(InputError, match="no .safetensors"):
        convert.scan(source, Progress())


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """One tensor of 512 MiB in a process of its own: what it needs beyond its imports stays below the buffers' size."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    save_file({name: torch.zeros(4, 1 << 13, 1 << 13, dtype=torch.bfloat16)}, source / "model.safetensors")
    (tmp_path / "c.json").write_text(json.dumps({"scales": {f"{name}_weight_scale": 0.5}}))
    code = (
        "import resource, sys; from tasks.quantize import convert; "
        "rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10; "
        "convert.caster(); before = rss(); convert.main(sys.argv[1:]); print(rss() - before)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(source), str(out), str(tmp_path / "c.json")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(run.stdout.split()[-1]) < convert.THREADS * 24 + 32
