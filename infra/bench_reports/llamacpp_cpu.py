"""llama.cpp on the shapes of random_checkpoints.py: tokens/s for one user, and four-token verifications/s.

What it is: llama_decode and its greedy sampler in a loop, through llama-cpp-python, best of several rounds, as JSON.
What it refuses to be: part of kilotok's environment; its Python is one that has llama-cpp-python and gguf.
Run it: `PYTHON_OF_THAT_ENVIRONMENT infra/bench_reports/llamacpp_cpu.py SCRATCH_DIR --threads 2`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from random_checkpoints import SHAPE_7M, SHAPE_260M, Shape, write_gguf


def measure(path: Path, threads: int, tokens: int, rounds: int) -> dict[str, float]:
    """Best of `rounds` over a context of up to 64 + `tokens` positions."""
    import llama_cpp as c

    model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
    params = c.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = 1024, 512, threads, threads
    context = c.llama_init_from_model(model, params)
    sampler = c.llama_sampler_init_greedy()

    def decode(ids: list[int]) -> None:
        array = (c.llama_token * len(ids))(*ids)
        if c.llama_decode(context, c.llama_batch_get_one(array, len(ids))):
            raise RuntimeError("llama_decode failed")

    best = {"tokens_per_s": 0.0, "verifications_of_4_per_s": 0.0}
    for _ in range(rounds):
        for name, step in (("tokens_per_s", 1), ("verifications_of_4_per_s", 4)):
            c.llama_memory_clear(c.llama_get_memory(context), True)
            decode(list(range(3, 67)))
            started = time.perf_counter()
            for _ in range(tokens // step):
                token = c.llama_sampler_sample(sampler, context, -1)
                decode([token] * step)
            best[name] = max(best[name], tokens // step / (time.perf_counter() - started))
    c.llama_free(context), c.llama_model_free(model)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepare", action="store_true", help="write the files only")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    import llama_cpp

    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    results = {"version": llama_cpp.__version__}
    plans: list[tuple[Shape, int, int]] = [(SHAPE_7M, 256, 8), (SHAPE_260M, 48, 4)]
    for shape, tokens, rounds in plans:
        for quantization in ("F16", "Q8_0"):
            file = args.scratch / f"{shape.name.split()[-1]}-{quantization}.gguf"
            if not file.exists():
                write_gguf(file, shape, quantization)
            if not args.prepare:
                results[f"{shape.name} {quantization}"] = measure(file, args.threads, tokens, rounds)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
