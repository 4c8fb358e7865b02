"""The train_draft stage on a random target: the unroller against modelopt, resuming, batches, replay, the stage."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from specs.errors import GateFailed, InputError, IntegrityError
from tasks import quantize
from tasks.acceptance import acceptance_frame, acceptance_metrics
from tasks.job import Job, Progress
from tasks.train_draft import acceptance, build, data, detectors, features, trainer
from tasks.train_draft.unroll import Batch, RmsNorm, SoftCrossEntropy, Unroller
from tests.tasks.draft_jobs import TRAINING, make_job, make_model, make_trainer, write_answers
from tests.tasks.random_checkpoints import DOMAINS, write_checkpoint, write_prompts


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("target") / "source")


@pytest.fixture
def answers(tmp_path: Path, source: Path) -> Path:
    return write_answers(tmp_path / "answers", source)


# ---- the unroller


def test_unroller_equals_modelopts_training_forward(source: Path, answers: Path) -> None:
    """Same logits at every step, on fresh weights: with norm weights at one, modelopt's double norm is single."""
    model, capture = make_model(source)
    sequence = data.read_answers(answers / "answers.jsonl", 64)[0]
    ids = torch.tensor([sequence.token_ids])
    aux, last = capture.run(ids)
    start, rows = sequence.prompt_tokens, sequence.chains
    seen: list[torch.Tensor] = []
    original = model._eagle_loss

    def spy(probs: object, tokens: object, logits: torch.Tensor, mask: object) -> object:
        seen.append(logits.detach())
        return original(probs, tokens, logits, mask)

    model._eagle_loss = spy
    model.train()
    mask = torch.tensor([sequence.loss_mask])
    model(input_ids=ids, attention_mask=torch.ones_like(ids), loss_mask=mask,
          base_model_outputs={"base_model_hidden_states": last, "aux_hidden_states": aux})  # fmt: skip
    stored = {"features": aux[:, :-2], "teacher": last[:, start : start + rows]}
    ours = Unroller(model.eagle_module, 3).logits(trainer.assemble([sequence], stored, model.model.embed_tokens.weight))
    for step in range(3):
        theirs = seen[step][0, start - 1 : start - 1 + rows - step]  # modelopt already cut the first `step` positions
        torch.testing.assert_close(ours[step][0], theirs, rtol=1e-3, atol=2e-4)


def test_a_sequence_is_the_same_alone_and_padded(source: Path, answers: Path) -> None:
    model, capture = make_model(source)
    store = features.FeatureStore(capture, answers / "features", 1.0)
    sequences = data.read_answers(answers / "answers.jsonl", 64)[:5]
    unroller, embedding = Unroller(model.eagle_module, 3), model.model.embed_tokens.weight
    together = unroller.logits(trainer.assemble(sequences, store.compute(sequences), embedding))
    for i, sequence in enumerate(sequences):
        alone = unroller.logits(trainer.assemble([sequence], store.compute([sequence]), embedding))
        for step in range(3):
            rows = sequence.chains - step
            torch.testing.assert_close(together[step][i, :rows], alone[step][0], rtol=1e-3, atol=1e-3)


def test_hand_written_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: RmsNorm.apply(a, b, 1e-5), (x, weight))
    target = torch.rand(3, 5, 8, dtype=torch.float64).softmax(-1)
    used = torch.rand(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: SoftCrossEntropy.apply(a, target, used), (x,))


def test_batch_validity_ends_with_each_answer() -> None:
    empty = torch.zeros(2, 4, 1)
    batch = Batch(empty, empty, empty, torch.zeros(2, 4), torch.tensor([1, 1]), torch.tensor([4, 2]))
    assert batch.valid(1).tolist() == [[True, True, True], [True, False, False]]


# ---- the loop


