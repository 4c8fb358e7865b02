"""Draft training on a CPU: tokens/s beside modelopt's own forward, acceptance beside speculators' loop, both targets.

One machine, one target, one set of answers, one head. `prepare` writes features and an untrained head; `speculators`
runs under an interpreter that has speculators; the other parts under kilotok's.
Every head is judged on the target's answers to held-out prompts (HELD_OUT, made by `synthesize` as ANSWERS are).
Refuses to compare what started elsewhere: every loop begins with the head that `prepare` wrote.
Run it: `python infra/bench_reports/draft_cpu.py PART WORK [SOURCE QUANTIZED ANSWERS HELD_OUT] [--seconds N]`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

BATCH, STEPS, RATE = 8, 3, 2e-3  # the tiny spec's batch_size, ttt_steps and learning_rate
PARTS = ("prepare", "ours", "pair", "padding", "modelopt", "targets", "speculators", "judge")
SPEC = {"epochs": 1000, "learning_rate": RATE, "batch_size": BATCH, "ttt_steps": STEPS, "seed": 0}


def prepare(work: Path, source: Path, answers: Path, held_out: Path) -> None:
    """The sequences' features (BF16, as our shards), an untrained head in both layouts, and its logits as a witness."""
    from safetensors.torch import save_file

    from tasks.train_draft import features, head, speculators, trainer
    from tasks.train_draft.unroll import Unroller

    model, capture, train, held = load(source, answers, held_out)
    store = features.FeatureStore(capture, work / "features", 8.0)
    rows = []
    for sequence in train:
        aux, last = capture.run(torch.tensor([sequence.token_ids]))
        rows.append({"ids": torch.tensor(sequence.token_ids), "mask": torch.tensor(sequence.loss_mask),
                     "aux": aux[0].bfloat16(), "last": last[0].bfloat16()})  # fmt: skip
    torch.save(rows, work / "rows.pt")
    head.round_to_bf16(model)
    (work / "start").mkdir(exist_ok=True)
    head.export(model, work / "start")
    speculators.export(work / "start", source, work / "speculators")
    save_file({"lm_head": model.lm_head.weight.detach().clone()}, work / "target.safetensors")
    sequence = held[0]
    batch = trainer.assemble([sequence], store.compute([sequence]), model.model.embed_tokens.weight)
    with torch.no_grad():
        logits = Unroller(model.eagle_module, STEPS).logits(batch)
    aux, last = capture.run(torch.tensor([sequence.token_ids]))
    witness = {"ids": sequence.token_ids, "start": sequence.prompt_tokens, "aux": aux, "logits": logits}
    torch.save(witness, work / "witness.pt")
    print(json.dumps({"sequences": len(train), "tokens": sum(len(s.token_ids) for s in train)}))


def load(source: Path, answers: Path, held_out: Path, seed: int = 0) -> tuple[Any, Any, list[Any], list[Any]]:
    """(converted model, capture, training sequences, held-out ones)."""
    from tasks.job import Job
    from tasks.train_draft import data, place, stage

    draft = {"target": "source", "capture_layers": None, "vocab_size": None, "training": SPEC}
    train, _ = data.split(data.read_answers(answers / "answers.jsonl", 256))
    held = data.read_answers(held_out / "answers.jsonl", 256)
    torch.manual_seed(seed)
    job = Job("train_draft", {"name": "bench", "draft": draft}, source, {"download": source}, source)
    model, capture = stage.load(job, train, place.alone())
    return model, capture, train, held


def ours(work: Path, source: Path, answers: Path, held_out: Path, seconds: float) -> None:
    """kilotok's trainer for `seconds`, the target's forward passes of the first epoch included."""
    from tasks.job import Progress
    from tasks.train_draft import features, stage, trainer

    model, capture, train, held = load(source, answers, held_out)
    scratch = work / f"ours-{int(time.time())}"
    store = features.FeatureStore(capture, scratch / "features", 8.0)
    run = trainer.Trainer(model, store, train, {**SPEC, "max_seconds": seconds}, scratch)
    state = run.run(Progress())
    report("ours", state.step, stage.trained_tokens(run, state.step), state.seconds, length(model, store, held))


