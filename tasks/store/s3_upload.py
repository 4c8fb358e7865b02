"""One file to a bucket: small ones in one request, large ones in parallel parts that a second attempt does not resend.

Refuses to hold a part in memory (parts are read as they are sent) and to believe a part of another length. Parts of an
earlier attempt can be trusted because a blob's key is its content's sha256: whoever began it had the same bytes.
Used by `tasks.store.s3_transfer`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PART_BYTES = 16 << 20
_NUM_PARTS_AT_ONCE = 4
_MAX_PARTS = 9000  # S3 allows 10,000
_CHECKSUM = "CRC32"  # the bucket compares it with what arrives


def upload(client: Any, bucket: str, key: str, path: Path, size: int) -> None:
    """Raises botocore's errors; what has arrived by then stays and is used by the next attempt."""
    if size <= PART_BYTES:
        with _Part(path, 0, size) as body:
            client.put_object(Bucket=bucket, Key=key, Body=body, ChecksumAlgorithm=_CHECKSUM)
        return
    target = {"Bucket": bucket, "Key": key}
    upload_id = _begun(client, bucket, key)
    if not upload_id:
        upload_id = client.create_multipart_upload(**target, ChecksumAlgorithm=_CHECKSUM)["UploadId"]
    target["UploadId"] = upload_id
    part_bytes = max(PART_BYTES, -(-size // _MAX_PARTS))
    lengths = {number + 1: min(part_bytes, size - number * part_bytes) for number in range(-(-size // part_bytes))}
    done = {number: part for number, part in _arrived(client, target) if part["Size"] == lengths.get(number)}

    def send(number: int) -> dict[str, Any]:
        with _Part(path, (number - 1) * part_bytes, lengths[number]) as body:
            return dict(client.upload_part(**target, PartNumber=number, Body=body, ChecksumAlgorithm=_CHECKSUM))

    waiting = [number for number in lengths if number not in done]
    with ThreadPoolExecutor(_NUM_PARTS_AT_ONCE) as pool:
        try:
            done |= dict(zip(waiting, pool.map(send, waiting), strict=True))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    named = ("ETag", f"Checksum{_CHECKSUM}")
    parts = [{"PartNumber": n, **{name: done[n][name] for name in named if name in done[n]}} for n in lengths]
    client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts})


def abort_stale(client: Any, bucket: str, prefix: str, oldest: Any) -> None:
    """Give back the space of uploads that were begun before `oldest` (a datetime) and never completed."""
    for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
        for begun in page.get("Uploads", []):
            if begun["Initiated"] < oldest:
                client.abort_multipart_upload(Bucket=bucket, Key=begun["Key"], UploadId=begun["UploadId"])


def _begun(client: Any, bucket: str, key: str) -> str:
    """The newest upload of this key that was never completed, or ""."""
    found = client.list_multipart_uploads(Bucket=bucket, Prefix=key).get("Uploads", [])
    ours = sorted((begun["Initiated"], begun["UploadId"]) for begun in found if begun["Key"] == key)
    return str(ours[-1][1]) if ours else ""


def _arrived(client: Any, target: dict[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for page in client.get_paginator("list_parts").paginate(**target):
        for part in page.get("Parts", []):
            yield part["PartNumber"], part


class _Part(io.RawIOBase):
    """A stretch of a file as a stream; boto3 rewinds it to sign, to checksum and to try again."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self._start, self._length, self._at = start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        count = os.preadv(self._descriptor, [view], self._start + self._at)
        self._at += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()
