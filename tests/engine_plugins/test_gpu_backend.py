"""The GPU's program beside the compiled step: on the CPU references of its ops always, on a GPU where there is one.

Run: `pytest tests/engine_plugins/test_gpu_backend.py`; on a GPU alone, since other files make Triton interpret.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine_plugins.native.backend import serving_device
from engine_plugins.native.bundle import build_bundle
from engine_plugins.native.engine import Engine, SamplingParams
from engine_plugins.native.gpu_sampling import SPARE, GuessBoard, target_probabilities
from engine_plugins.ops import library
from engine_plugins.ops.compile import compile_cuda
from engine_plugins.ops.verify.reference import probabilities
from specs.errors import InputError
from tests.engine_plugins.models import save_fp8, tokens

Opener = Callable[..., Engine]
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
OPS = {"gemm_low_latency", "allreduce_rmsnorm", "attention_decode"}


@pytest.fixture(scope="module", params=["cuda-reference", "cuda"])
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The device, with the compiled kernels where nvcc is."""
    if request.param == "cuda":
        if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
            pytest.skip("no GPU, or Triton interprets in this process")
        plugins = tmp_path_factory.mktemp("plugins")
        if shutil.which("nvcc") and compile_cuda(plugins, library.architecture_of()):
            library.use_kernels(plugins)
    return str(request.param)


