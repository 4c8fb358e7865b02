"""Bytes to and from a bucket: blobs named by their sha256, hashed while they are written, resumed where they stopped.

Refuses to hold a file in memory, to believe a length, and to retry what cannot get better (credentials, no bucket).
Used by `tasks.store.s3`; credentials and endpoint come from the standard AWS chain (AWS_ENDPOINT_URL for others).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import botocore.exceptions as aws

from specs.errors import IntegrityError, KilotokError, NetworkError, StoreError
from tasks.store.manifest import FileEntry
from tasks.store.s3_upload import abort_stale, upload

NUM_FILES_AT_ONCE = 8
_PIECE_BYTES = 1 << 18
_ATTEMPTS = 6
_PAUSE_S = 0.5  # before the second attempt; doubles
# Garbage collection spares young blobs, so a publisher may rely on one only while it is younger still (see sweep).
SPARED_DAYS, RELIED_ON_DAYS = 7.0, 6.0
_REFUSED = {"AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_ABSENT = {"NoSuchKey", "404", "NotFound"}
_T = TypeVar("_T")
_R = TypeVar("_R")


def connect() -> Any:
    """A client with patience for a busy server and none for a silent one."""
    import boto3  # half a second: only for whoever does talk to a bucket
    from botocore.config import Config

    retries = {"mode": "standard", "max_attempts": _ATTEMPTS}
    config = Config(retries=retries, connect_timeout=10, read_timeout=30, max_pool_connections=4 * NUM_FILES_AT_ONCE)
    with s3_errors("s3://"):
        return boto3.client("s3", config=config)


@contextmanager
def s3_errors(where: str) -> Iterator[None]:
    """boto3's errors in our words: what a retry may cure is a NetworkError, the rest an Integrity- or StoreError."""
    try:
        yield
    except aws.ClientError as error:
        raise _client_error(error, where) from error
    except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.NoRegionError, aws.ProfileNotFound) as error:
        raise StoreError(str(error).rstrip("."), where, "set AWS credentials and region as for any AWS tool") from error
    except (aws.ConnectionError, aws.HTTPClientError, aws.IncompleteReadError) as error:
        fix = "check the network and the endpoint, then run again"
        raise NetworkError(f"the bucket did not answer ({type(error).__name__})", where, fix) from error


def _client_error(error: aws.ClientError, where: str) -> KilotokError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        return StoreError("there is no such bucket", where, "create it or correct --store")
    if code == "RequestTimeTooSkewed":
        return StoreError("this machine's clock is wrong, the bucket refuses it", where, "set the clock (NTP)")
    if code in _ABSENT:
        return IntegrityError("the bucket has lost this object", where, "run again: it will be rebuilt")
    if code in _REFUSED:
        return StoreError(f"the bucket refused our credentials ({code})", where, "check AWS credentials and the policy")
    if status >= 500 or code in ("SlowDown", "RequestTimeout", "InternalError"):
        return NetworkError(f"the bucket is in trouble ({code or status})", where, "try again later")
    return StoreError(f"the bucket said {code}: {error.response.get('Error', {}).get('Message', '')}", where)


def is_absent(error: aws.ClientError) -> bool:
    return str(error.response["Error"]["Code"]) in _ABSENT


def is_lost_race(error: aws.ClientError) -> bool:
    """Somebody else wrote first: precondition failed, or both at the very same time."""
    return error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412)


def server_time(response: Any) -> datetime:
    """The server's own clock, so that ours may be wrong."""
    headers = response["ResponseMetadata"]["HTTPHeaders"]
    return parsedate_to_datetime(headers["date"]) if "date" in headers else datetime.now(timezone.utc)


def server_age_s(response: Any) -> float:
    """How old an object is by the server's clock."""
    return (server_time(response) - response["LastModified"]).total_seconds()


