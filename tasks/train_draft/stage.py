"""The train_draft stage in order: refuse, capture, convert, train, measure, export, compare with the engine.

It refuses bad data before the first step and a bad head before the artifact counts.
Run it: `python -m tasks.child JOB.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pandera.pandas as pa
import torch

from specs.errors import GateFailed, InputError
from tasks.acceptance import acceptance_frame, acceptance_metrics, golden_gap
from tasks.job import Job, Progress
from tasks.prompts import template_sha256
from tasks.tables import write
from tasks.train_draft import acceptance, data, detectors, features, head, launch, place, trainer, vocabulary
from tasks.train_draft.unroll import Unroller

NUM_DRAFTS = 3  # the chain length that acceptance is reported for
COMPARED = 4  # held-back answers on which trainer and engine must agree
JUDGED = 32  # held-back answers that the target must have given itself


def build(job: Job, progress: Progress) -> dict[str, float]:
    """EAGLE-3 head in `job.out`; returns `train_draft.*` metrics and the estimated acceptance."""
    draft = job.spec["draft"]
    summary = json.loads((job.inputs["synthesize"] / "summary.json").read_text())
    detectors.check_template(summary["chat_template_sha256"], template_sha256(job.inputs["download"]))
    train, held_back = read(job)
    if launch.processes(draft) > 1:
        launch.train(job, progress)  # what follows finds its last checkpoint, and nothing left to train

    progress(0, 1, "load")
    run, metrics = ready(job, train, held_back, place.alone())
    model, store, state = run.model, run.store, run.run(progress)
    progress.note("measure")
    head.round_to_bf16(model)
    frame = evaluate(model, store, held_back)
    write(frame, job.out / "acceptance.parquet")
    metrics |= acceptance_metrics(frame)
    head.export(model, job.out)
    metrics["train_draft.engine_difference"] = compare_with_engine(model, store, held_back, target_of(job), job.out)
    metrics |= check_golden(frame, job.spec["validate"]["acceptance"])
    write_curve(state.curve, job.out / "curve.parquet")
    metrics.update(
        {
            "train_draft.steps": float(state.step),
            "train_draft.seconds": state.seconds,
            "train_draft.loss": state.curve[-1]["loss"] if state.curve else 0.0,
            "train_draft.tokens_per_s": trained_tokens(run, state.step) / max(state.seconds, 1e-9),
            "train_draft.parameters": float(sum(p.numel() for p in model.eagle_module.parameters())),
        }
    )
    (job.out / "summary.json").write_text(
        json.dumps(
            {
                "method": "eagle3",
                "target": draft["target"],
                "capture_layers": store.capture.layers,
                "chat_template_sha256": summary["chat_template_sha256"],
                "sequences": len(train),
                "held_back": len(held_back),
                "metrics": metrics,
            },
            indent=2,
        )
        + "\n"
    )
    return metrics


def read(job: Job) -> tuple[list[data.Sequence], list[data.Sequence]]:
    """(training, held back) sequences, checked."""
    length = int(job.spec["draft"]["training"]["sequence_length"])
    sequences = data.read_answers(job.inputs["synthesize"] / "answers.jsonl", length)
    check_data(sequences)
    return data.split(sequences)


def ready(
    job: Job, train: list[data.Sequence], held_back: list[data.Sequence], where: place.Place
) -> tuple[trainer.Trainer, dict[str, float]]:
    """One process's trainer, and what the checks found of the model, the hidden states and the head that it loads."""
    training = job.spec["draft"]["training"]
    torch.manual_seed(int(training["seed"]))
    model, capture = load(job, train, where)
    states = job.scratch / "features"
    if where.world > 1:
        states /= f"{where.rank}-of-{where.world}"
    store = features.FeatureStore(capture, states, float(training["hidden_states_gib"]) / where.world, where.device)
    run = trainer.Trainer(model, store, train, training, job.scratch, where)
    metrics = {}
    if where.writes:
        metrics["train_draft.target_agreement"] = check_target(capture, run.lm_head, held_back)
        if hasattr(model.eagle_module, "d2t"):
            metrics["train_draft.vocabulary_share"] = check_vocabulary(model.eagle_module.d2t.cpu(), held_back)
    return run, metrics


def target_of(job: Job) -> Path:
    """The checkpoint whose hidden states the head learns from."""
    return job.inputs["quantize" if job.spec["draft"]["target"] == "quantized" else "download"]