def pair(work: Path, source: Path, answers: Path, held_out: Path, seconds: float) -> None:
    """The same through torchrun: two gloo processes of one thread each, their start and first epoch included."""
    from tasks.job import Job, Progress
    from tasks.train_draft import launch, place, stage

    scratch = work / f"pair-{int(time.time())}"
    scratch.mkdir()
    training = {**SPEC, "max_seconds": seconds, "sequence_length": 256, "hidden_states_gib": 8.0}
    draft = {"target": "source", "capture_layers": None, "training": training,
             "launch": {"nodes": 1, "processes_per_node": 2}}  # fmt: skip
    inputs = {"download": source.absolute(), "synthesize": answers}
    job = Job("train_draft", {"name": "bench", "draft": draft}, source, inputs, scratch)
    began = time.monotonic()
    launch.train(job, Progress())
    elapsed = time.monotonic() - began
    train, held_back = stage.read(job)
    run, _ = stage.ready(job, train, held_back, place.alone())
    state = run.run(Progress())  # the pair's last checkpoint
    tokens = stage.trained_tokens(run, state.step)
    accepted = length(run.model, run.store, load(source, answers, held_out)[3])
    report(f"two processes, {elapsed:.0f} s in all", state.step, tokens, state.seconds, accepted)


def padding(work: Path, source: Path, answers: Path, held_out: Path, seconds: float) -> None:
    """What packing could save: batches in order of length, as the trainer blurs them, and in no order."""
    from tasks.job import Progress
    from tasks.train_draft import data, features, stage, trainer

    model, capture, train, _ = load(source, answers, held_out)
    for jitter in (0, data.JITTER_TOKENS, 10**9):
        data.JITTER_TOKENS = jitter
        batches = [[len(train[i].token_ids) for i in batch] for batch in data.make_batches(train, BATCH, 0)]
        padded_to = sum(max(batch) * len(batch) for batch in batches)
        empty = 1 - sum(map(sum, batches)) / padded_to
        scratch = work / f"padding-{jitter}-{int(time.time())}"
        store = features.FeatureStore(capture, scratch / "features", 8.0)
        write_states(store, train, scratch / "states.json")
        run = trainer.Trainer(model, store, train, {**SPEC, "max_seconds": seconds}, scratch)
        state = run.run(Progress())
        report(
            f"jitter {jitter}, {empty:.1%} empty", state.step, stage.trained_tokens(run, state.step), state.seconds, 0
        )


