"""The plugin package, installed as a wheel into an environment of its own, and its grafts on a stand-in for upstream.

The ops are the package's own, on the CPU their references; that the kernels compute the same is test_gpu_ops.py's
business. Run it: `python -m pytest tests/engine_plugins/trtllm/test_adapter.py`
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine_plugins.trtllm import EVIDENCE_ENV, PLUGINS_ENV, package
from engine_plugins.trtllm.adapter import SEATS

ROOT = Path(__file__).resolve().parents[3]
UPSTREAM = Path(__file__).parent / "upstream"
ALL = sorted({op for op, _ in SEATS.values()})
# Constructs the model as a rank does, runs a step of as many tokens as argv[1] says, prints its output.
RANK = """
import sys, json, torch
torch.manual_seed(0)
from tensorrt_llm._torch.models.modeling_utils import MODEL_CLASS_MAPPING
model = MODEL_CLASS_MAPPING["Llama4ForConditionalGeneration"]()
model.load_weights({})
tokens = int(sys.argv[1])
x = torch.randn(tokens, 64).to(torch.bfloat16)
y = model(torch.arange(tokens) * 9000, x)
print(json.dumps(y.float().flatten().tolist()))
"""
# Gives each seated module what upstream gives it, once through the op and once through upstream's own code.
SEAT_BY_SEAT = """
import json, sys, torch
torch.manual_seed(0)
from tensorrt_llm._torch.distributed import AllReduceFusionOp, AllReduceParams
from tensorrt_llm._torch.models.modeling_utils import MODEL_CLASS_MAPPING
model = MODEL_CLASS_MAPPING["Llama4ForConditionalGeneration"]()
model.load_weights({})
dense, mixed, nope = model.model.layers[0], model.model.layers[1], model.model.layers[3]
x, wide, narrow = (torch.randn(4, n).to(torch.bfloat16) for n in (64, 80, 32))
x8 = torch.ops.tensorrt_llm.static_quantize_e4m3_per_tensor(x, dense.feed_forward.gate_up_proj.input_scale)[0]
nope.self_attn.qkv_proj.set_position_ids(torch.arange(4) * 9000)
fused = AllReduceParams(fusion_op=AllReduceFusionOp[sys.argv[1]], residual=x, norm_weight=dense.norm_weight,
                        scale=dense.feed_forward.gate_up_proj.input_scale, eps=1e-5)
calls = {
    "router": (mixed.feed_forward.router, (x,), {}),
    "qkv": (dense.self_attn.qkv_proj, (x8,), {}),
    "qkv of BF16": (dense.self_attn.qkv_proj, (x,), {}),
    "qkv scaled": (nope.self_attn.qkv_proj, (x8,), {}),
    "gate_up": (dense.feed_forward.gate_up_proj, (x8,), {}),
    "o_proj": (dense.self_attn.o_proj, (wide,), {}),
    "down_proj": (dense.feed_forward.down_proj, (narrow,), {}),
    "moe": (mixed.feed_forward, (x8,), {"hidden_states_high": x}),
    "allreduce": (dense.all_reduce, (x,), {"all_reduce_params": fused}),
}
def run(module, args, more):
    made = module(*args, **more)
    return torch.cat([part.float().flatten() for part in (made if isinstance(made, tuple) else (made,))])
distances = {}
for name, (module, args, more) in calls.items():
    ours = run(module, args, more)
    module.kilotok.op = None
    theirs = run(module, args, more)
    distances[name] = float((ours - theirs).norm() / theirs.norm())
print(json.dumps(distances))
"""
BF16_STEP, FP8_STEP = 0.004, 0.0625


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python environment with torch, the stand-in for tensorrt_llm, and our wheel installed by pip."""
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    site = next(home.glob("lib/python*/site-packages"))
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (site / "stand-in.pth").write_text("\n".join([*ours, str(UPSTREAM)]) + "\n")
    wheel = package.build_wheel(home / "wheels")
    command = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "-q", "--no-deps"]
    subprocess.run([*command, "--no-index", "--disable-pip-version-check", str(wheel)], check=True)
    return home


