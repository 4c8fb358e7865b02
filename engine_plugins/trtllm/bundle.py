"""A trtllm bundle: checkpoint and draft as links, the rendered launch, the plugin package, what a start must prove.

Refuses to copy weights where the file system can link them, and to start anything.
Run it: stage `build_engine` of `kilotok run SPEC`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from engine_plugins.trtllm import package
from engine_plugins.trtllm.liveness import expect
from engine_plugins.trtllm.render import render

PLAIN_BATCH = 256  # requests in flight when answers per hour count, and not the speed of one


def write_bundle(
    out: Path, spec: dict[str, Any], checkpoint: Path, draft: Path | None, prove: bool = True
) -> dict[str, Any]:
    """Fill `out`; returns what is in its bundle.json. Raises SpecError for options that the version does not know."""
    engine: dict[str, Any] = spec["engine"]
    rendered = render(spec)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    link_tree(checkpoint, out / "checkpoint")
    if draft is not None and engine["draft_tokens"]:
        link_tree(draft, out / "draft")
    wheel = package.build_wheel(out / "plugins")
    package.unpack(wheel, out / "site")
    record = {
        "backend": "trtllm",
        "version": engine["version"],
        "image": (spec.get("deploy") or {}).get("image"),
        **{name: engine[name] for name in ("draft_tokens", "max_batch_size", "max_seq_len", "plugins")},
        "argv": rendered.argv,
        "env": rendered.env,
        "args": rendered.args_yaml,
        "wheel": wheel.name,
        "expected": expect(spec, config).to_dict() if prove else None,
    }
    # JSON is YAML; its placeholders are filled in when it is started.
    (out / "args.yaml").write_text(json.dumps(rendered.args_yaml, indent=2) + "\n")
    (out / "bundle.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def plain(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec's engine without draft, ops and the options of one fast user: for many answers, or the BF16 source."""
    engine = spec["engine"]
    dropped = ("speculative_config", "enable_min_latency", "enable_autotuner", "stream_interval", "max_num_tokens")
    options = {name: value for name, value in engine["options"].items() if name not in dropped}
    if options.get("cuda_graph_config", {}) is not None:
        options["cuda_graph_config"] = {"max_batch_size": PLAIN_BATCH, "enable_padding": True}
    changed = {"draft_tokens": 0, "plugins": [], "max_batch_size": PLAIN_BATCH, "options": options}
    return {**spec, "engine": {**engine, **changed}}


def link_tree(source: Path, target: Path) -> None:
    """Hard links where the store allows it: 400 GB of checkpoint need not exist twice on one disk."""

    def link_or_copy(src: str, dst: str) -> None:
        try:
            os.link(src, dst)
        except OSError:
            shutil.copy2(src, dst)

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=link_or_copy)