def load(
    job: Job, train: list[data.Sequence], where: place.Place
) -> tuple[Any, features.Capture | features.ServedCapture]:
    """(modelopt's model with the head in it, what records the target's hidden states), both checked."""
    from transformers import AutoConfig, AutoModelForCausalLM

    draft, source = job.spec["draft"], job.inputs["download"]
    require_llama(AutoConfig.from_pretrained(source).get_text_config())
    target = AutoModelForCausalLM.from_pretrained(source, dtype=where.dtype).eval()
    place.settle(target, where, job.scratch / f"offload-{where.rank}")
    layers = list(draft["capture_layers"] or features.default_capture_layers(target.config.num_hidden_layers))
    served = features.ServedCapture(target_of(job), layers) if draft["target"] == "quantized" else None
    capture = features.Capture(target, layers)
    check_capture(target, capture, served, train[0])
    earlier = head.Earlier(job.inputs["start"], layers) if "start" in job.inputs else None
    d2t = draft_vocabulary(draft, train, target.config.vocab_size)
    if earlier and d2t is not None and earlier.d2t is not None and len(earlier.d2t) == len(d2t):
        d2t = earlier.d2t  # its head's rows mean these tokens
    width = head.intermediate_size(draft, target.config)
    decoder = target.model.layers  # modelopt drops them from the model it converts; features still need them
    model = head.convert(target, layers, width, int(draft["training"]["ttt_steps"]), d2t)
    target.model.layers = decoder
    if earlier:
        earlier.copy_to(model)
    model.eagle_module.float()  # on a GPU modelopt makes it BF16, as the target is
    model.train()
    return model, served or capture


def require_llama(config: Any) -> None:
    """The head's layout is only known for text decoders of the Llama family."""
    if config.model_type not in ("llama4_text", "llama"):
        raise InputError(
            f"no EAGLE-3 head for model type {config.model_type!r}", "config.json", "known: llama4_text, llama"
        )


def check_data(sequences: list[data.Sequence]) -> None:
    """Masks and prompt ends, on every sequence: it is cheap and the fault is fatal."""
    for sequence in sequences:
        answer = sequence.token_ids[sequence.prompt_tokens :]
        detectors.check_loss_mask(sequence.token_ids, sequence.loss_mask, answer, sequence.id)
    detectors.check_prompt_end({s.token_ids[s.prompt_tokens - 1] for s in sequences}, "answers.jsonl")


@torch.no_grad()
def check_capture(
    target: Any, capture: features.Capture, served: features.ServedCapture | None, sequence: data.Sequence
) -> None:
    """Run one answer and compare what is recorded with transformers' own hidden states."""
    ids = torch.tensor([sequence.token_ids])
    recorded, _ = capture.run(ids)
    detectors.check_capture_layers(capture.layers, capture.recorded, target.config.num_hidden_layers)
    states = target.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    states = [state[0].cpu() for state in states]
    for features_TC, tolerance in ((recorded[0], detectors.FEATURE_TOLERANCE), *_served(served, ids)):
        parts = list(features_TC.cpu().chunk(len(capture.layers), -1))
        if capture.layers[-1] == target.config.num_hidden_layers - 1:
            parts[-1] = target.model.norm(
                parts[-1].to(target.model.norm.weight)
            ).cpu()  # transformers shows the last layer's output only so
        detectors.check_features(torch.cat(parts, -1), states, capture.layers, tolerance)


