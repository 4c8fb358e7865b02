"""What the store costs: a no-op beside DVC and Snakemake, bytes at disk speed, memory for 20 GB.

Refuses to compare different chains: all three get the same nine stages with 45 files each. Sparse files stand for
800 GB where nobody reads them; DVC gets files of 64 KiB, because it has to hash each once before it can skip it.
Run it on a quiet machine, results go to stdout as JSON lines:

    python infra/bench_reports/store_bench.py noop --peers VENV   # a virtual environment with dvc and snakemake
    python infra/bench_reports/store_bench.py disk FOLDER         # 4 GB of random bytes go through FOLDER
    python infra/bench_reports/store_bench.py memory FOLDER       # 20 GB of zeros go through FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from specs.load import load_spec  # noqa: E402
from tasks.plan import plan  # noqa: E402
from tasks.stages import REGISTRY  # noqa: E402
from tasks.store import FileEntry, LocalStore, Manifest, Meta, open_store  # noqa: E402
from tasks.store.hashing import hash_files, recorded_hashes  # noqa: E402
from tasks.store.manifest import MANIFEST, content_digest  # noqa: E402

SPEC = "specs/tiny-llama4-cpu.yaml"
FILES_PER_STAGE, FILE_BYTES = 45, 2_000_000_000
GB = 1e9


def say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


# -- a no-op -----------------------------------------------------------------------------------------------------------
def sparse_store(folder: Path) -> None:
    """Every stage of the tiny spec cached: 405 sparse files, 810 GB to look at and none to read."""
    spec, store = load_spec(ROOT / SPEC), LocalStore(folder)
    for stage in REGISTRY:
        row = next(row for row in plan(spec, store).rows if row.stage == stage)
        target = store.root / "artifacts" / stage / row.key
        target.mkdir(parents=True)
        files = []
        for index in range(FILES_PER_STAGE):
            path = target / f"part-{index:05}.safetensors"
            with open(path, "wb") as stream:
                stream.truncate(FILE_BYTES)
            files.append(FileEntry(path.name, FILE_BYTES, "0" * 64, path.stat().st_mtime_ns))
        if stage == "promote":
            promotion = {"store": str(store.root), "name": spec.name, "plan_digest": "bench"}
            (target / "promotion.json").write_text(json.dumps(promotion))
            store.write_json(
                f"deployments/{spec.name}", {"live": "a", "slots": {"a": {"plan": {"digest": "bench"}}, "b": {}}}
            )
        manifest = Manifest(stage, row.key, {}, tuple(files), content_digest(files))
        (target / MANIFEST).write_text(manifest.to_json())


MAKE = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
for index in range(45):
    (folder / f"part-{index:05}").write_bytes(bytes(65536))
"""


def dvc_chain(folder: Path, peers: Path) -> list[str]:
    (folder / "make.py").write_text(MAKE)
    lines = ["stages:"]
    for number, stage in enumerate(REGISTRY):
        lines += [f"  {stage}:", f"    cmd: {sys.executable} make.py {stage}", "    deps:", "    - make.py"]
        lines += [f"    - {list(REGISTRY)[number - 1]}"] if number else []
        lines += ["    outs:", f"    - {stage}"]
    (folder / "dvc.yaml").write_text("\n".join(lines) + "\n")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run([peers / "bin/dvc", "init", "-q"], cwd=folder, check=True)
    subprocess.run([peers / "bin/dvc", "config", "core.analytics", "false"], cwd=folder, check=True)
    subprocess.run([peers / "bin/dvc", "repro", "-q"], cwd=folder, check=True)
    return [str(peers / "bin/dvc"), "repro"]


