"""Session fixtures: random checkpoints and the bundles built from them, each made once. Run: `pytest
tests/engine_plugins`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine_plugins.native.bundle import build_bundle
from engine_plugins.native.engine import Engine
from tests.engine_plugins.models import save_draft, save_llama3, save_llama4, tokens


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny (BF16), scout (qk_norm, tied, MoE everywhere), llama3, draft."""
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    root = tmp_path_factory.mktemp("models")
    save_llama4(root / "tiny")
    save_llama4(
        root / "scout", use_qk_norm=True, tie_word_embeddings=True, interleave_moe_layer_step=1, num_hidden_layers=4
    )
    save_llama3(root / "llama3")
    save_draft(root / "draft")
    return root


@pytest.fixture(scope="session")
def bundles(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny (draft, k=3), scout and llama3 (no draft)."""
    root = tmp_path_factory.mktemp("bundles")
    build_bundle(
        models / "tiny", root / "tiny", draft=models / "draft", draft_tokens=3, max_seq_len=256, max_batch_size=4
    )
    for name in ("scout", "llama3"):
        build_bundle(models / name, root / name, max_seq_len=256, max_batch_size=2)
    return root


@pytest.fixture(scope="session")
def fp8_checkpoint(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny, quantized and exported by modelopt; `fake.pt` beside it holds the fake-quantized model's own layer
    calls."""
    from tests.engine_plugins.quantized import export_fp8

    root = tmp_path_factory.mktemp("fp8")
    return export_fp8(save_llama4(root / "source", fp32_linears=True), root)


@pytest.fixture(scope="session")
def fp8_bundle(fp8_checkpoint: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FP8 checkpoint with the draft."""
    out = tmp_path_factory.mktemp("fp8bundle")
    build_bundle(fp8_checkpoint, out, draft=models / "draft", draft_tokens=3, max_seq_len=256, max_batch_size=4)
    return out


@pytest.fixture
def open_engine() -> Iterator[Callable[..., Engine]]:
    """Opens engines and closes them after the test."""
    engines: list[Engine] = []

    def opener(path: Path, **options: object) -> Engine:
        engines.append(Engine(path, **options))  # type: ignore[arg-type]
        return engines[-1]

    yield opener
    for engine in engines:
        engine.close()


@pytest.fixture
def prompts() -> list[list[int]]:
    """Lengths around the chunk (32), the prefill pieces (128) and one token."""
    return [tokens(n, seed=n) for n in (1, 2, 7, 31, 32, 33, 64, 127, 129, 150)]