def for_all(work: Callable[[_T], _R], things: Iterable[_T]) -> list[_R]:
    """Several at once; the first error stops what has not begun."""
    with ThreadPoolExecutor(NUM_FILES_AT_ONCE) as pool:
        pending = [pool.submit(work, thing) for thing in things]
        try:
            return [one.result() for one in pending]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class Blobs:
    """The blobs of one bucket and prefix."""

    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        self._client, self._bucket, self._prefix = client, bucket, prefix

    def key(self, sha256: str) -> str:
        return f"{self._prefix}blobs/{sha256[:2]}/{sha256}"

    def upload(self, folder: Path, files: Iterable[FileEntry]) -> None:
        """Large files first, each in parallel parts with checksums; what the bucket has is not sent again."""
        unique = {file.sha256: file for file in files}
        for_all(lambda file: self._upload_one(folder, file), sorted(unique.values(), key=lambda file: -file.size))

    def download(self, folder: Path, files: Iterable[FileEntry]) -> None:
        """Every file at its path below `folder`, verified; finished ones are kept, started ones continued."""
        for_all(lambda file: self._download_one(folder / file.path, file), sorted(files, key=lambda file: -file.size))

    def sweep(self, wanted: set[str], dry_run: bool) -> list[tuple[str, int]]:
        """(blob, size) of all that no manifest names and nobody may be about to name."""
        dropped: list[tuple[str, int]] = []
        with s3_errors(f"s3://{self._bucket}"):
            for page in self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=f"{self._prefix}blobs/"
            ):
                now = server_time(page)
                for item in page.get("Contents", []):
                    old = (now - item["LastModified"]).total_seconds() > SPARED_DAYS * 86400
                    if old and item["Key"].rpartition("/")[2] not in wanted:
                        dropped.append((item["Key"], item["Size"]))
            if not dry_run:
                for key, _ in dropped:
                    self._client.delete_object(Bucket=self._bucket, Key=key)
                oldest = server_time(page) - timedelta(days=SPARED_DAYS)
                abort_stale(self._client, self._bucket, f"{self._prefix}blobs/", oldest)
        return dropped

    def _upload_one(self, folder: Path, file: FileEntry) -> None:
        with s3_errors(f"s3://{self._bucket}/{self.key(file.sha256)}"):
            if self._has(file):
                return
            try:
                upload(self._client, self._bucket, self.key(file.sha256), folder / file.path, file.size)
            except aws.ClientError:
                if not self._has(file):  # another writer of the same bytes may have completed it meanwhile
                    raise

    def _has(self, file: FileEntry) -> bool:
        try:
            head = self._client.head_object(Bucket=self._bucket, Key=self.key(file.sha256))
        except aws.ClientError as error:
            if is_absent(error):
                return False
            raise
        return head["ContentLength"] == file.size and server_age_s(head) < RELIED_ON_DAYS * 86400

    def _download_one(self, path: Path, file: FileEntry) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():  # by an earlier attempt: a file gets its name only after its hash was right
            return
        half = path.with_name(f".{path.name}.{file.sha256[:16]}.half")
        if self._fetch(half, file) != file.sha256:
            half.unlink()  # of an earlier attempt, or damaged on the way: once more from the first byte
            if self._fetch(half, file) != file.sha256:
                half.unlink()
                self._drop(file)
        os.replace(half, path)

    def _fetch(self, half: Path, file: FileEntry) -> str:
        """The whole of a blob into `half`, through network errors, going on where they struck; returns its sha256."""
        pause_s = _PAUSE_S
        for left in reversed(range(_ATTEMPTS)):
            try:
                with s3_errors(f"s3://{self._bucket}/{self.key(file.sha256)}"):
                    return self._stream(half, file)
            except NetworkError:
                if not left:
                    raise
            time.sleep(pause_s)
            pause_s *= 2
        raise AssertionError("unreachable")

    def _stream(self, half: Path, file: FileEntry) -> str:
        """Append what is missing, hashing it all; a body that ends early is a network error, to be continued."""
        with open(half, "a+b") as out:
            digest, done = _hash_so_far(out)
            if done < file.size:
                extra = {"Range": f"bytes={done}-"} if done else {}
                body = self._client.get_object(Bucket=self._bucket, Key=self.key(file.sha256), **extra)["Body"]
                for piece in body.iter_chunks(_PIECE_BYTES):
                    out.write(piece)
                    digest.update(piece)
                    done += len(piece)
        if done < file.size:
            raise NetworkError("the bucket sent less than it promised", str(half), "try again")
        return str(digest.hexdigest())

    def _drop(self, file: FileEntry) -> None:
        """Twice the wrong bytes: whoever builds it again must be able to put the right ones here."""
        where = f"s3://{self._bucket}/{self.key(file.sha256)}"
        with s3_errors(where):
            self._client.delete_object(Bucket=self._bucket, Key=self.key(file.sha256))
        raise IntegrityError(f"{file.path} came damaged from the bucket", where, "run again: it will be rebuilt")


def _hash_so_far(stream: BinaryIO) -> tuple[Any, int]:
    """The hash state and length of what an earlier attempt left."""
    digest = hashlib.sha256()
    stream.seek(0)
    while piece := stream.read(_PIECE_BYTES):
        digest.update(piece)
    return digest, stream.tell()