@pytest.fixture(scope="module")
def bundle_of(bundles: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny, scout and llama3 in BF16; fp8: tiny quantized by a plain rule, with the draft."""
    root = tmp_path_factory.mktemp("quantized")
    save_fp8(models / "tiny", root / "checkpoint")
    sizes = {"draft_tokens": 3, "max_seq_len": 256, "max_batch_size": 3}
    build_bundle(root / "checkpoint", root / "fp8", draft=models / "draft", **sizes)
    return lambda name: root / "fp8" if name == "fp8" else bundles / name


def far(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Median distance in units of the values' own spread: a router's near tie moves one row far, not the others."""
    return float(np.median(np.abs(ours - theirs)) / theirs.std())


def shortfall(engine: Engine, prompt: list[int], answer: list[int]) -> np.ndarray:
    """How far below the compiled engine's best logit each answered token is."""
    logits = engine.logits(prompt + answer)[len(prompt) - 1 : -1]
    return logits.max(axis=1) - logits[np.arange(len(answer)), answer]


@pytest.mark.parametrize("name", ["tiny", "scout", "llama3", "fp8"])
def test_logits_agree_with_the_compiled_step(
    bundle_of: Callable[[str], Path], device: str, name: str, open_engine: Opener
) -> None:
    """BF16 between operators, and E4M3 of slightly other values, against fp32; over chunk borders and temperatures."""
    ours, theirs = open_engine(bundle_of(name), device=device), open_engine(bundle_of(name))
    ids = tokens(100)
    limit = 0.12 if name == "fp8" else 0.03
    assert far(ours.logits(ids), theirs.logits(ids)) < limit
    if name in ("tiny", "fp8"):
        assert far(ours.hidden(ids), theirs.hidden(ids)) < limit
        assert far(ours.draft_logits(ids), theirs.draft_logits(ids)) < limit


@pytest.mark.parametrize("name", ["tiny", "llama3", "fp8"])
def test_greedy_answers_are_the_compiled_engine_s(
    bundle_of: Callable[[str], Path], device: str, name: str, open_engine: Opener
) -> None:
    """Of several slots at once; where a token differs, the compiled engine's logits were near each other. A random
    router is near a tie often, and then moves a row far: a few rows are let off."""
    ours, theirs = open_engine(bundle_of(name), device=device), open_engine(bundle_of(name))
    prompts = [tokens(n, seed=n) for n in (1, 9, 33)]
    answers = [c.token_ids for c in ours.generate(prompts, GREEDY)]
    slack = np.concatenate([shortfall(theirs, p, a) for p, a in zip(prompts, answers, strict=True)])
    spread = theirs.logits(prompts[2]).std()
    same, close = (slack == 0).mean(), (slack < 0.1 * spread).mean()
    assert (same > 0.9 and close > 0.97) if name != "fp8" else (same > 0.7 and close > 0.85)


def test_a_slot_drafts_as_the_compiled_engine_does(
    bundle_of: Callable[[str], Path], device: str, open_engine: Opener
) -> None:
    """Right drafts are what catch-up rows and chain steps are for: one wrong position, and acceptance falls."""
    prompts = [tokens(n, seed=n) for n in (9, 20)]
    accepted = []
    for options in ({"device": device}, {}):
        engine = open_engine(bundle_of("tiny"), **options)
        done = engine.generate(prompts, SamplingParams(max_tokens=60, ignore_eos=True))
        accepted.append(sum(sum(c.accepted_by_position) for c in done))
    assert abs(accepted[0] - accepted[1]) <= 0.1 * accepted[1] + 2


def test_generation_up_to_the_last_position(bundle_of: Callable[[str], Path], device: str, open_engine: Opener) -> None:
    """Drafts get fewer, none runs past max_seq_len."""
    engine, prompt = open_engine(bundle_of("fp8"), device=device), tokens(240)
    done = engine.generate([prompt], SamplingParams(max_tokens=1000, ignore_eos=True))[0]
    assert (len(done.token_ids), done.finish_reason) == (16, "length")
    alone = open_engine(bundle_of("fp8"), device=device, speculate=False)
    slow = alone.generate([prompt], SamplingParams(max_tokens=1000, ignore_eos=True))[0]
    assert sum(a == b for a, b in zip(done.token_ids, slow.token_ids, strict=True)) > 12


def test_what_lies_behind_a_slot_s_tokens_never_matters(
    bundle_of: Callable[[str], Path], device: str, open_engine: Opener
) -> None:
    """NaN in every cache row that was not written: behind the position, in the scratch rows, in other slots."""
    answers = []
    for poisoned in (False, True):
        engine = open_engine(bundle_of("fp8"), device=device)
        if poisoned:
            for cache in (*engine.backend._target_kv, *engine.backend._draft_kv):
                cache.view(torch.uint8).fill_(0x7F) if cache.element_size() == 1 else cache.fill_(float("nan"))
        answers.append([c.token_ids for c in engine.generate([tokens(13), tokens(250)], GREEDY)])
    assert answers[0] == answers[1]


def test_a_shared_beginning_is_copied(bundle_of: Callable[[str], Path], device: str, open_engine: Opener) -> None:
    engine, shared = open_engine(bundle_of("fp8"), device=device), tokens(40)
    owner = engine.submit(shared + tokens(5, seed=1), GREEDY)
    engine.step()
    other = engine.submit(shared + tokens(5, seed=2), GREEDY)
    while engine.has_work:
        engine.step()
    assert (owner.reused, other.reused) == (0, 39)
    fresh = open_engine(bundle_of("fp8"), device=device)
    alone = fresh.generate([shared + tokens(5, seed=2)], GREEDY)[0].token_ids
    assert sum(a == b for a, b in zip(alone, other.output_ids, strict=True)) > 20  # chunks of prefill begin elsewhere


@pytest.mark.parametrize("length", [1.0, 2.5, 4.0])
def test_forced_acceptance(bundle_of: Callable[[str], Path], device: str, length: float, open_engine: Opener) -> None:
    engine = open_engine(bundle_of("fp8"), device=device, forced_acceptance=length)
    done = engine.generate([tokens(5)], SamplingParams(max_tokens=61, ignore_eos=True))[0]
    assert 1 + sum(done.accepted_by_position) / done.cycles == pytest.approx(length, abs=0.12)


def test_a_seed_repeats_its_request_in_any_company(
    bundle_of: Callable[[str], Path], device: str, open_engine: Opener
) -> None:
    engine = open_engine(bundle_of("fp8"), device=device)
    params = SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, seed=11, ignore_eos=True)
    alone = engine.generate([tokens(9)], params)[0].token_ids
    assert engine.generate([tokens(9), tokens(12, seed=4)], params)[0].token_ids == alone
    other = SamplingParams(max_tokens=12, temperature=0.8, seed=12, ignore_eos=True)
    assert engine.generate([tokens(9)], other)[0].token_ids != alone


def _follows(observed: Counter, p: np.ndarray) -> bool:
    total = sum(observed.values())
    big = p * total >= 5
    cells = [(observed[int(t)], p[t] * total) for t in np.flatnonzero(big)]
    rest = float(p[~big].sum() * total)
    if rest > 1:
        cells.append((total - sum(o for o, _ in cells), rest))
    freedom = len(cells) - 1
    return sum((o - e) ** 2 / e for o, e in cells) < freedom + 4 * (2 * freedom) ** 0.5 + 8


