"""The shared store against a real S3 server (moto's) behind a proxy that fails on purpose.

Refuses to stub boto3. Run: `pytest tests/tasks/test_store_s3.py`.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from specs.errors import IntegrityError, KilotokError, NetworkError, StoreError
from tasks.plan import plan
from tasks.runner import StageEvent
from tasks.store import LocalStore, Manifest, Meta, open_store
from tasks.store.keys import CODE_ROOT
from tasks.store.s3 import S3Store
from tasks.store.s3_lease import S3Lease
from tasks.store.upkeep import copy
from tests.tasks.conftest import SmallDisk
from tests.tasks.fault_proxy import Proxy, fault_proxy
from tests.tasks.toy import Toy

KEY = "a" * 64
META = Meta({"stage": "make"}, {"x": 1.0}, {}, {})
BIG = bytes(range(256)) * 4096 * 20  # 20 MiB: two parts


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    yield moto.get_host_and_port()
    moto.stop()


@pytest.fixture
def proxy(server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with fault_proxy(server) as found:
        settings = {"ENDPOINT_URL": found.url, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}
        for name, value in {**settings, "DEFAULT_REGION": "us-east-1"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setattr("tasks.store.s3_transfer._PAUSE_S", 0.01)
        yield found


@pytest.fixture
def bucket(proxy: Proxy, request: pytest.FixtureRequest) -> str:
    from tasks.store.s3_transfer import connect

    name = f"b{abs(hash(request.node.name))}"
    connect().create_bucket(Bucket=name)
    proxy.seen.clear()
    return name


def machine(bucket: str, path: Path) -> S3Store:
    return S3Store(f"s3://{bucket}/team", LocalStore(path))


@pytest.fixture
def here(bucket: str, tmp_path: Path) -> S3Store:
    return machine(bucket, tmp_path / "here")


@pytest.fixture
def there(bucket: str, tmp_path: Path) -> S3Store:
    return machine(bucket, tmp_path / "there")


def publish(store: S3Store, content: bytes = b"hello", key: str = KEY, meta: Meta = META) -> Manifest:
    work = store.workdir("make", key)
    (work / "sub").mkdir(exist_ok=True)
    (work / "sub" / "file.bin").write_bytes(content)
    (work / "small.txt").write_text("small")
    return store.publish("make", key, work, meta)


def test_published_here_is_a_hit_there_with_the_same_bytes(here: S3Store, there: S3Store) -> None:
    publish(here, BIG)
    folder = there.checkout(there.lookup("make", KEY))
    assert (folder / "sub" / "file.bin").read_bytes() == BIG


def test_second_checkout_moves_nothing(here: S3Store, there: S3Store, proxy: Proxy) -> None:
    manifest = publish(here)
    there.checkout(manifest)
    proxy.seen.clear()
    there.checkout(manifest)
    assert proxy.seen == []


def test_plan_knows_what_must_be_moved(here: S3Store, there: S3Store) -> None:
    manifest = publish(here)
    assert [there.missing_bytes(manifest), here.missing_bytes(manifest)] == [manifest.size_bytes, 0]


def test_of_two_writers_the_first_counts_for_both(here: S3Store, there: S3Store) -> None:
    mine = publish(here, b"mine")
    counts = publish(there, b"theirs")
    assert counts.digest == mine.digest
    assert (there.checkout(counts) / "sub" / "file.bin").read_bytes() == b"mine"


def test_no_manifest_before_every_file(here: S3Store, there: S3Store, proxy: Proxy) -> None:
    publish(here)
    puts = [path for method, path, _ in proxy.seen if method == "PUT"]
    assert puts[-1].endswith("manifest.json") and sum("/blobs/" in path for path in puts) == 2


def test_upload_that_failed_is_resumed_without_sending_again(here: S3Store, proxy: Proxy) -> None:
    proxy.faults += [("PUT", "manifest.json", "denied")]
    with pytest.raises(StoreError):
        publish(here)
    proxy.seen.clear()
    assert here.lookup("make", KEY)  # what only this machine has is shared on the next look
    puts = [path for method, path, _ in proxy.seen if method == "PUT"]
    assert not any("/blobs/" in path for path in puts) and puts[-1].endswith("manifest.json")


def test_large_upload_that_failed_resends_only_the_parts_that_are_missing(here: S3Store, proxy: Proxy) -> None:
    proxy.faults += [("PUT", "partNumber=2", "denied")]
    with pytest.raises(StoreError, match="refused our credentials"):
        publish(here, BIG)
    proxy.seen.clear()
    assert here.lookup("make", KEY)
    sent = [path for method, path, _ in proxy.seen if method == "PUT" and "partNumber" in path]
    assert len(sent) == 1 and "partNumber=2" in sent[0]


def test_two_writers_of_one_large_blob_end_with_one_whole_blob(here: S3Store, there: S3Store) -> None:
    with ThreadPoolExecutor(2) as pool:
        manifests = list(pool.map(lambda store: publish(store, BIG), (here, there)))
    assert manifests[0].digest == manifests[1].digest and there.verify(manifests[1]) == []


@pytest.mark.parametrize("fault", ["500", "reset", "slow"])
@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_trouble_on_the_way_is_survived(here: S3Store, there: S3Store, proxy: Proxy, method: str, fault: str) -> None:
    proxy.faults += [(method, "/blobs/", fault), (method, "manifest.json", fault)]
    manifest = publish(here)
    assert there.verify(manifest) == []


def test_cut_body_is_continued_from_its_last_byte(here: S3Store, there: S3Store, proxy: Proxy) -> None:
    manifest = publish(here, BIG)
    proxy.faults += [("GET", "/blobs/", "truncate")] * 2
    assert there.verify(manifest) == []
    assert any(header.startswith("bytes=") for _, path, header in proxy.seen if "/blobs/" in path)


def test_half_download_of_a_crash_is_continued(here: S3Store, there: S3Store, proxy: Proxy) -> None:
    manifest = publish(here, BIG)
    file = next(file for file in manifest.files if file.size == len(BIG))
    work = there.local.workdir("pull-make", manifest.digest)
    (work / "sub").mkdir()
    (work / "sub" / f".file.bin.{file.sha256[:16]}.half").write_bytes(BIG[:1000000])
    assert there.verify(manifest) == []
    assert any(header == "bytes=1000000-" for _, _, header in proxy.seen)


def test_pull_onto_a_disk_that_fills_goes_on_when_there_is_room(
    here: S3Store, bucket: str, proxy: Proxy, small_disk: SmallDisk
) -> None:
    manifest = publish(here, BIG)
    there = machine(bucket, small_disk.path)
    small_disk.leave(len(BIG) // 2)
    with pytest.raises(StoreError, match="the store is full"):
        there.checkout(manifest)
    assert list(there.local.entries()) == []
    small_disk.free()
    proxy.seen.clear()
    assert there.verify(manifest) == []
    (header,) = [header for _, path, header in proxy.seen if "/blobs/" in path and header]
    assert int(header.removeprefix("bytes=").rstrip("-")) > len(BIG) // 4


def test_store_pull_onto_a_full_disk_is_one_clear_error(here: S3Store, small_disk: SmallDisk) -> None:
    publish(here, BIG)
    there = LocalStore(small_disk.path / "store")
    small_disk.leave(len(BIG) // 2)
    with pytest.raises(StoreError, match="the store is full"):
        copy(here, there)
    assert list(there.entries()) == []
    small_disk.free()
    assert len(copy(here, there)) == 1


def test_damage_on_the_way_is_fetched_again(here: S3Store, there: S3Store, proxy: Proxy) -> None:
    manifest = publish(here)
    proxy.faults += [("GET", "/blobs/", "corrupt")]
    assert there.verify(manifest) == []


def test_same_size_damage_in_the_bucket_is_found_and_rebuilt(here: S3Store, there: S3Store, bucket: str) -> None:
    manifest = publish(here)
    blob = f"team/blobs/{manifest.files[0].sha256[:2]}/{manifest.files[0].sha256}"
    here._client.put_object(Bucket=bucket, Key=blob, Body=b"x" * manifest.files[0].size)
    with pytest.raises(IntegrityError, match="came damaged"):
        there.checkout(there.lookup("make", KEY))
    assert there.lookup("make", KEY) is None
    publish(there)
    assert there.verify(there.lookup("make", KEY)) == []


def test_lost_blob_is_found_and_rebuilt(here: S3Store, there: S3Store, bucket: str) -> None:
    manifest = publish(here)
    sha256 = manifest.files[0].sha256
    here._client.delete_object(Bucket=bucket, Key=f"team/blobs/{sha256[:2]}/{sha256}")
    with pytest.raises(IntegrityError, match="lost"):
        there.checkout(manifest)
    assert there.lookup("make", KEY) is None


def test_manifest_that_leaves_its_folder_is_refused(here: S3Store, there: S3Store, bucket: str) -> None:
    text = publish(here).to_json().replace("small.txt", "../../small.txt")
    here._client.put_object(Bucket=bucket, Key=f"team/artifacts/make/{KEY}/manifest.json", Body=text.encode())
    assert "refused file name" in there.inspect("make", KEY).problem


def test_missing_bucket_is_one_clear_error(proxy: Proxy, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no such bucket"):
        open_store("s3://nowhere/at-all", tmp_path).lookup("make", KEY)


def test_wrong_credentials_are_one_clear_error(here: S3Store, proxy: Proxy) -> None:
    proxy.faults += [("GET", "", "denied")]
    with pytest.raises(StoreError, match="refused our credentials"):
        here.lookup("make", KEY)


def test_wrong_clock_is_one_clear_error(here: S3Store, proxy: Proxy) -> None:
    proxy.faults += [("GET", "", "skew")] * 9
    with pytest.raises(StoreError, match="clock is wrong"):
        here.lookup("make", KEY)


def test_server_that_is_gone_is_a_network_error(tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("tasks.store.s3_transfer._ATTEMPTS", 1)
    with pytest.raises(NetworkError):
        machine("any-bucket", tmp_path).lookup("make", KEY)


def test_failed_verdict_is_no_hit_but_can_be_read(here: S3Store, there: S3Store) -> None:
    manifest = publish(here, meta=Meta({}, {}, {}, {}, cacheable=False))
    assert there.lookup("make", KEY) is None
    assert (there.checkout(there.load(here.artifact_uri(manifest))) / "small.txt").exists()


def test_records_and_history_are_shared(here: S3Store, there: S3Store) -> None:
    here.write_json("builds/a/1", {"x": 1})
    here.remember("a", publish(here))
    assert there.read_json("builds/a/1") == {"x": 1} and there.list_json("builds") == ["builds/a/1"]
    assert there.history("make", "a")["key"] == KEY


def test_deleted_artifact_is_gone_and_its_young_blobs_are_spared(here: S3Store) -> None:
    here.delete(publish(here))
    assert list(here.entries()) == [] and here.sweep(dry_run=True) == []


def test_lease_of_another_machine_is_waited_for(here: S3Store, there: S3Store) -> None:
    told: list[str] = []
    order: list[str] = []

    def second() -> None:
        with there.lease("make-a", told.append):
            order.append("there")

    with here.lease("make-a"):
        assert [lease["name"] for lease in there.leases()] == ["make-a"]
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(1.5)
        order.append("here")
    thread.join()
    assert order == ["here", "there"] and told[0].startswith("waiting for pid")


def test_lease_of_a_dead_machine_is_taken_over(bucket: str, here: S3Store, there: S3Store) -> None:
    dead = S3Lease(here._client, bucket, "team/leases/make-a.json", "make-a", ttl_s=1.0)
    assert dead._take()  # and nobody renews it
    started = time.monotonic()
    with there.lease("make-a"):
        assert time.monotonic() - started < 8


def test_lease_is_renewed_for_as_long_as_it_is_held(bucket: str, tmp_path: Path, there: S3Store) -> None:
    here = S3Store(f"s3://{bucket}/team", LocalStore(tmp_path / "short"), lease_ttl_s=2.0)
    with here.lease("make-a"):
        time.sleep(4)
        assert [lease["name"] for lease in there.leases()] == ["make-a"]


def test_push_from_the_own_cache_copies_nothing_on_disk(here: S3Store, proxy: Proxy) -> None:
    publish(here.local)  # type: ignore[arg-type]
    inode = here.local.checkout(here.local.load(f"make/{KEY}")).stat().st_ino
    assert copy(here.local, here) == [f"{here.uri}/artifacts/make/{KEY}"] and copy(here.local, here) == []
    assert here.local.checkout(here.local.load(f"make/{KEY}")).stat().st_ino == inode


def test_pull_brings_artifacts_to_a_plain_store(here: S3Store, tmp_path: Path) -> None:
    publish(here)
    publish(here, key="b" * 64, meta=Meta({}, {}, {}, {}, cacheable=False))
    plain = LocalStore(tmp_path / "plain")
    assert len(copy(here, plain)) == 2 and copy(here, plain) == []
    assert plain.verify(plain.lookup("make", KEY)) == []


def test_a_run_fills_the_shared_store_for_the_next_machine(toy: Toy, here: S3Store, there: S3Store) -> None:
    toy.store = here  # type: ignore[assignment]
    toy.run()
    toy.store = there  # type: ignore[assignment]
    assert [toy.run().state, toy.run("join").state] == ["cached", "built"]


def test_bucket_that_disappears_mid_run_loses_nothing(toy: Toy, here: S3Store, bucket: str) -> None:
    def drop(event: StageEvent) -> None:
        if event.kind == "progress":
            for item in here._client.list_objects_v2(Bucket=bucket).get("Contents", []):
                here._client.delete_object(Bucket=bucket, Key=item["Key"])
            here._client.delete_bucket(Bucket=bucket)

    toy.store, toy.listen = here, drop  # type: ignore[assignment]
    with pytest.raises(StoreError, match="there is no such bucket"):
        toy.run()
    here._client.create_bucket(Bucket=bucket)
    toy.listen = toy.events.append
    assert toy.run().state == "cached" and toy.num_calls == 1  # what this machine had built is shared, not built again
    assert here.verify(next(here.entries())) == []


AHEAD = """
import json, sys, time
now = time.time
time.time = lambda: now() + 30 * 86400
from pathlib import Path
from tasks.store import LocalStore
from tasks.store.keys import CODE_ROOT
from tasks.store.s3 import S3Store
from tasks.store.s3_lease import S3Lease
store = S3Store(sys.argv[1], LocalStore(Path(sys.argv[2])))
taken = S3Lease(store._client, store._bucket, "team/leases/make-a.json", "make-a")._take()
print(json.dumps([taken, [lease["name"] for lease in store.leases()], store.sweep(dry_run=True)]))
"""


def test_machine_with_its_clock_a_month_ahead_takes_nothing_away(here: S3Store, tmp_path: Path) -> None:
    here.delete(publish(here))
    with here.lease("make-a"):
        command = [sys.executable, "-c", AHEAD, here.uri, str(tmp_path / "ahead")]
        done = subprocess.run(command, cwd=CODE_ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stdout) == [False, ["make-a"], []]


def test_plan_counts_the_bytes_that_a_build_would_fetch(toy: Toy, here: S3Store, there: S3Store) -> None:
    toy.store = here  # type: ignore[assignment]
    size = toy.run().size_bytes
    rows = plan(toy.view, there, toy.registry, toy.root).rows
    assert [(row.state, row.move_bytes) for row in rows] == [("cached", 0), ("build", size)]


def test_every_error_of_the_bucket_is_ours(here: S3Store, proxy: Proxy) -> None:
    proxy.faults += [("PUT", "", "500")] * 40
    with pytest.raises(KilotokError):
        publish(here)
