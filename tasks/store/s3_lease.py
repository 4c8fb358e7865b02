"""A lease in a bucket: a small object that names its owner, renewed while the owner lives, taken over when it does not.

Refuses to compare clocks: its age is the server's date minus the server's date. Correctness does not rest on it (the
conditional put of the manifest decides); it only saves two machines from building the same thing.
See them with `kilotok status --store s3://...`.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import botocore.exceptions as aws

from specs.errors import KilotokError
from tasks.edges.leases import describe_owner, new_owner
from tasks.store.s3_transfer import is_absent, is_lost_race, s3_errors, server_age_s

TTL_S = 60.0
_POLL_S = 1.0


class S3Lease:
    """One object; `hold()` waits for it."""

    def __init__(self, client: Any, bucket: str, key: str, name: str, ttl_s: float = TTL_S) -> None:
        self._client, self._bucket, self._key, self._name, self._ttl_s = client, bucket, key, name, ttl_s
        self._where = f"s3://{bucket}/{key}"
        self._owner = {**new_owner(name), "ttl_s": ttl_s, "nonce": uuid.uuid4().hex}
        self._etag = ""

    @contextmanager
    def hold(self, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
        told = ""
        while not self._take():
            owner = describe_owner(self._owner_now())
            if on_wait and owner != told:
                on_wait(f"waiting for {owner}")
                told = owner
            time.sleep(min(_POLL_S, self._ttl_s / 3))
        ended = threading.Event()
        keeper = threading.Thread(target=self._keep, args=(ended,), daemon=True, name=f"lease {self._name}")
        keeper.start()
        try:
            yield
        finally:
            ended.set()
            keeper.join()
            with suppress(KilotokError), s3_errors(self._where):  # it expires anyway
                self._client.delete_object(Bucket=self._bucket, Key=self._key, IfMatch=self._etag)

    def _take(self) -> bool:
        """Create it, or replace one that nobody has renewed for its time."""
        if self._put(IfNoneMatch="*"):
            return True
        try:
            with s3_errors(self._where):
                head = self._head()
        except _Gone:
            return False  # freed just now: the next round creates it
        expired = server_age_s(head) > float(head["Metadata"].get("ttl-s", self._ttl_s))
        return expired and self._put(IfMatch=head["ETag"])

    def _put(self, **condition: str) -> bool:
        """False when somebody else was first."""
        body = json.dumps({**self._owner, "renewed": time.time()}).encode()  # new bytes, new ETag: takers see a renewal
        metadata = {"ttl-s": str(self._ttl_s)}
        with s3_errors(self._where):
            try:
                answer = self._client.put_object(
                    Bucket=self._bucket, Key=self._key, Body=body, Metadata=metadata, **condition
                )
            except aws.ClientError as error:
                if is_lost_race(error) or is_absent(error):
                    return False
                raise
        self._etag = answer["ETag"]
        return True

    def _keep(self, ended: threading.Event) -> None:
        while not ended.wait(self._ttl_s / 3):
            with suppress(KilotokError):  # a renewal missed is made up by the next one
                if not self._put(IfMatch=self._etag):
                    return  # taken over after a long silence; the manifest's conditional put decides who wins

    def _head(self) -> Any:
        try:
            return self._client.head_object(Bucket=self._bucket, Key=self._key)
        except aws.ClientError as error:
            if is_absent(error):
                raise _Gone from error
            raise

    def _owner_now(self) -> dict[str, Any]:
        return read_lease(self._client, self._bucket, self._key) or {}


class _Gone(Exception):
    """The lease was freed between two looks."""


def read_lease(client: Any, bucket: str, key: str) -> dict[str, Any] | None:
    """The owner with its age, None when it is free or has expired."""
    with s3_errors(f"s3://{bucket}/{key}"):
        try:
            found = client.get_object(Bucket=bucket, Key=key)
        except aws.ClientError as error:
            if is_absent(error):
                return None
            raise
        owner = json.loads(found["Body"].read())
        age_s = server_age_s(found)
    expired = age_s > float(owner.get("ttl_s", TTL_S))
    return None if expired else {**owner, "owner": describe_owner(owner), "age_s": age_s}
