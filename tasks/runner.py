"""Runs one stage: key, look up, lease, build, publish, receipt. The same for every stage and every store.

Refuses to build what exists, to build one thing twice at once, and to know Prefect: `flows/` wraps it in a task.
Used by `kilotok run`; from Python: `run_stage("quantize", spec, receipts, open_store(), print)`.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.errors import InputError, KilotokError, StageFailed, StoreError, from_dict
from specs.receipts import Receipt
from tasks import attest, provenance
from tasks.child import as_error, call_entry
from tasks.edges.machine import gpu
from tasks.edges.process import accelerator, exit_words, last_lines, spawn, stop
from tasks.job import Job, Progress
from tasks.stages import REGISTRY, Stage, ask
from tasks.store import Manifest, Meta, Store
from tasks.store.keys import CODE_ROOT, START, Known, SpecView, components, key_of, view_of, why_build
from tasks.store.local import as_store_error
from tasks.store.memo import Memo
from tasks.store.start import start_of

if TYPE_CHECKING:
    from specs.schema import Spec

_RESULT_GRACE_S = 60.0  # for a child that has sent its result to let go of threads and devices


@dataclass(frozen=True)
class StageEvent:
    """What a run shows: `kind` is heading (of what follows), started, progress, note or finished; a stage that
    fails raises."""

    stage: str
    kind: str
    done: float = 0.0
    total: float = 0.0
    text: str = ""
    receipt: Receipt | None = None  # of kind finished


Report = Callable[[StageEvent], None]


@dataclass(frozen=True)
class _Build:
    """One stage on its way; the arguments that every step below needs."""

    stage: Stage
    view: SpecView
    receipts: Mapping[str, Receipt]
    store: Store
    report: Report
    key: str
    components: dict[str, str]
    extra: Mapping[str, Any]
    start: str = ""  # URI of the artifact it goes on from

    def note(self, text: str) -> None:
        self.report(StageEvent(self.stage.name, "note", text=text))

    @property
    def lease_name(self) -> str:
        return f"{self.stage.name}-{self.key[:16]}"


def run_stage(
    name: str,
    spec: Spec | SpecView,
    receipts: Mapping[str, Receipt],
    store: Store,
    report: Report,
    *,
    registry: Mapping[str, Stage] = REGISTRY,
    code_root: Path = CODE_ROOT,
    extra: Mapping[str, Any] | None = None,
) -> Receipt:
    """Build the stage or find it built. Raises a KilotokError when it fails; nothing of a failure is kept as a hit."""
    started = time.monotonic()
    stage = registry[name]
    view = view_of(spec)
    if absent := [other for other in stage.inputs if other not in receipts]:
        raise InputError(f"{name} needs the receipts of {', '.join(absent)}", name, "run the stages in order")
    memo = Memo(store.local)
    known = Known(
        {other: receipt.digest for other, receipt in receipts.items()},
        {other: receipt.key for other, receipt in receipts.items()},
        (extra or {}).get("last_good"),
    )
    parts = components(stage, view, known, memo, code_root)
    added, start = start_of(stage, view, parts, known.last_good, store)
    parts |= added
    memo.save()
    build = _Build(stage, view, receipts, store, report, key_of(parts), parts, extra or {}, start)
    report(StageEvent(name, "started"))
    manifest, state, reason = _find_or_build(build)
    receipt = Receipt(
        stage=name, key=build.key, state=state, uri=store.artifact_uri(manifest), digest=manifest.digest,
        size_bytes=manifest.size_bytes, seconds=round(time.monotonic() - started, 3), reason=reason,
        metrics=dict(manifest.metrics),
    )  # fmt: skip
    report(StageEvent(name, "finished", 1, 1, f"{state}: {reason}", receipt))
    return receipt


def _find_or_build(build: _Build) -> tuple[Manifest, str, str]:
    found, reason = _hit(build)
    if found:
        return found, "cached", reason
    with build.store.lease(build.lease_name, build.note) as lease:
        again, _ = _hit(build)  # whoever held the lease before us may have built it
        if again:
            return again, "cached", "built by another run"
        build.note(reason)
        return _build(build, lease), "built", reason


def _hit(build: _Build) -> tuple[Manifest | None, str]:
    """An artifact to reuse and why, or None and why not."""
    stage, store = build.stage, build.store
    manifest = store.lookup(stage.name, build.key)
    if manifest is None:
        return None, why_build(stage, build.components, store, build.view.name)
    folder = store.checkout(manifest) if stage.alive or stage.revive else store.local.root
    if gone := ask(stage.alive, folder):
        return None, f"rebuild, {gone}"
    revived = ask(stage.revive, folder)
    _remember(build, manifest)
    return manifest, f"unchanged; {revived}" if revived else "unchanged"


def _build(build: _Build, lease: int | None) -> Manifest:
    stage, store = build.stage, build.store
    attest.signing_key()  # a key that cannot sign is found out now, not after hours of work
    given = [name for name in (*stage.inputs, *stage.uses) if name in build.receipts]
    uris = {name: build.receipts[name].uri for name in given}
    if build.start:
        uris[START] = build.start
    inputs = {name: store.checkout(store.load(uri)) for name, uri in uris.items()}
    workdir = store.workdir(stage.name, build.key)
    lock = dict(build.view.lock) if build.view.lock else None
    job = Job(
        stage.name,
        build.view.slice((*stage.reads, *stage.told)),
        build.view.root,
        inputs,
        workdir,
        lock,
        dict(build.extra),
    )
    metrics = _run_isolated(build, job, lease) if stage.isolated else _run_here(build, job)
    meta = Meta(build.components, metrics, provenance.collect(build.view), uris, _is_pass(workdir))
    manifest = store.publish(stage.name, build.key, workdir, meta)
    _remember(build, manifest)
    return manifest


def _remember(build: _Build, manifest: Manifest) -> None:
    """History explains the next miss; a store that only can be read still serves hits."""
    try:
        build.store.remember(build.view.name, manifest)
    except StoreError:
        return


def _is_pass(workdir: Path) -> bool:
    """A stage that judges leaves verdict.json; anything but PASS is kept for the report and never reused."""
    try:
        return json.loads((workdir / "verdict.json").read_text()).get("verdict") == "PASS"
    except FileNotFoundError:
        return True


def _run_here(build: _Build, job: Job) -> dict[str, float]:
    try:
        return call_entry(build.stage.entry, job, Progress(lambda *args: _progress(build, *args)))
    except KilotokError:
        raise
    except Exception as error:  # noqa: BLE001  stage boundary: a bug in one stage is that stage's failure
        raise as_error(error, job) from error


def _progress(build: _Build, done: float, total: float, note: str) -> None:
    kind = "progress" if total else "note"
    build.report(StageEvent(build.stage.name, kind, done, total, note))


# -- the child ---------------------------------------------------------------------------------------------------------
def _run_isolated(build: _Build, job: Job, lease: int | None) -> dict[str, float]:
    """Run the entry in a child that holds our lease and the accelerator with us, and dies with us."""
    base = build.store.logs / f"{job.stage}-{build.key[:12]}-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    log, job_file = base.with_suffix(".log"), base.with_suffix(".json")
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        job_file.write_text(json.dumps({"entry": build.stage.entry, "job": job.to_dict()}, indent=1))
    except OSError as error:
        raise as_store_error(error, job_file) or error from error
    with ExitStack() as held:
        fds = [] if lease is None else [lease]
        if build.stage.accelerator and gpu() != "none":
            fds.append(held.enter_context(accelerator(build.note)))
        reader, writer = os.pipe()
        held.callback(os.close, reader)
        argv = [sys.executable, "-m", "tasks.child", str(job_file), str(writer), str(os.getpid())]
        # The child asks for its own death with us (tasks.child): one interpreter start less than the trampoline.
        process = spawn(argv, log, env=_child_env(), pass_fds=[writer, *fds], dies_with_us=False)
        os.close(writer)
        held.callback(stop, process, 1.0)  # also on Ctrl-C and cancellation; a child that ended is left in peace
        for message in _messages(reader, process):
            if message["kind"] == "progress":
                _progress(build, message["done"], message["total"], message["note"])
            elif message["kind"] == "error":
                _let_end(process)  # its log's last lines are part of the error
                raise _told(from_dict(message["error"]), log)
            else:
                _let_end(process)
                return message["metrics"]
        raise _told(StageFailed(f"{job.stage} was {exit_words(process.wait())}", job.stage), log)


def _child_env() -> dict[str, str]:
    """The credentials' environment goes along; module search follows ours, so that toy stages are found too."""
    paths = dict.fromkeys([str(CODE_ROOT), *(path for path in sys.path if path)])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "PYTHONHASHSEED": "0",
            "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip


def _messages(reader: int, process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """JSON lines until the pipe closes or the child is gone (a forked grandchild may keep the pipe open)."""
    waiting = b""
    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None  # asked before the read: what it wrote last is then in the pipe
            if not selector.select(0 if ended else 0.5):
                if ended:
                    return
                continue
            chunk = os.read(reader, 1 << 16)
            if not chunk:
                return
            *lines, waiting = (waiting + chunk).split(b"\n")
            yield from (json.loads(line) for line in lines)


def _let_end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_RESULT_GRACE_S)
    except subprocess.TimeoutExpired:
        stop(process, 1.0)


def _told(error: KilotokError, log: Path) -> KilotokError:
    """A failure of the stage itself carries its log's path and end; an error about input or store speaks for itself."""
    if not isinstance(error, StageFailed) or error.log_path:
        return error
    fix = error.fix or f"the log ends with:\n{last_lines(log)}"
    return StageFailed(error.what, str(log), fix, log_path=str(log))
