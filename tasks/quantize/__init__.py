"""BF16 checkpoint in, FP8 checkpoint out: calibrated by a modelopt recipe, exported in its unified Hugging Face layout.

It refuses to hand on a checkpoint it has not reloaded: every detector in `detectors.py` runs before the artifact
counts. `stage.py` is the order of things, `coverage.py` what must and must not be quantized, `calibrate.py` and
`export.py` drive modelopt, `reload.py` reads the result back without modelopt, `table.py` is the per-tensor table.
Run it: `kilotok run SPEC` (stage quantize), or `python -m tasks.child JOB.json` by hand.
"""

from __future__ import annotations

from tasks.job import Job, Progress


def build(job: Job, progress: Progress) -> dict[str, float]:
    """See `tasks.quantize.stage.build`; imported late because torch, transformers and modelopt take seconds."""
    from tasks.quantize import stage

    return stage.build(job, progress)
