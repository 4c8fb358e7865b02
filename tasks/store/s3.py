"""A store in a bucket, shared between machines, read and filled through a local one.

    PREFIX/artifacts/STAGE/KEY/manifest.json   written last and only if nobody else has: it decides between two writers
    PREFIX/blobs/AB/ABCD...                    the files, named by content: never half, never twice, never mixed up
    PREFIX/leases/NAME.json, PREFIX/records/   who builds what; builds and history

Refuses to hand out what it has not verified on arrival. Look inside with `kilotok store ls --store s3://bucket/prefix`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import botocore.exceptions as aws

from specs.errors import InputError, IntegrityError, StoreError
from specs.receipts import Receipt
from tasks.store.local import Found, LocalStore, Meta, next_history, store_errors
from tasks.store.manifest import MANIFEST, PROVENANCE, Manifest
from tasks.store.s3_lease import TTL_S, S3Lease, read_lease
from tasks.store.s3_transfer import Blobs, connect, for_all, is_absent, is_lost_race, s3_errors


class S3Store:
    """The same interface as LocalStore; `local` is this machine's copy of what it has used or made."""

    def __init__(self, uri: str, local: LocalStore, lease_ttl_s: float = TTL_S) -> None:
        self._bucket, _, prefix = uri.removeprefix("s3://").strip("/").partition("/")
        if not self._bucket:
            raise InputError(f"no bucket in {uri!r}", "--store", "write s3://bucket/prefix")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.uri = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        self.local, self.logs, self._lease_ttl_s = local, local.logs, lease_ttl_s

    @cached_property
    def _client(self) -> Any:
        return connect()

    @cached_property
    def _blobs(self) -> Blobs:
        return Blobs(self._client, self._bucket, self._prefix)

    # -- artifacts ---------------------------------------------------------------------------------------------------
    def artifact_uri(self, manifest: Manifest) -> str:
        return f"{self.uri}/artifacts/{manifest.stage}/{manifest.dirname}"

    def inspect(self, stage: str, key: str) -> Found:
        """Here, or else in the bucket; reads one small object at most."""
        here = self.local.inspect(stage, key)
        if here.manifest:
            return here
        try:
            there = self._remote(stage, key)
        except IntegrityError as error:
            return Found(problem=error.what)
        return Found(there) if there else here

    def lookup(self, stage: str, key: str) -> Manifest | None:
        """A hit to build on. What only this machine has is shared now."""
        here = self.local.lookup(stage, key)
        try:
            there = self._remote(stage, key)
        except IntegrityError:
            self._delete_object(self._manifest_key(stage, key))  # unreadable: as good as none, and in the way
            there = None
        if here and not there:
            return self.push(here)
        return there or here

    def load(self, place: str) -> Manifest:
        relative = place.removeprefix(self.uri + "/").removeprefix("artifacts/").removesuffix("/")
        stage, _, name = relative.rpartition("/")
        if "://" in relative or not stage:
            raise StoreError(
                "not an artifact of this store", place, f"its artifacts are {self.uri}/artifacts/STAGE/KEY"
            )
        if found := self._remote(stage, name):
            return found
        names = [key for key in self._list(f"artifacts/{relative}") if key.endswith(f"/{MANIFEST}")]
        if len(names) != 1:
            raise StoreError("no such artifact", place, f"see kilotok store ls --store {self.uri}")
        return self._read_manifest(names[0])

    def checkout(self, manifest: Manifest) -> Path:
        """The artifact on this machine, fetched and verified if it was not here; resumes what a crash left."""
        here = self.local.lookup(manifest.stage, manifest.key) if manifest.cacheable else self._kept(manifest)
        if here and here.digest == manifest.digest:
            return self.local.checkout(here)
        with self.local.lease(f"pull-{manifest.stage}-{manifest.key[:16]}"), store_errors(self.local.root):
            workdir = self.local.workdir(f"pull-{manifest.stage}", manifest.digest)
            try:
                self._blobs.download(workdir, manifest.files)
            except IntegrityError:
                # The bad blob is gone already; without the manifest a rebuild can take the artifact's place.
                self._delete_object(f"{self._artifact_key(manifest)}/{MANIFEST}")
                raise
            self._pull_provenance(manifest, workdir)
            arrived = tuple(replace(f, mtime_ns=(workdir / f.path).stat().st_mtime_ns) for f in manifest.files)
            return self.local.checkout(self.local.adopt(replace(manifest, files=arrived), workdir))

    def path(self, receipt: Receipt) -> Path:
        return self.checkout(self.load(receipt.uri))

    def missing_bytes(self, manifest: Manifest) -> int:
        here = self.local.inspect(manifest.stage, manifest.key).manifest
        return 0 if here and here.digest == manifest.digest else manifest.size_bytes

    def entries(self) -> Iterator[Manifest]:
        names = [key for key in self._list("artifacts/") if key.endswith(f"/{MANIFEST}")]
        yield from for_all(self._read_manifest, names)

    def delete(self, manifest: Manifest) -> None:
        """From the bucket and from here; its blobs go when nothing names them any more (`sweep`)."""
        for key in self._list(f"artifacts/{manifest.stage}/{manifest.dirname}/"):
            self._delete_object(key)
        if self.local.folder(manifest).exists():
            self.local.delete(manifest)

    def sweep(self, dry_run: bool) -> list[tuple[str, int]]:
        """Blobs that no manifest names, as (key, size)."""
        return self._blobs.sweep({file.sha256 for manifest in self.entries() for file in manifest.files}, dry_run)

    def verify(self, manifest: Manifest) -> list[str]:
        """Fetch what is not here (which verifies it), then read everything again."""
        try:
            self.checkout(manifest)
        except IntegrityError as error:
            return [error.what]
        return self.local.verify(manifest)

    # -- building ----------------------------------------------------------------------------------------------------
    def workdir(self, stage: str, key: str) -> Path:
        return self.local.workdir(stage, key)

    def publish(self, stage: str, key: str, workdir: Path, meta: Meta) -> Manifest:
        return self.push(self.local.publish(stage, key, workdir, meta))

    def push(self, manifest: Manifest) -> Manifest:
        """Share what this machine has; returns the manifest that counts: another writer's if that one was first."""
        folder = self.local.checkout(manifest)
        self._blobs.upload(folder, manifest.files)
        for path in sorted((folder / PROVENANCE).glob("*")):
            self._put(f"{self._artifact_key(manifest)}/{PROVENANCE}/{path.name}", path.read_bytes())
        key = f"{self._artifact_key(manifest)}/{MANIFEST}"
        if self._put_first(key, manifest.to_json().encode()):
            return manifest
        theirs = self._read_manifest(key)
        if theirs.digest != manifest.digest:
            self.local.delete(manifest)  # one key, one content, everywhere
            self.checkout(theirs)
        return theirs

    @contextmanager
    def lease(self, name: str, on_wait: Callable[[str], None] | None = None) -> Iterator[int | None]:
        """Ours among the processes of this machine by the kernel, among machines by an object that expires."""
        with self.local.lease(name, on_wait) as descriptor:
            lease = S3Lease(self._client, self._bucket, f"{self._prefix}leases/{name}.json", name, self._lease_ttl_s)
            with lease.hold(on_wait):
                yield descriptor

    def leases(self) -> list[dict[str, Any]]:
        found = for_all(lambda key: read_lease(self._client, self._bucket, key), self._list("leases/"))
        return [lease for lease in found if lease]

    # -- small records -----------------------------------------------------------------------------------------------
    def read_json(self, name: str) -> Any | None:
        found = self._get(f"{self._prefix}records/{name}.json")
        return json.loads(found) if found is not None else None

    def write_json(self, name: str, value: Any) -> None:
        self._put(f"{self._prefix}records/{name}.json", json.dumps(value, indent=1, sort_keys=True).encode())

    def list_json(self, folder: str) -> list[str]:
        skip = len(f"{self._prefix}records/")
        return sorted(key[skip:].removesuffix(".json") for key in self._list(f"records/{folder}/"))

    def history(self, stage: str, spec_name: str) -> dict[str, Any] | None:
        return self.read_json(f"history/{spec_name}/{stage}")

    def remember(self, spec_name: str, manifest: Manifest) -> None:
        record = next_history(self.history(manifest.stage, spec_name), manifest)
        if record:
            self.write_json(f"history/{spec_name}/{manifest.stage}", record)

    # -- inside ------------------------------------------------------------------------------------------------------
    def _artifact_key(self, manifest: Manifest) -> str:
        return f"{self._prefix}artifacts/{manifest.stage}/{manifest.dirname}"

    def _manifest_key(self, stage: str, name: str) -> str:
        return f"{self._prefix}artifacts/{stage}/{name}/{MANIFEST}"

    def _remote(self, stage: str, name: str) -> Manifest | None:
        key = self._manifest_key(stage, name)
        found = self._get(key)
        return Manifest.from_json(found, f"s3://{self._bucket}/{key}") if found is not None else None

    def _read_manifest(self, key: str) -> Manifest:
        found = self._get(key)
        if found is None:
            raise StoreError("the artifact went away", f"s3://{self._bucket}/{key}", "run again: it will be rebuilt")
        return Manifest.from_json(found, f"s3://{self._bucket}/{key}")

    def _kept(self, manifest: Manifest) -> Manifest | None:
        """A verdict that failed, if this machine has it: not a hit, but still what the report is about."""
        return manifest if (self.local.folder(manifest) / MANIFEST).exists() else None

    def _pull_provenance(self, manifest: Manifest, workdir: Path) -> None:
        (workdir / PROVENANCE).mkdir(exist_ok=True)
        for key in self._list(f"artifacts/{manifest.stage}/{manifest.dirname}/{PROVENANCE}/"):
            (workdir / PROVENANCE / key.rpartition("/")[2]).write_bytes(self._get(key) or b"")

    def _list(self, folder: str) -> list[str]:
        with s3_errors(self.uri):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=f"{self._prefix}{folder}"
            )
            return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def _get(self, key: str) -> bytes | None:
        with s3_errors(f"s3://{self._bucket}/{key}"):
            try:
                body: bytes = self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
            except aws.ClientError as error:
                if is_absent(error):
                    return None
                raise
        return body

    def _put(self, key: str, body: bytes) -> None:
        with s3_errors(f"s3://{self._bucket}/{key}"):
            self._client.put_object(Bucket=self._bucket, Key=key, Body=body)

    def _put_first(self, key: str, body: bytes) -> bool:
        with s3_errors(f"s3://{self._bucket}/{key}"):
            try:
                self._client.put_object(Bucket=self._bucket, Key=key, Body=body, IfNoneMatch="*")
            except aws.ClientError as error:
                if is_lost_race(error):
                    return False
                raise
        return True

    def _delete_object(self, key: str) -> None:
        with s3_errors(f"s3://{self._bucket}/{key}"):
            self._client.delete_object(Bucket=self._bucket, Key=key)
