"""Train an EAGLE-3 head on the target's own answers and export it in TensorRT-LLM's layout.

It refuses to train on data whose chat template is not the served one, and to hand on a head that the engine computes
differently. `stage.py` is the order of things; `data.py` answers to batches, `features.py` the target's hidden states,
`head.py` modelopt's module and its export, `unroll.py` the training-time test, `trainer.py` the loop, `acceptance.py`
the evaluation.
Run it: `kilotok run SPEC` (stage train_draft), or `python -m tasks.child JOB.json` by hand.
"""

from __future__ import annotations

from tasks.job import Job, Progress


def build(job: Job, progress: Progress) -> dict[str, float]:
    """See `tasks.train_draft.stage.build`; imported late because torch, transformers and modelopt take seconds."""
    from tasks.train_draft import stage

    return stage.build(job, progress)