def modelopt(work: Path, source: Path, answers: Path, held_out: Path, seconds: float) -> None:
    """modelopt's own training forward in a bare AdamW loop (its example adds transformers' Trainer around it).

    Given the dumped features, as its offline mode is. Padded first to the longest sequence, as its example does, then
    to each batch's own, which costs it least.
    """
    from tasks.train_draft import data

    model, capture, train, held = load(source, answers, held_out)
    rows = torch.load(work / "rows.pt")
    batches = data.make_batches(train, BATCH, 0)
    parameters = list(model.eagle_module.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    for longest in (256, 0):
        began, step, tokens = time.monotonic(), 0, 0
        while (spent := time.monotonic() - began) < seconds / 2:
            chosen = [rows[i] for i in batches[data.batch_at(step, len(batches), 0)]]
            model._cached_attn_blk_masks.clear()  # it keeps those of the first batch's length
            model(**padded(chosen, longest)).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step, tokens = step + 1, tokens + sum(len(row["ids"]) for row in chosen)
        # Its head normalises twice: it has no acceptance as served.
        report(f"modelopt, padded to {longest or 'the batch'}", step, tokens, spent, float("nan"))


def padded(rows: list[dict[str, torch.Tensor]], longest: int) -> dict[str, Any]:
    """The arguments of modelopt's forward; `longest` 0 pads to the batch's longest sequence only."""
    longest = longest or max(len(row["ids"]) for row in rows)

    def stack(name: str) -> torch.Tensor:
        return torch.stack([torch.cat((r[name], r[name].new_zeros(longest - len(r[name]), *r[name].shape[1:])))
                            for r in rows])  # fmt: skip

    given = {"base_model_hidden_states": stack("last").float(), "aux_hidden_states": stack("aux").float()}
    valid = torch.arange(longest) < torch.tensor([len(row["ids"]) for row in rows])[:, None]
    mask = stack("mask")
    return {"input_ids": stack("ids"), "attention_mask": valid.long(), "loss_mask": mask, "base_model_outputs": given}


def targets(work: Path, source: Path, quantized: Path, answers: Path, given: argparse.Namespace) -> None:
    """One head from each target's hidden states, both judged on the quantized one's, as they are served.

    The hidden states are written first, and that is timed alone. Then trainings of as many steps (4 epochs for a
    minute of `--seconds`), or of as many seconds as writing the states left.
    """
    from tasks.job import Progress
    from tasks.train_draft import features, trainer

    for start in given.starts:
        for name in ("source", "quantized"):
            model, capture, train, held = load(source, answers, given.artifacts[3], start)
            served = features.ServedCapture(quantized, capture.layers)
            store = features.FeatureStore(capture if name == "source" else served, work / f"states-{name}", 8.0)
            spent = write_states(store, train, work / f"states-{name}.json")
            limit = {"epochs": round(given.seconds / 15)}
            if given.equal == "seconds":
                limit = {"max_seconds": given.seconds - spent}
            scratch = work / f"{name}-{start}-{int(time.time())}"
            scratch.mkdir()
            state = trainer.Trainer(model, store, train, {**SPEC, **limit}, scratch).run(Progress())
            judge = features.FeatureStore(served, work / "judge", 8.0)
            row = f"{name}, equal {given.equal}, start {start}, states {spent:.1f} s"
            report(row, state.step, 0, state.seconds, length(model, judge, held))


def write_states(store: Any, train: list[Any], record: Path) -> float:
    """Every batch's hidden states to the store; the seconds that took, also when an earlier call wrote them."""
    from tasks.train_draft import data

    if not record.exists():
        began = time.monotonic()
        for index, batch in enumerate(data.make_batches(train, BATCH, 0)):
            store.get(f"batch-{index:06d}", [train[i] for i in batch])
        record.write_text(json.dumps(time.monotonic() - began))
    return float(json.loads(record.read_text()))


def length(model: Any, store: Any, held: list[Any]) -> float:
    """Acceptance length at three drafts of the head, rounded as it is served."""
    from tasks.acceptance import acceptance_metrics
    from tasks.train_draft import head, stage

    head.round_to_bf16(model)
    return acceptance_metrics(stage.evaluate(model, store, held))["acceptance.length"]


def speculators_loop(work: Path, seconds: float) -> None:
    """Load the export with speculators, compare logits, then train it: its forward, its loss, AdamW, packed batches."""
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3 import Eagle3DraftModel

    model = Eagle3DraftModel.from_pretrained(work / "speculators", dtype=torch.float32, attn_implementation="eager")
    model.config.transformer_layer_config._attn_implementation = "eager"
    model._attn_impl = "eager"
    from speculators.models.attention import create_float_mask

    model._create_mask_fn = create_float_mask
    print(json.dumps({"speculators_logits_differ_by": agrees(model, work)}))
    from safetensors.torch import load_file, save_file

    model.verifier_lm_head.weight.data.copy_(load_file(work / "target.safetensors")["lm_head"])
    model.verifier_norm = torch.nn.Identity()  # the dumped hidden states are normed
    model.lm_head.weight.requires_grad_(True)
    losses = resolve_loss_config("kl_div", "eager")  # its fused ones need Triton
    rows = torch.load(work / "rows.pt")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["ids"]))
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    began, step, tokens = time.monotonic(), 0, 0
    while (spent := time.monotonic() - began) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, 0.05 + step / 30) * max(0.03, 1 - spent / seconds)
        chosen = [rows[i] for i in batches[int(torch.randint(len(batches), (1,), generator=generator))]]
        document = torch.cat([torch.full((len(r["ids"]) - 1,), i) for i, r in enumerate(chosen)])[None]
        position = torch.cat([torch.arange(1, len(r["ids"])) for r in chosen])[None]
        _, loss, _ = model(
            hidden_states=torch.cat([r["aux"][:-1] for r in chosen])[None].float(),
            input_ids=torch.cat([r["ids"][1:] for r in chosen])[None],
            document_ids=document, position_ids=position,
            loss_mask=torch.cat([r["mask"][:-1] for r in chosen])[None].bool(),
            verifier_last_hidden_states=torch.cat([r["last"][1:] for r in chosen])[None].float(),
            ttt_steps=STEPS, ttt_step_loss_decay=0.9, loss_config=losses,
        )  # fmt: skip
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, tokens = step + 1, tokens + sum(len(r["ids"]) for r in chosen)
    state = {n: p.detach().contiguous() for n, p in model.named_parameters() if not n.startswith(("verifier", "embed"))}
    save_file(state, work / "theirs.safetensors")
    report("speculators", step, tokens, spent, float("nan"))