@pytest.mark.parametrize("there", [0, 1, 2])
def test_the_first_token_follows_the_target_however_many_drafts_there_are(device: str, there: int) -> None:
    """Drafts drawn from q; behind the last one the board holds stale probabilities, which must not be used."""
    where = torch.device("cuda" if device == "cuda" else "cpu")
    rng, vocab = np.random.default_rng(there), 8
    board = GuessBoard(2, vocab, torch.arange(vocab, device=where), where)
    p = rng.dirichlet(np.ones(vocab), 3).astype(np.float32)
    p_RW = torch.nn.functional.pad(torch.from_numpy(p), (0, SPARE)).to(where)
    temperature = torch.ones(1, device=where)
    logits = torch.from_numpy(np.log(rng.dirichlet(np.ones(vocab), 2)).astype(np.float32)).to(where)
    seen: list[Counter] = [Counter(), Counter()]
    for _ in range(1500):
        numbers = torch.from_numpy(rng.random(5, dtype=np.float32)).to(where)
        drafts = [board.draw(logits[i : i + 1], temperature, i, numbers[3 + i :][:1]) for i in range(2)]
        drawn, count = board.verify(p_RW, torch.cat(drafts), torch.tensor([there], device=where), numbers[:3])
        assert 1 <= int(count) <= there + 1
        for i, token in enumerate(drawn[: int(count)].tolist()):
            if i < 2:
                seen[i][token] += 1
    assert _follows(seen[0], p[0])
    assert there == 0 or _follows(seen[1], p[1])


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_probabilities_are_numpy_s(device: str, top_p: float) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).bfloat16() * 3
    settings = torch.tensor([0.6, top_p])
    where = "cuda" if device == "cuda" else "cpu"
    ours = target_probabilities(logits.to(where), settings.to(where), top_p < 1).cpu().numpy()
    expected = np.stack([probabilities(row, 0.6, top_p) for row in logits.float().numpy()])
    assert np.abs(ours[:, :50] - expected).max() < 1e-5
    assert ((ours[:, :50] > 0) == (expected > 0)).all()
    assert not ours[:, 50:].any()


def test_numbers_that_are_none_end_their_request_alone(
    bundle_of: Callable[[str], Path], device: str, open_engine: Opener
) -> None:
    engine = open_engine(bundle_of("fp8"), device=device)
    good = [t for t in tokens(12) if t != 7]
    before = engine.generate([good], GREEDY)[0].token_ids
    engine.backend.target.embed[7] = float("nan")
    ill, well = engine.generate([[5, 7, 9], good], SamplingParams(max_tokens=5, ignore_eos=True))
    assert (ill.finish_reason, ill.token_ids) == ("error", [])
    assert well.token_ids == before[:5]
    assert engine.generate([[5, 7, 9]], SamplingParams(max_tokens=4, temperature=0.5))[0].finish_reason == "error"
    assert engine.generate([good], GREEDY)[0].token_ids == before


def test_what_ran_is_said(bundle_of: Callable[[str], Path], device: str, open_engine: Opener) -> None:
    engine = open_engine(bundle_of("fp8"), device=device)
    engine.generate([tokens(12)], GREEDY)
    counters = engine.counters()
    assert counters["backend"] == device
    assert {"qkv_attn_scaling_cache", "fc13_swiglu", "moe_top1", "router", "verify_greedy"} | OPS <= set(
        counters["served"]
    )
    allowed = {"cuda", "triton"} if device == "cuda" else {"reference"}
    assert {by for op in counters["served"].values() for by in op} <= allowed
    assert counters["cycles"] > 5 and counters["seconds"] > 0 and counters["decode_rows"] > 24


def test_a_server_takes_the_gpu_that_its_bundle_has_kernels_for(
    bundle_of: Callable[[str], Path], tmp_path: Path
) -> None:
    assert serving_device(bundle_of("tiny")) == "cpu"
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "gpu.json").write_text("{}")
    assert serving_device(tmp_path) == ("cuda" if torch.cuda.is_available() else "cpu")


def test_wrong_input_is_one_line(models: Path, bundle_of: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device 'tpu'.*one of cpu, cuda"):
        Engine(bundle_of("tiny"), device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            Engine(bundle_of("tiny"), device="cuda")
    build_bundle(models / "tiny", tmp_path, draft=models / "draft", draft_tokens=8, max_seq_len=64, max_batch_size=1)
    with pytest.raises(InputError, match=r"draft_tokens=8 .*on a GPU 0\.\.7"):
        Engine(tmp_path, device="cuda-reference")