def snakemake_chain(folder: Path, peers: Path) -> list[str]:
    (folder / "make.py").write_text(MAKE)
    names = list(REGISTRY)
    lines = [
        f"F = ['part-%05d' % i for i in range({FILES_PER_STAGE})]",
        f"rule all:\n    input: expand('{names[-1]}/{{f}}', f=F)",
    ]
    for number, stage in enumerate(names):
        before = f"expand('{names[number - 1]}/{{f}}', f=F)" if number else "'make.py'"
        lines.append(
            f"rule {stage}:\n    input: {before}\n    output: expand('{stage}/{{f}}', f=F)\n"
            f"    shell: '{sys.executable} make.py {stage}'"
        )
    (folder / "Snakefile").write_text("\n".join(lines) + "\n")
    command = [str(peers / "bin/snakemake"), "--cores", "1", "--quiet"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return command


def noop(peers: Path, runs: int) -> None:
    key_cost()  # first: nothing is parsed yet
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch, name) for name in ("kilotok", "dvc", "snakemake")}
        for folder in folders.values():
            folder.mkdir()
        sparse_store(folders["kilotok"])
        contenders = {
            "kilotok plan": (
                ROOT,
                [sys.executable, "-m", "flows.cli", "plan", SPEC, "--store", str(folders["kilotok"])],
            ),
            "dvc repro": (folders["dvc"], dvc_chain(folders["dvc"], peers)),
            "snakemake": (folders["snakemake"], snakemake_chain(folders["snakemake"], peers)),
            "python -c pass": (ROOT, [sys.executable, "-c", "pass"]),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(runs + 1):  # side by side; the first round warms the caches and is dropped
            for name, (folder, command) in contenders.items():
                started = time.perf_counter()
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment())
                seconds[name].append(time.perf_counter() - started)
                assert done.returncode == 0, done.stderr
                assert name != "kilotok plan" or done.stdout.count(" cached ") == len(REGISTRY), done.stdout
        for name, taken in seconds.items():
            say(bench="noop", what=name, best_s=round(min(taken[1:]), 3), worst_s=round(max(taken[1:]), 3), runs=runs)


def key_cost() -> None:
    """Keys of all nine stages, imports aside: before and after the digests of the sources are known."""
    with tempfile.TemporaryDirectory() as scratch:
        spec, store = load_spec(ROOT / SPEC), LocalStore(Path(scratch))
        for what in ("first: every source file is parsed", "again: sources are only stat'ed"):
            started = time.perf_counter()
            plan(spec, LocalStore(store.root))
            say(bench="keys", what=what, ms=round(1e3 * (time.perf_counter() - started), 1))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1"}


# -- bytes -------------------------------------------------------------------------------------------------------------
def disk(folder: Path, num_files: int = 8, file_bytes: int = 512 << 20) -> None:
    """Plain copy, one-core sha256 and all-core sha256 beside the download stage, publishing included."""
    source, total = folder / "source", num_files * file_bytes
    checkpoint_of_random_bytes(source, num_files, file_bytes)
    names = [path.name for path in source.glob("*.safetensors")]
    hash_of(source)  # the lock, which was made long before

    def timed(what: str, work: Any, cold: bool = False) -> None:
        os.sync()
        if cold:
            forget(source)
        read_before, started = bytes_read(), time.perf_counter()
        work()
        taken = time.perf_counter() - started
        read = (bytes_read() - read_before) / total
        say(
            bench="disk",
            what=what,
            gb_per_s=round(total / taken / GB, 2),
            seconds=round(taken, 2),
            passes=round(read, 2),
        )

    def copy_plain() -> None:
        shutil.copytree(source, folder / "copy")
        for path in (folder / "copy").iterdir():
            with open(path) as stream:
                os.fsync(stream.fileno())

    timed("sha256, one core", lambda: [hash_files(source, [name]) for name in names])
    timed("sha256, all cores", lambda: hash_files(source, names))
    for cold, where in ((False, "in memory"), (True, "on the disk")):
        for _ in range(4):
            timed(f"cp and fsync, source {where}", copy_plain, cold)
            shutil.rmtree(folder / "copy")
            timed(f"download stage and publish, source {where}", lambda: download(folder, source), cold)
            shutil.rmtree(folder / "store")