def rank(
    environment: Path, tmp_path: Path, argument: object = 4, plugins: str | None = None, program: str = RANK
) -> Any:
    """A worker as MPI makes it: no inherited variable but those named TRTLLM* and TLLM*."""
    env = {"TRTLLM_ENABLE_PDL": "1", EVIDENCE_ENV: str(tmp_path), "PATH": "/usr/bin:/bin"}
    env |= {} if plugins is None else {PLUGINS_ENV: plugins}
    run = subprocess.run(
        [str(environment / "bin" / "python"), "-c", program, str(argument)],
        env=env, cwd="/", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def evidence(tmp_path: Path) -> dict[str, Any]:
    (only,) = tmp_path.glob("*.json")
    return json.loads(only.read_text())


def test_every_op_runs_in_a_worker_that_inherits_nothing(environment: Path, tmp_path: Path) -> None:
    rank(environment, tmp_path, plugins=",".join(ALL))
    found = evidence(tmp_path)
    assert found["errors"] == [] and found["env"] == {"TRTLLM_ENABLE_PDL": "1"}
    assert {op for op, outcomes in found["ops"].items() if "ran" in outcomes} == set(ALL), found["ops"]
    layers = {
        "router": 2,
        "moe_top1": 4,
        "allreduce_rmsnorm": 6,
        "qkv_attn_scaling": 4,
        "fc13_swiglu": 4,
        "gemm_low_latency": 8,
    }
    assert layers.items() <= found["grafted"].items(), "every layer's modules, and none of the draft's"


@pytest.mark.parametrize("fusion", ["RESIDUAL_RMS_NORM_QUANT_FP8", "RESIDUAL_RMS_NORM_OUT_QUANT_FP8"])
def test_each_seat_computes_what_upstream_does(environment: Path, tmp_path: Path, fusion: str) -> None:
    """To a step of the output's format; without the attention scaling it would be 0.05, with gate and up swapped 1."""
    distances = rank(environment, tmp_path, fusion, ",".join(ALL), SEAT_BY_SEAT)
    outcomes = evidence(tmp_path)["ops"]
    assert all("ran" in outcomes[op] for op in ALL), outcomes
    limits = dict.fromkeys(distances, BF16_STEP) | dict.fromkeys(("gate_up", "moe", "allreduce"), FP8_STEP / 2)
    assert {name: distance for name, distance in distances.items() if distance > limits[name]} == {}


def test_outside_their_gates_upstream_runs_and_says_so(environment: Path, tmp_path: Path) -> None:
    many = rank(environment, tmp_path, argument=20, plugins=",".join(ALL))
    outcomes = evidence(tmp_path)["ops"]
    assert all("ran" not in outcomes[op] for op in ALL), outcomes
    assert outcomes["gemm_low_latency"] == {"more than 16 tokens": 20}
    assert many == rank(environment, tmp_path, argument=20)


def test_op_that_is_not_there_falls_back_and_says_so(environment: Path, tmp_path: Path) -> None:
    made = rank(environment, tmp_path, plugins="router,verify_tree")
    assert evidence(tmp_path)["ops"]["verify_tree"] == {"has no seat in this model": 0}
    assert made == rank(environment, tmp_path)


def test_only_the_named_ops_are_grafted(environment: Path, tmp_path: Path) -> None:
    rank(environment, tmp_path, plugins="router")
    assert set(evidence(tmp_path)["grafted"]) == {"router"}


def test_other_python_processes_are_left_alone(environment: Path, tmp_path: Path) -> None:
    rank(environment, tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_unpacked_package_registers_itself_and_leaves_the_images_own_sitecustomize(tmp_path: Path) -> None:
    site, image, seen = tmp_path / "site", tmp_path / "image", tmp_path / "evidence"
    for folder in (image, seen):
        folder.mkdir()
    package.unpack(package.build_wheel(tmp_path), site)
    (image / "sitecustomize.py").write_text("print('the image speaks')")
    env = {**os.environ, "PYTHONPATH": f"{site}:{image}:{UPSTREAM}", PLUGINS_ENV: "router", EVIDENCE_ENV: str(seen)}
    run = subprocess.run([sys.executable, "-c", RANK, "4"], env=env, cwd="/", capture_output=True, text=True)
    assert run.stdout.startswith("the image speaks"), run.stderr
    assert evidence(seen)["ops"]["router"] == {"ran": 4}


def test_wheel_is_the_same_for_the_same_files(tmp_path: Path) -> None:
    first, second = package.build_wheel(tmp_path / "a"), package.build_wheel(tmp_path / "b")
    assert first.name == second.name and first.read_bytes() == second.read_bytes()


def test_wheel_holds_no_heavy_import() -> None:
    """The front and the hook run where there is neither kilotok's environment nor, at start, any need for torch."""
    code = (
        "import sys, engine_plugins.trtllm.front, engine_plugins.trtllm.adapter, engine_plugins.trtllm.hook;"
        "print(*sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'pydantic', 'yaml', 'fastapi'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