def test_a_killed_run_resumes_at_its_step_and_ends_the_same(source: Path, answers: Path, tmp_path: Path) -> None:
    whole = make_trainer(source, answers, tmp_path / "whole", epochs=2)
    whole.run(Progress())

    def kill(state: trainer.State) -> None:
        if state.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(source, answers, tmp_path / "cut", epochs=2).run(Progress(), kill)
    again = make_trainer(source, answers, tmp_path / "cut", epochs=2)
    seen: list[int] = []
    again.run(Progress(), lambda state: seen.append(state.step))
    assert seen[0] == 6
    assert [row["step"] for row in again.state.curve] == list(range(1, again.total + 1))
    for name, parameter in whole.parameters.items():
        torch.testing.assert_close(parameter, again.parameters[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_clock_stops_training_at_a_step(source: Path, answers: Path, tmp_path: Path) -> None:
    run = make_trainer(source, answers, tmp_path, epochs=1000, max_seconds=0.3)
    state = run.run(Progress())
    assert 0 < state.step < run.total


def test_the_target_runs_once_per_batch(source: Path, answers: Path, tmp_path: Path) -> None:
    run = make_trainer(source, answers, tmp_path, epochs=3)
    run.run(Progress())
    assert run.store.computed == len(run.batches)


def test_features_beyond_the_disk_budget_are_recomputed(source: Path, answers: Path, tmp_path: Path) -> None:
    run = make_trainer(source, answers, tmp_path, epochs=2)
    run.store.budget = 0
    run.run(Progress())
    assert run.store.computed == 2 * len(run.batches)
    assert not list((tmp_path / "features-0").glob("*.safetensors"))


def test_sparse_moe_equals_transformers(source: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.randint(6, 90, (2, 20))
    with torch.no_grad():
        theirs = plain.model(input_ids=ids, use_cache=False).last_hidden_state
        _, ours = features.Capture(plain, [0, 1, 2]).run(ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# ---- data


def test_order_is_a_function_of_seed_and_step() -> None:
    epoch = [data.batch_at(step, 7, seed=1) for step in range(7)]
    assert sorted(epoch) == list(range(7))
    assert epoch == [data.batch_at(step, 7, seed=1) for step in range(7)]
    assert epoch != [data.batch_at(step, 7, seed=1) for step in range(7, 14)]


def test_every_domain_is_held_back(answers: Path) -> None:
    sequences = data.read_answers(answers / "answers.jsonl", 64)
    train, held_back = data.split(sequences)
    assert {s.domain for s in held_back} == set(DOMAINS)
    assert not {s.id for s in train} & {s.id for s in held_back}


def test_a_broken_answer_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(InputError, match="answers.jsonl:1"):
        data.read_answers(tmp_path / "answers.jsonl", 64)


# ---- acceptance


def test_replay_leaves_out_the_chain_that_the_answers_end_cuts() -> None:
    """Five tokens after the first: all three drafts and the target's own, then one token that tells nothing."""
    right = [[True] * 5, [True] * 4, [True] * 3]
    assert acceptance.replay(right, 3) == {"cycles": 1, "accepted_by_position": [1, 1, 1]}


def test_replay_stops_at_the_first_wrong_draft() -> None:
    right = [[True, False, False, False, False, False], [False] * 5, [True] * 4]
    counts = acceptance.replay(right, 3)
    assert counts == {"cycles": 3, "accepted_by_position": [1, 0, 0]}  # at rows 0, 2, 3
    metrics = acceptance_metrics(acceptance_frame([("math", counts)], 3))
    assert metrics["acceptance.length"] == metrics["acceptance.length.math"] == 4 / 3
    assert metrics["acceptance.position.1.math"] == 1 / 3
    assert metrics["acceptance.position.2"] == 0


@pytest.mark.parametrize(("right", "length"), [(True, 4.0), (False, 1.0)])
def test_a_perfect_head_reaches_the_limit_and_a_useless_one_does_not(right: bool, length: float) -> None:
    counts = acceptance.replay([[right] * (40 - s) for s in range(3)], 3)
    assert acceptance_metrics(acceptance_frame([("code", counts)], 3))["acceptance.length"] == length


# ---- the stage


@pytest.mark.parametrize("vocab_size", [None, 250])
def test_stage_exports_what_the_engine_computes(
    source: Path, answers: Path, tmp_path: Path, vocab_size: int | None
) -> None:
    metrics = build(make_job(source, answers, tmp_path / "out", vocab_size=vocab_size), Progress())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["draft_vocab_size"] == (vocab_size or 256)
    assert ("d2t" in tensors) == (vocab_size is not None)
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    assert metrics["train_draft.engine_difference"] < 0.002
    assert 1.0 <= metrics["acceptance.length"] <= 4.0
    assert metrics["train_draft.target_agreement"] == 1.0
    table = pd.read_parquet(tmp_path / "out" / "acceptance.parquet")
    assert set(table["domain"]) == {"all", *DOMAINS}
    assert list(pd.read_parquet(tmp_path / "out" / "curve.parquet").columns) == [
        "step",
        "loss",
        "acc_1",
        "acc_2",
        "acc_3",
    ]


def test_answers_through_another_template_are_refused(source: Path, tmp_path: Path) -> None:
    answers = write_answers(tmp_path / "answers", source, template="0" * 64)
    with pytest.raises(IntegrityError, match="template"):
        build(make_job(source, answers, tmp_path / "out"), Progress())
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_answers_of_another_checkpoint_are_refused(source: Path, answers: Path, tmp_path: Path) -> None:
    """The wrong backbone: the same shapes, template and tokens, other weights."""
    other = write_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(IntegrityError, match="would have said"):
        build(make_job(other, answers, tmp_path / "out"), Progress())
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_vocabulary_that_cannot_say_the_answers_is_refused(source: Path, answers: Path, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="draft vocabulary of 2"):
        build(make_job(source, answers, tmp_path / "out", vocab_size=2), Progress())


# ---- the golden curve


def test_a_head_below_the_golden_curve_is_stopped_and_not_trained_again(
    source: Path, answers: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(GateFailed, match="position 1 of all"):
        build(make_job(source, answers, out, golden={"all": [1.0]}), Progress())
    trained: list[str] = []
    again = Progress(lambda done, total, note: trained.append(note) if "step" in note else None)
    metrics = build(make_job(source, answers, out, golden={"all": [0.0], "unknown": [1.0]}), again)
    assert metrics["train_draft.golden_gap"] < 0.05 and not trained


# ---- the target


def write_quantized(source: Path, out: Path) -> Path:
    """The source through the quantize stage."""
    out.mkdir()
    write_prompts(out.parent / "prompts.jsonl")
    calibration = {"dataset": "file:prompts.jsonl", "samples": 32, "sequence_length": 64}
    spec = {"recipe": "general/ptq/fp8_default-kv_fp8", "calibration": calibration}
    quantize.build(Job("quantize", {"name": "t", "quantize": spec}, out.parent, {"download": source}, out), Progress())
    return out


def test_hidden_states_of_the_quantized_target(source: Path, answers: Path, tmp_path: Path) -> None:
    """FP8 moves the hidden states, within the detector's tolerance; the engine computes from them what we do."""
    quantized = write_quantized(source, tmp_path / "fp8")
    ids = torch.tensor([data.read_answers(answers / "answers.jsonl", 64)[0].token_ids])
    served, last = features.ServedCapture(quantized, [0, 1, 2]).run(ids)
    plain, plain_last = make_model(source)[1].run(ids)
    assert served.shape == plain.shape and last.shape == plain_last.shape
    assert 1e-3 < float((served - plain).norm() / plain.norm()) < detectors.SERVED_TOLERANCE
    said = write_answers(tmp_path / "said", quantized)
    job = make_job(source, said, tmp_path / "out", {"quantize": quantized}, target="quantized")
    metrics = build(job, Progress())
    assert metrics["train_draft.engine_difference"] < 0.002


# ---- an earlier head


@pytest.fixture
def earlier(source: Path, answers: Path, tmp_path: Path) -> Path:
    build(make_job(source, answers, tmp_path / "earlier", vocab_size=250), Progress())
    return tmp_path / "earlier"


def test_a_warm_start_goes_on_where_the_earlier_head_ended(
    source: Path, answers: Path, tmp_path: Path, earlier: Path
) -> None:
    """Trained on at a rate too small to matter, it is the same head."""
    training = {**TRAINING, "learning_rate": 1e-12, "seed": 4}
    job = make_job(source, answers, tmp_path / "out", {"start": earlier}, vocab_size=250, training=training)
    metrics = build(job, Progress())
    before, after = (load_file(folder / "model.safetensors") for folder in (earlier, tmp_path / "out"))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, msg=name)
    table = pd.read_parquet(earlier / "acceptance.parquet")
    assert metrics["acceptance.length"] == pytest.approx(float(table[table["domain"] == "all"]["length"].iloc[0]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"capture_layers": [0, 1, 3]}, "sees layers"),
        ({"ffn_multiplier": 1.5}, "another shape"),
        ({"vocab_size": 240}, "another shape"),
    ],
)
def test_an_earlier_head_of_another_shape_is_refused(
    source: Path, answers: Path, tmp_path: Path, earlier: Path, changed: dict, message: str
) -> None:
    job = make_job(source, answers, tmp_path / "out", {"start": earlier}, **{"vocab_size": 250, **changed})
    with pytest.raises(InputError, match=message):
        build(job, Progress())
    assert not list((tmp_path / "out").glob("*.safetensors"))