def forget(folder: Path) -> None:
    """Drop the pages of every file from the page cache, so that the disk is read."""
    for path in folder.iterdir():
        with open(path) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def checkpoint_of_random_bytes(source: Path, num_files: int, file_bytes: int) -> None:
    source.mkdir(parents=True)
    (source / "config.json").write_text("{}")
    block = os.urandom(64 << 20)
    for number in range(num_files):
        with open(source / f"model-{number:05}.safetensors", "wb") as stream:
            for _ in range(file_bytes // len(block)):
                stream.write(block)
            stream.write(str(number).encode())


def download(folder: Path, source: Path) -> None:
    """The stage as the runner calls it, in this process so that what it reads can be counted."""
    from tasks.download import build
    from tasks.job import Job, Progress

    hashes = hash_of(source)
    lock = {
        "kilotok_lock": 1,
        "source": f"file:{source}",
        "revision": "",
        "requested": "main",
        "files": hashes,
        "data": {},
    }
    store = LocalStore(folder / "store")
    work = store.workdir("download", "a" * 64)
    spec = {"name": "bench", "model": {"source": f"file:{source}", "token": None}}
    build(Job("download", spec, folder, {}, work, lock), Progress())
    assert len(recorded_hashes(work)) == len(hashes)
    manifest = store.publish("download", "a" * 64, work, Meta({}, {}, {}, {}))
    assert manifest.size_bytes == sum(entry["size"] for entry in hashes.values())


_known: dict[Path, dict[str, Any]] = {}


def hash_of(source: Path) -> dict[str, Any]:
    """The lock's part, hashed once."""
    if source not in _known:
        names = [path.name for path in source.iterdir()]
        found = hash_files(source, names)
        _known[source] = {name: {"sha256": found[name], "size": (source / name).stat().st_size} for name in names}
    return _known[source]


def bytes_read() -> int:
    """By this process through read calls, from disk or page cache alike."""
    return int(Path("/proc/self/io").read_text().split()[1])


# -- memory ------------------------------------------------------------------------------------------------------------
def memory(folder: Path, num_files: int = 4, file_bytes: int = 5_000_000_000) -> None:
    """Peak resident memory of each process that moves a sparse artifact: copy, push to a bucket, pull, verify."""
    store = LocalStore(folder / "here")
    work = store.workdir("download", "a" * 64)
    for number in range(num_files):
        with open(work / f"model-{number:05}.safetensors", "wb") as stream:
            stream.truncate(file_bytes)
    bucket = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("zero_bucket.py")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert bucket.stdout
        url = bucket.stdout.readline().strip()
        for step in ("publish", "copy", "push", "pull", "verify"):
            started = time.perf_counter()
            command = [sys.executable, __file__, "step", str(folder), "--step", step]
            environ = {**environment(), "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
                       "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
            done = subprocess.run(command, env=environ, check=True, stdout=subprocess.PIPE, text=True)
            taken, total = time.perf_counter() - started, num_files * file_bytes
            say(
                bench="memory",
                what=step,
                peak_mb=int(done.stdout),
                gb=total / GB,
                gb_per_s=round(total / taken / GB, 2),
            )
            for gone in {"copy": ["there"], "push": ["here"], "verify": ["pulled"]}.get(step, []):
                shutil.rmtree(folder / gone)
    finally:
        bucket.terminate()
        bucket.wait()


def one_step(folder: Path, step: str) -> None:
    from tasks.store.s3 import S3Store
    from tasks.store.upkeep import copy

    here, name = LocalStore(folder / "here"), "download/" + "a" * 64
    shared = open_store("s3://bench/team", cache=folder / ("pulled" if step in ("pull", "verify") else "here"))
    assert isinstance(shared, S3Store)
    if step == "publish":
        here.publish("download", "a" * 64, here.workdir("download", "a" * 64), Meta({}, {}, {}, {}))
    elif step == "copy":
        assert copy(here, LocalStore(folder / "there"))
    elif step == "push":
        assert copy(here, shared)
    elif step == "pull":
        shared.checkout(shared.load(name))
    else:
        assert shared.verify(shared.load(name)) == []
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=("noop", "disk", "memory", "step"))
    parser.add_argument("folder", nargs="?", type=Path, help="a new folder on the disk to measure")
    parser.add_argument("--peers", type=Path, help="a virtual environment with dvc and snakemake")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--step", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bench == "noop":
        noop(arguments.peers, arguments.runs)
    elif arguments.bench == "step":
        one_step(arguments.folder, arguments.step)
    else:
        arguments.folder.mkdir()
        try:
            {"disk": disk, "memory": memory}[arguments.bench](arguments.folder)
        finally:
            shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
