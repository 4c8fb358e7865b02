"""Where checkpoints come from: folders, buckets and hubs, behind one small interface; and the lock made from them.

What it is: `open_source(uri)` lists files with sizes (and hashes, where the source knows them) and streams any file
from any byte. `make_lock` resolves a branch to a commit and puts a sha256 to every file.
What it refuses to be: a cache, or a reader of pickles. Weights are safetensors; anything else is refused by name.
Run it: `kilotok lock SPEC`. Hubs answer at HF_ENDPOINT, buckets at AWS_ENDPOINT_URL, as their own clients do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from specs.errors import InputError, IntegrityError, LockError, NetworkError
from specs.lock import FileLock, Lock, data_uris
from specs.schema import Spec
from tasks.edges.secrets import resolve_secret

PIECE_BYTES = 1 << 18  # in the cache of its core; from 1 MiB on, malloc maps each piece anew, which halves the speed
INDEX_FILE = "model.safetensors.index.json"
# Formats that can run code when they are read, or that hold weights in a form we do not check.
_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".npy", ".npz", ".joblib", ".gguf")


@dataclass(frozen=True)
class RemoteFile:
    """A file as its source describes it; sha256 is "" where the source does not know it."""

    size: int
    sha256: str = ""


class Source(Protocol):
    """A set of files at one place and one revision."""

    uri: str

    def revision(self) -> str:
        """The commit, or "" where there is no such thing."""
        ...

    def list(self) -> dict[str, RemoteFile]:
        """Path -> file."""
        ...

    def read(self, path: str, start: int = 0) -> Iterator[bytes]:
        """The bytes of a file from `start` on, in pieces."""
        ...


def open_source(uri: str, root: Path, revision: str = "", token: str | None = None) -> Source:
    """The source behind a URI; `root` is what `file:` paths are relative to, `token` a reference."""
    if uri.startswith("file:"):
        return FolderSource(uri, root / uri.removeprefix("file://").removeprefix("file:"))
    if uri.startswith("s3://"):
        return BucketSource(uri)
    if uri.startswith("hf://"):
        return HubSource(uri, revision, token)
    raise InputError(f"cannot read from {uri}", uri, "use hf://ORG/NAME, s3://BUCKET/PREFIX or file:PATH")


def open_file(uri: str, root: Path, token: str | None = None) -> tuple[Source, str]:
    """The source and the path inside it for the URI of one data file (prompts, problems)."""
    head, _, name = uri.rpartition("/")
    if uri.startswith("hf://"):
        parts = uri.removeprefix("hf://").split("/")
        ids = 3 if parts[0] == "datasets" else 2
        if len(parts) <= ids:
            raise InputError("names a repository, not a file", uri, "write hf://datasets/ORG/NAME/FILE.jsonl")
        repository, _, revision = "/".join(parts[:ids]).partition("@")  # NAME@COMMIT stays when the branch moves
        return HubSource(f"hf://{repository}", revision or "main", token), "/".join(parts[ids:])
    if uri.startswith("file:") and not head:
        head, name = "file:.", uri.removeprefix("file:")
    return open_source(head, root), name


# ---------------------------------------------------------------- the lock


def make_lock(spec: Spec, progress: Callable[..., None]) -> Lock:
    """Resolve the spec's source now: its commit, and sha256 and size of every file and data file."""
    model = spec.model
    source = open_source(model.source, spec.root, model.revision, model.token)
    files = select(source.list(), model.files)
    check_names(files, model.source)
    total = sum(entry.size for entry in files.values() if not entry.sha256)
    hashed = _hash_unknown(source, files, lambda done, path: progress(done, total, f"hashing {path}"))
    check_shards(files, lambda: b"".join(source.read(INDEX_FILE)), model.source)
    data = {}
    for uri in data_uris(spec):
        opened, path = open_file(uri, spec.root, model.token)
        progress.note(f"hashing {uri}")  # type: ignore[attr-defined]
        data[uri] = _hash(opened, path, lambda count: None)
    return Lock(model.source, source.revision(), model.revision, model.files, hashed, data)


