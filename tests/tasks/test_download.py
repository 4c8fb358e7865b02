"""Download: what is locked arrives byte for byte, and nothing else does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from specs.errors import InputError, IntegrityError, LockError, NetworkError, StoreError
from specs.load import load_spec
from specs.lock import Lock, check_lock, read_lock, write_lock
from tasks import download
from tasks.edges import hub
from tasks.edges.secrets import resolve_secret
from tasks.job import Job, Progress
from tasks.prompts import read_prompts, resolve
from tests.tasks.conftest import SmallDisk
from tests.tasks.fake_hub import COMMIT, FakeHub

WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
INDEX = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
FILES = {
    "config.json": b"{}",
    "model-1.safetensors": WEIGHTS,
    "model-2.safetensors": WEIGHTS[::-1],
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
}
SPEC = """
kilotok: 1
name: toy
model: {source: "%s"}
quantize: {calibration: {dataset: "file:prompts.jsonl"}}
draft: {data: {prompts: "file:prompts.jsonl"}}
validate: {accuracy: {tasks: [code], problems: "file:prompts.jsonl"}}
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a checkpoint in `ckpt`, a prompts file and a spec for them."""
    for name, body in FILES.items():
        (tmp_path / "ckpt").mkdir(exist_ok=True)
        (tmp_path / "ckpt" / name).write_bytes(body)
    (tmp_path / "prompts.jsonl").write_text('{"id": "1", "domain": "code", "prompt": "x"}\n')
    (tmp_path / "pyproject.toml").touch()
    return tmp_path


def lock_of(root: Path, source: str = "file:ckpt", **model: object) -> Lock:
    (root / "toy.yaml").write_text(SPEC % source)
    spec = load_spec(root / "toy.yaml", [f"model.{key}={json.dumps(value)}" for key, value in model.items()])
    return hub.make_lock(spec, Progress())


def job_of(root: Path, lock: Lock | None, source: str = "file:ckpt") -> Job:
    out = root / "out"
    out.mkdir(exist_ok=True)
    spec = {"name": "toy", "model": {"source": source, "revision": "main", "files": None, "token": None}}
    return Job("download", spec, root, {}, out, lock.to_dict() if lock else None)


def arrived(root: Path) -> dict[str, bytes]:
    out = root / "out"
    return {
        p.relative_to(out).as_posix(): p.read_bytes()
        for p in out.rglob("*")
        if p.is_file() and ".scratch" not in p.parts
    }


def test_folder_arrives_whole(root: Path) -> None:
    metrics = download.build(job_of(root, lock_of(root)), Progress())
    assert arrived(root) == FILES and metrics["download.bytes"] == sum(map(len, FILES.values()))


def test_progress_ends_at_total(root: Path) -> None:
    seen: list[tuple[float, float]] = []
    download.build(job_of(root, lock_of(root)), Progress(lambda done, total, note: seen.append((done, total))))
    assert seen[-1][0] == seen[-1][1] == sum(map(len, FILES.values()))


def test_flipped_byte_at_same_size_is_named(root: Path) -> None:
    lock = lock_of(root)
    shard = root / "ckpt" / "model-2.safetensors"
    body = bytearray(shard.read_bytes())
    body[77] ^= 1
    shard.write_bytes(body)
    with pytest.raises(IntegrityError, match="model-2.safetensors is not what was locked.*same size") as error:
        download.build(job_of(root, lock), Progress())
    assert hashlib.sha256(bytes(body)).hexdigest() in str(error.value) and "kilotok lock" in error.value.fix
    assert "model-2.safetensors" not in arrived(root)


def test_missing_shard_is_named(root: Path) -> None:
    lock = lock_of(root)
    (root / "ckpt" / "model-1.safetensors").unlink()
    with pytest.raises(IntegrityError, match="model-1.safetensors is missing"):
        download.build(job_of(root, lock), Progress())


def test_shard_missing_from_the_start_cannot_be_locked(root: Path) -> None:
    (root / "ckpt" / "model-1.safetensors").unlink()
    with pytest.raises(IntegrityError, match="shard model-1.safetensors is missing"):
        lock_of(root)


def test_unlocked_is_refused(root: Path) -> None:
    with pytest.raises(LockError, match="toy is not locked") as error:
        download.build(job_of(root, None), Progress())
    assert error.value.exit_code == 2


def test_pickle_is_refused_unless_excluded(root: Path) -> None:
    (root / "ckpt" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match="pytorch_model.bin is not safetensors"):
        lock_of(root)
    assert "pytorch_model.bin" not in lock_of(root, files=["*.json", "*.safetensors"]).files


def test_small_disk_is_seen_before_the_first_byte(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 1000))
    with pytest.raises(StoreError, match="not enough disk"):
        download.build(job_of(root, lock_of(root)), Progress())
    assert arrived(root) == {}


def test_disk_that_fills_on_the_way_keeps_what_has_arrived(root: Path, small_disk: SmallDisk) -> None:
    (root / "ckpt" / "model-2.safetensors").write_bytes(WEIGHTS * 4)
    job = replace(job_of(root, lock_of(root)), out=small_disk.path / "out")
    job.out.mkdir()

    def fill(done: float, total: float, note: str) -> None:
        if not small_disk.is_full:
            small_disk.leave(1 << 20)

    with pytest.raises(StoreError, match="cannot write .*No space left on device"):
        download.build(job, Progress(fill))
    small_disk.free()
    moved = download.build(job, Progress())["download.bytes_moved"]
    assert (job.out / "model-2.safetensors").read_bytes() == WEIGHTS * 4
    assert moved < 5 * len(WEIGHTS)


def test_second_attempt_reads_nothing_that_is_there(root: Path) -> None:
    lock = lock_of(root)
    download.build(job_of(root, lock), Progress())
    assert download.build(job_of(root, lock), Progress())["download.bytes_moved"] == 0


def test_file_touched_after_verification_is_fetched_again(root: Path) -> None:
    lock = lock_of(root)
    download.build(job_of(root, lock), Progress())
    (root / "out" / "config.json").write_bytes(b"[]")
    download.build(job_of(root, lock), Progress())
    assert arrived(root) == FILES


def test_part_of_a_crash_is_continued(root: Path) -> None:
    job = job_of(root, lock_of(root))
    part = job.scratch / "parts" / "model-1.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(WEIGHTS[:1000])
    moved = download.build(job, Progress())["download.bytes_moved"]
    assert arrived(root) == FILES and moved == sum(map(len, FILES.values())) - 1000


def test_poisoned_part_does_not_get_through(root: Path) -> None:
    job = job_of(root, lock_of(root))
    part = job.scratch / "parts" / "model-1.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"\0" * 1000)
    with pytest.raises(IntegrityError):
        download.build(job, Progress())
    assert download.build(job, Progress()) and arrived(root) == FILES


# ---------------------------------------------------------------- hub


@pytest.fixture
def fake_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    served = FakeHub("org/toy", dict(FILES))
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    yield served
    served.server.shutdown()
    served.server.server_close()


def test_hub_branch_is_locked_to_its_commit(root: Path, fake_hub: FakeHub) -> None:
    lock = lock_of(root, "hf://org/toy")
    assert lock.revision == COMMIT and lock.requested == "main"
    assert lock.files["model-1.safetensors"].sha256 == hashlib.sha256(WEIGHTS).hexdigest()


def test_hub_arrives_whole(root: Path, fake_hub: FakeHub) -> None:
    download.build(job_of(root, lock_of(root, "hf://org/toy"), "hf://org/toy"), Progress())
    assert arrived(root) == FILES


def test_hub_transfer_that_breaks_goes_on_at_its_byte(root: Path, fake_hub: FakeHub) -> None:
    lock = lock_of(root, "hf://org/toy")
    fake_hub.break_after, fake_hub.broken = 300_000, set()
    download.build(job_of(root, lock, "hf://org/toy"), Progress())
    assert arrived(root) == FILES and any("model-1.safetensors bytes=" in span for span in fake_hub.ranges)


def test_hub_corruption_is_caught(root: Path, fake_hub: FakeHub) -> None:
    lock = lock_of(root, "hf://org/toy")
    fake_hub.files["model-1.safetensors"] = WEIGHTS[::-1]
    with pytest.raises(IntegrityError, match="model-1.safetensors is not what was locked"):
        download.build(job_of(root, lock, "hf://org/toy"), Progress())


@pytest.mark.parametrize(
    ("source", "revision", "kind", "says"),
    [
        ("hf://org/toy", "nope", LockError, "no such revision"),
        ("hf://org/other", "main", InputError, "no such repository"),
    ],
)
def test_hub_refusals_name_the_cause(
    root: Path, fake_hub: FakeHub, source: str, revision: str, kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        lock_of(root, source, revision=revision)


def test_gated_repository_says_so(root: Path, fake_hub: FakeHub) -> None:
    fake_hub.gated = True
    with pytest.raises(InputError, match="gated"):
        lock_of(root, "hf://org/toy")


def test_silent_hub_is_transient(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NetworkError, match="did not answer"):
        lock_of(root, "hf://org/toy")


# ---------------------------------------------------------------- bucket


@pytest.fixture(scope="module")
def bucket() -> str:
    server_module = pytest.importorskip("moto.server")
    import boto3

    names = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
    before = {name: os.environ.get(name) for name in (*names, "AWS_ENDPOINT_URL")}
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(names, AWS_ENDPOINT_URL=f"http://{host}:{port}")
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    for name, body in FILES.items():
        client.put_object(Bucket="models", Key=f"toy/{name}", Body=body)
    yield "s3://models/toy"
    server.stop()
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def test_bucket_arrives_whole(root: Path, bucket: str) -> None:
    download.build(job_of(root, lock_of(root, bucket), bucket), Progress())
    assert arrived(root) == FILES


def test_bucket_part_is_continued(root: Path, bucket: str) -> None:
    job = job_of(root, lock_of(root, bucket), bucket)
    part = job.scratch / "parts" / "model-2.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(FILES["model-2.safetensors"][:5000])
    assert download.build(job, Progress())["download.bytes_moved"] == sum(map(len, FILES.values())) - 5000


def test_bucket_that_does_not_exist_is_named(root: Path, bucket: str) -> None:
    with pytest.raises(InputError, match="NoSuchBucket"):
        lock_of(root, "s3://no-such-bucket/toy")


# ---------------------------------------------------------------- prompts that live elsewhere

PROMPTS = b'{"id": "1", "domain": "code", "prompt": "x"}\n'


def data_job(root: Path, uri: str, body: bytes = PROMPTS) -> Job:
    lock = {"data": {uri: {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body)}}}
    (root / "out").mkdir(exist_ok=True)
    return Job("quantize", {}, root, {}, root / "out", lock)


@pytest.fixture(params=["bucket", "hub"])
def prompts_uri(request: pytest.FixtureRequest, root: Path) -> str:
    if request.param == "bucket":
        import boto3

        request.getfixturevalue("bucket")
        boto3.client("s3").put_object(Bucket="models", Key="data/prompts.jsonl", Body=PROMPTS)
        return "s3://models/data/prompts.jsonl"
    request.getfixturevalue("fake_hub").files["prompts.jsonl"] = PROMPTS
    return f"hf://org/toy@{COMMIT}/prompts.jsonl"


def test_prompts_from_elsewhere_are_read_as_locked(root: Path, prompts_uri: str) -> None:
    job = data_job(root, prompts_uri)
    assert [prompt.id for prompt in read_prompts(resolve(prompts_uri, job))] == ["1"]


def test_prompts_that_are_not_what_was_locked_are_refused(root: Path, prompts_uri: str) -> None:
    with pytest.raises(IntegrityError, match="not what was locked"):
        resolve(prompts_uri, data_job(root, prompts_uri, b"other bytes"))


def test_prompts_without_a_lock_are_refused(root: Path) -> None:
    with pytest.raises(LockError, match="lock"):
        resolve("s3://models/data/unlocked.jsonl", data_job(root, "s3://models/other.jsonl"))


# ---------------------------------------------------------------- the lock against spec and source


def test_lock_goes_through_its_file(root: Path) -> None:
    lock = lock_of(root)
    spec = load_spec(root / "toy.yaml")
    write_lock(spec, lock)
    assert check_lock(spec, read_lock(spec)) == lock


@pytest.mark.parametrize(
    "change", ["model.revision=v2", "model.files=['*.json']", "validate.accuracy.problems=file:x.jsonl"]
)
def test_lock_for_another_spec_is_refused(root: Path, change: str) -> None:
    lock = lock_of(root)
    with pytest.raises(LockError, match="lock") as error:
        check_lock(load_spec(root / "toy.yaml", [change]), lock)
    assert "kilotok lock" in error.value.fix


def test_lock_that_climbs_out_is_refused(root: Path) -> None:
    data = lock_of(root).to_dict()
    data["files"]["../evil"] = data["files"]["config.json"]
    with pytest.raises(LockError, match="outside"):
        Lock.from_dict(data)


def test_secret_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_TOKEN", "x")
    assert resolve_secret("${env:TOY_TOKEN}") == "x"
    monkeypatch.delenv("TOY_TOKEN")
    with pytest.raises(InputError, match="TOY_TOKEN is not set"):
        resolve_secret("${env:TOY_TOKEN}")