def _served(served: features.ServedCapture | None, ids: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
    return [(served.run(ids)[0][0], detectors.SERVED_TOLERANCE)] if served else []


@torch.no_grad()
def check_target(
    capture: features.Capture | features.ServedCapture, lm_head: torch.Tensor, held_back: Sequence[data.Sequence]
) -> float:
    """Share of answer tokens that the target says too when it is told the answer so far."""
    said, answers = [], []
    for sequence in held_back[:JUDGED]:
        _, last = capture.run(torch.tensor([sequence.token_ids]))
        start = sequence.prompt_tokens
        said.append((last[0, start : start + sequence.chains].to(lm_head.device) @ lm_head.T).argmax(-1).cpu())
        answers.append(torch.tensor(sequence.token_ids[start + 1 :]))
    return detectors.check_backbone(torch.cat(said), torch.cat(answers))


def check_vocabulary(d2t: torch.Tensor, held_back: Sequence[data.Sequence]) -> float:
    """Share of answer tokens that the draft's own vocabulary can say."""
    share = vocabulary.covered_share((s.token_ids[s.prompt_tokens :] for s in held_back), d2t)
    detectors.check_coverage(share, len(d2t))
    return share


def draft_vocabulary(draft: dict[str, Any], train: list[data.Sequence], vocab_size: int) -> torch.Tensor | None:
    """d2t of a smaller draft vocabulary, or None for the target's own."""
    size = draft.get("vocab_size")
    if size is None or size == vocab_size:
        return None
    if size > vocab_size:
        raise InputError(f"{size} is more than the target's {vocab_size}", "draft.vocab_size", "leave it out")
    d2t = vocabulary.choose((s.token_ids[s.prompt_tokens :] for s in train), size, vocab_size)
    detectors.check_vocabulary(d2t, vocab_size)
    return d2t


@torch.no_grad()
def evaluate(model: Any, store: features.FeatureStore, held_back: list[data.Sequence]) -> pd.DataFrame:
    """Acceptance at three drafts on the held-back answers, by domain and position."""
    unroller, embedding = Unroller(model.eagle_module, NUM_DRAFTS), model.model.embed_tokens.weight.float()
    answers = []
    for sequence in held_back:
        batch = trainer.assemble([sequence], store.compute([sequence]), embedding)
        said = [to_target(model, logits[0].argmax(-1)) for logits in unroller.logits(batch)]
        right = [(tokens == batch.tokens_BR[0, step:]).tolist() for step, tokens in enumerate(said)]
        answers.append((sequence.domain, acceptance.replay(right, NUM_DRAFTS)))
    return acceptance_frame(answers, NUM_DRAFTS)


def check_golden(frame: pd.DataFrame, settings: dict[str, Any]) -> dict[str, float]:
    """How far the head is below the golden curve, of the domains it answered. Raises GateFailed beyond the tolerance.

    Nothing is built from such a head; its training is kept, so that another tolerance costs no training.
    """
    golden = {domain: curve[:NUM_DRAFTS] for domain, curve in settings["golden"].items() if domain in set(frame.domain)}
    if not golden:
        return {}
    gap, where = golden_gap(frame, golden)
    if not gap <= settings["tolerance"]:
        raise GateFailed(
            f"the head never got to {where} of the golden curve"
            if gap != gap
            else f"the head is {gap:.3f} below the golden curve at {where}, {settings['tolerance']:.3f} is tolerated",
            "validate.acceptance.golden",
            "train longer or on more answers; or correct the curve",
        )
    return {"train_draft.golden_gap": gap}


def to_target(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Draft vocabulary ids as target ids."""
    return tokens + model.eagle_module.d2t[tokens] if hasattr(model.eagle_module, "d2t") else tokens


@torch.no_grad()
def compare_with_engine(
    model: Any, store: features.FeatureStore, held_back: Sequence[data.Sequence], target: Path, out: Path
) -> float:
    """The exported head, read by the engine's reference, against the trainer's on forced chains; worst difference."""
    from engine_plugins.native.reference import ReferenceModel

    reference = ReferenceModel.from_checkpoint(target, out)
    unroller, embedding = Unroller(model.eagle_module, NUM_DRAFTS), model.model.embed_tokens.weight.float()
    worst = 0.0
    for sequence in held_back[:COMPARED]:
        batch = trainer.assemble([sequence], store.compute([sequence]), embedding)
        ours = [logits.cpu() for logits in unroller.logits(batch)]
        start, ids = sequence.prompt_tokens, list(sequence.token_ids)
        for row in {0, sequence.chains // 2}:
            steps = min(NUM_DRAFTS, sequence.chains - row)
            theirs = forced_chain(reference, ids, start + row, steps)
            for step, logits in enumerate(theirs):
                where = f"{sequence.id}: answer token {row}, draft step {step}"
                worst = max(worst, detectors.check_engine(ours[step][0, row], logits, where))
    return worst


def forced_chain(reference: Any, token_ids: list[int], known: int, steps: int) -> list[torch.Tensor]:
    """The engine's draft logits when features of `known` tokens are there and further tokens are the answer's own."""
    _, outputs = reference.forward(token_ids[:known])
    hidden = reference.draft.combine(outputs)
    logits = []
    for step in range(steps):
        row, out = reference.draft.forward(token_ids[1 : known + 1 + step], hidden)
        logits.append(row[-1])
        hidden = torch.cat((hidden, out[-1:]))
    return logits


def trained_tokens(run: trainer.Trainer, steps: int) -> float:
    """Tokens of the sequences that were stepped on, prompts included."""
    per_batch = [sum(len(run.sequences[i].token_ids) for i in batch) for batch in run.batches]
    return float(sum(per_batch[data.batch_at(s, len(per_batch), int(run.spec["seed"]))] for s in range(steps)))


def write_curve(curve: list[dict[str, float]], path: Path) -> None:
    """curve.parquet: step, loss, acc_1 .. acc_n."""
    frame = pd.DataFrame(curve)
    rate = pa.Column(float, pa.Check.in_range(0, 1))
    columns = {
        "step": pa.Column(float),
        "loss": pa.Column(float),
        **{c: rate for c in frame.columns if c.startswith("acc_")},
    }
    pa.DataFrameSchema(columns, strict=True).validate(frame).to_parquet(path, index=False)