def select(files: dict[str, RemoteFile], globs: Any) -> dict[str, RemoteFile]:
    """The files that match one of the globs; all of them without globs. Hidden files never count."""
    visible = {path: file for path, file in files.items() if not any(part[0] == "." for part in path.split("/"))}
    if globs is None:
        return visible
    return {path: file for path, file in visible.items() if any(fnmatch(path, glob) for glob in globs)}


def check_names(files: Any, where: str) -> None:
    """Refuse a file set without safetensors, without config.json, or with weights in a format that can run code."""
    unsafe = sorted(path for path in files if PurePosixPath(path).suffix.lower() in _UNSAFE)
    if unsafe:
        fix = "list what you want in model.files, such as ['*.json', '*.safetensors', '*.jinja']"
        raise InputError(f"{unsafe[0]} is not safetensors, and such files can run code", where, fix)
    if not any(path.endswith(".safetensors") for path in files):
        raise InputError("no safetensors file in the source", where, "check model.source, model.revision, model.files")
    if "config.json" not in files:
        raise InputError("no config.json in the source", where, "check model.source, model.revision, model.files")


def check_shards(files: Any, read_index: Callable[[], bytes], where: str) -> None:
    """Refuse a file set whose index names a shard that is not in it."""
    if INDEX_FILE not in files:
        return
    try:
        shards = set(json.loads(read_index())["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise IntegrityError(f"{INDEX_FILE} is broken: {error}", where, "fetch the checkpoint again") from error
    missing = sorted(shards - set(files))
    if missing:
        what = f"shard {missing[0]} is missing ({len(missing)} of {len(shards)})"
        raise IntegrityError(what, where, "restore it, or widen model.files")


def _hash_unknown(
    source: Source, files: dict[str, RemoteFile], tell: Callable[[int, str], None]
) -> dict[str, FileLock]:
    done = 0

    def one(path: str) -> FileLock:
        def count(size: int) -> None:
            nonlocal done  # a lost update would only misdraw the bar
            done += size
            tell(done, path)

        known = files[path]
        return FileLock(known.sha256, known.size) if known.sha256 else _hash(source, path, count)

    with ThreadPoolExecutor(8) as pool:
        paths = sorted(files)
        return dict(zip(paths, pool.map(one, paths), strict=True))


def _hash(source: Source, path: str, count: Callable[[int], None]) -> FileLock:
    digest, size = hashlib.sha256(), 0
    for piece in source.read(path):
        digest.update(piece)
        size += len(piece)
        count(len(piece))
    return FileLock(digest.hexdigest(), size)


# ---------------------------------------------------------------- the sources


class FolderSource:
    """`file:PATH`: a folder on this machine."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri, self.folder = uri, folder

    def revision(self) -> str:
        return ""

    def list(self) -> dict[str, RemoteFile]:
        if not self.folder.is_dir():
            raise InputError("no such folder", f"{self.uri} ({self.folder})", "check model.source")
        found = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}
        return {name: RemoteFile(path.stat().st_size) for name, path in sorted(found.items())}

    def read(self, path: str, start: int = 0) -> Iterator[bytes]:
        try:
            with open(self.folder / path, "rb") as stream:
                stream.seek(start)
                while piece := stream.read(PIECE_BYTES):
                    yield piece
        except FileNotFoundError:
            raise _gone(path, self.uri) from None
        except PermissionError:
            raise InputError(f"{path} cannot be read", self.uri, "change its permissions") from None


class BucketSource:
    """`s3://BUCKET/PREFIX`: objects below a prefix."""

    def __init__(self, uri: str) -> None:
        import boto3  # imported late: `kilotok plan` must not pay for it
        from botocore.config import Config

        self.uri = uri
        self.bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        self.prefix = prefix.rstrip("/") + "/" if prefix.rstrip("/") else ""
        retries: Any = {"max_attempts": 5, "mode": "standard"}
        self.client = boto3.client("s3", config=Config(retries=retries, max_pool_connections=32))

    def revision(self) -> str:
        return ""

    def list(self) -> dict[str, RemoteFile]:
        found: dict[str, RemoteFile] = {}
        with _bucket_errors(self.uri):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
            for page in pages:
                for item in page.get("Contents", []):
                    name = item["Key"][len(self.prefix) :]
                    if name and not name.endswith("/"):
                        found[name] = RemoteFile(item["Size"])
        if not found:
            raise InputError("no objects below this prefix", self.uri, "check model.source")
        return dict(sorted(found.items()))

    def read(self, path: str, start: int = 0) -> Iterator[bytes]:
        with _bucket_errors(f"{self.uri} {path}"):
            span = {"Range": f"bytes={start}-"} if start else {}
            body = self.client.get_object(Bucket=self.bucket, Key=self.prefix + path, **span)["Body"]
            yield from body.iter_chunks(PIECE_BYTES)


class HubSource:
    """`hf://ORG/NAME` (or `hf://datasets/ORG/NAME`): a repository of a hub, at a commit."""

    def __init__(self, uri: str, revision: str, token: str | None) -> None:
        self.uri, self.asked = uri, revision or "main"
        parts = uri.removeprefix("hf://").split("/")
        self.kind = "dataset" if parts[0] == "datasets" else "model"
        self.repo = "/".join(parts[1:] if self.kind == "dataset" else parts)
        if self.repo.count("/") != 1:
            raise InputError("not a repository", uri, "write hf://ORG/NAME")
        self.token = resolve_secret(token)
        self._info: Any = None

    def revision(self) -> str:
        return str(self._describe().sha)

    def list(self) -> dict[str, RemoteFile]:
        found: dict[str, RemoteFile] = {}
        for entry in self._describe().siblings or []:
            large = entry.lfs
            size = large.size if large else entry.size
            found[entry.rfilename] = RemoteFile(int(size or 0), large.sha256 if large else "")
        return dict(sorted(found.items()))

    def read(self, path: str, start: int = 0) -> Iterator[bytes]:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        # hf_hub_download starts a broken transfer from zero in another process; a plain range does not.
        url = hf_hub_url(self.repo, path, repo_type=self.kind, revision=self.asked, endpoint=_endpoint())
        headers = {**build_hf_headers(token=self.token), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        stream = get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=60)
        with _hub_errors(f"{self.uri} {path}"), stream as response:
            hf_raise_for_status(response)
            if start and response.status_code != 206:
                raise NetworkError("the hub ignored the byte range", f"{self.uri} {path}", "run again")
            yield from response.iter_bytes()  # as they arrive: what was received before a break counts

    def _describe(self) -> Any:
        from huggingface_hub import HfApi

        if self._info is None:
            with _hub_errors(f"{self.uri}@{self.asked}"):
                api = HfApi(endpoint=_endpoint(), token=self.token)
                self._info = api.repo_info(self.repo, repo_type=self.kind, revision=self.asked, files_metadata=True)
        return self._info


def _endpoint() -> str | None:
    """HF_ENDPOINT as it is now; huggingface_hub itself reads it only once, at import."""
    return os.environ.get("HF_ENDPOINT")


def _gone(path: str, uri: str) -> IntegrityError:
    return IntegrityError(f"{path} is missing in the source", uri, "restore it, or run: kilotok lock SPEC")


@contextmanager
def _bucket_errors(where: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except NoCredentialsError:
        raise InputError("no AWS credentials", where, "log in, or set AWS_ACCESS_KEY_ID and its secret") from None
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code in ("NoSuchKey", "404"):
            raise IntegrityError("missing in the bucket", where, "restore it, or run: kilotok lock SPEC") from None
        if code in ("NoSuchBucket", "AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
            raise InputError(
                f"the bucket refuses: {code}", where, "check the bucket's name and your credentials"
            ) from None
        raise NetworkError(f"the bucket failed: {code}", where, "run again") from error
    except (BotoCoreError, OSError) as error:
        raise NetworkError(f"the bucket did not answer: {type(error).__name__}", where, "run again") from error


@contextmanager
def _hub_errors(where: str) -> Iterator[None]:
    from httpx import HTTPError
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise InputError("the repository is gated", where, "accept its licence on the hub and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise LockError("no such revision", where, "check model.revision, then: kilotok lock SPEC") from None
    except errors.RepositoryNotFoundError:
        raise InputError("no such repository, or not for you", where, "check model.source; set HF_TOKEN") from None
    except errors.EntryNotFoundError:
        raise IntegrityError("missing in the repository", where, "run: kilotok lock SPEC") from None
    except (errors.HfHubHTTPError, HTTPError, OSError) as error:
        raise NetworkError(f"the hub did not answer: {type(error).__name__}", where, "run again") from error