@torch.no_grad()
def agrees(model: Any, work: Path) -> float:
    """Relative difference of speculators' logits to ours on one held-back answer, worst of the chain's steps."""
    witness = torch.load(work / "witness.pt")
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output))
    count, start = len(witness["ids"]) - 1, witness["start"]
    model(hidden_states=witness["aux"][:, :-1], input_ids=torch.tensor([witness["ids"][1:]]),
          document_ids=torch.zeros(1, count, dtype=torch.long), ttt_steps=STEPS)  # fmt: skip
    model.lm_head._forward_hooks.clear()
    worst = 0.0
    for theirs, mine in zip(seen, witness["logits"], strict=True):
        rows = theirs[0, start - 1 : start - 1 + mine.shape[1]]
        worst = max(worst, float((rows - mine[0]).norm() / mine[0].norm()))
    return worst


def judge(work: Path, source: Path, answers: Path, held_out: Path) -> None:
    """Acceptance of the head that speculators trained."""
    from safetensors.torch import load_file

    from tasks.train_draft import features

    model, capture, _, held = load(source, answers, held_out)
    theirs = load_file(work / "theirs.safetensors")
    for name, parameter in model.eagle_module.named_parameters():
        parameter.data.copy_(theirs[name])
    store = features.FeatureStore(capture, work / "judge", 8.0)
    report("speculators' head", 0, 0, 0.0, length(model, store, held))


def report(name: str, step: int, tokens: float, seconds: float, acceptance: float) -> None:
    rate = tokens / seconds if seconds else 0.0
    row = {"loop": name, "steps": step, "seconds": round(seconds, 1), "tokens_per_s": round(rate)}
    print(json.dumps(row | {"acceptance_length": round(acceptance, 3)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("work", type=Path)
    parser.add_argument("artifacts", type=Path, nargs="*", help="SOURCE QUANTIZED ANSWERS HELD_OUT")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--starts", type=int, nargs="*", default=[0, 1, 2], help="of `targets`: seeds of the head")
    parser.add_argument("--equal", choices=("steps", "seconds"), default="steps", help="of `targets`")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.part == "speculators":
        return speculators_loop(given.work, given.seconds)
    source, quantized, answers, held_out = given.artifacts
    if given.part == "targets":
        return targets(given.work, source, quantized, answers, given)
    if given.part in ("prepare", "judge"):
        return {"prepare": prepare, "judge": judge}[given.part](given.work, source, answers, held_out)
    timed = {"ours": ours, "pair": pair, "padding": padding, "modelopt": modelopt}
    return timed[given.part](given.work, source, answers, held_out, given.seconds)


if __name__ == "__main__":
    main()
