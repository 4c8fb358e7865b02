"""Statements beside every artifact, for other tools: SLSA v1 in-toto provenance, a CycloneDX SBOM, a signature.

Refuses to make up a format (Statement v1, DSSE and CycloneDX 1.6 as published) and to sign with a key that others can
read. A key is configured by `KILOTOK_SIGNING_KEY`, the path of an Ed25519 private key in PEM; public keys that this
project trusts are committed as `specs/keys/*.pem`. Make a pair: `openssl genpkey -algorithm ed25519`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from specs.errors import InputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from tasks.store.manifest import Manifest

STATEMENT, SBOM, ENVELOPE = "slsa.json", "sbom.cdx.json", "slsa.dsse.json"
KEY_VARIABLE = "KILOTOK_SIGNING_KEY"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
_BUILD_TYPE = "urn:kilotok:stage:v1"


def write_statements(manifest: Manifest, folder: Path, store_uri: str) -> None:
    """Leave the statements in `folder`; signed when a key is configured."""
    folder.mkdir(parents=True, exist_ok=True)
    statement = canonical(slsa_statement(manifest, store_uri))
    (folder / STATEMENT).write_bytes(statement)
    (folder / SBOM).write_bytes(canonical(cyclonedx(manifest)))
    (folder / ENVELOPE).unlink(missing_ok=True)
    if key := signing_key():
        (folder / ENVELOPE).write_bytes(canonical(sign(statement, key)))


def canonical(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def slsa_statement(manifest: Manifest, store_uri: str) -> dict[str, Any]:
    """Who made which bytes from which inputs with which parameters."""
    made = manifest.provenance
    parts = manifest.components
    dependencies: list[dict[str, Any]] = [
        {"name": name, "uri": uri, "digest": {"sha256": parts[f"input.{name}"]}}
        for name, uri in sorted(manifest.inputs.items())
        if f"input.{name}" in parts
    ]
    if commit := (made.get("git") or {}).get("commit"):
        dependencies.append({"name": "source", "digest": {"gitCommit": commit}})
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [
            {"name": f"{manifest.stage}/{manifest.dirname}", "digest": {"sha256": manifest.digest}},
            *({"name": file.path, "digest": {"sha256": file.sha256}} for file in manifest.files),
        ],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": _BUILD_TYPE,
                "externalParameters": {"stage": manifest.stage, "spec": made.get("spec", {})},
                "internalParameters": {"key": manifest.key, "components": parts, "git": made.get("git", {})},
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {"id": f"urn:kilotok:store:{store_uri}", "version": {"python": made.get("python", "")}},
                "metadata": {"invocationId": " ".join(made.get("argv", [])), "finishedOn": manifest.created},
                "byproducts": [{"name": "manifest", "digest": {"sha256": manifest.seal}}],
            },
        },
    }


def cyclonedx(manifest: Manifest) -> dict[str, Any]:
    """The artifact as a component and every installed distribution as another."""
    packages = manifest.provenance.get("packages", {})
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "serialNumber": f"urn:uuid:{uuid.UUID(bytes=bytes.fromhex(manifest.digest)[:16], version=4)}",
        "metadata": {
            "timestamp": manifest.created,
            "component": {
                "type": "machine-learning-model",
                "bom-ref": "artifact",
                "name": manifest.stage,
                "version": manifest.key,
                "hashes": [{"alg": "SHA-256", "content": manifest.digest}],
            },
        },
        "components": [
            {"type": "library", "name": name, "version": version, "purl": _purl(name, version)}
            for name, version in packages.items()
        ],
    }


def _purl(name: str, version: str) -> str:
    """As the package-url specification spells it for this ecosystem: lower case, dashes."""
    return f"pkg:pypi/{name.lower().replace('_', '-')}@{quote(version)}"


# -- signatures (DSSE) -----------------------------------------------------------------------------------------------
def signing_key() -> Ed25519PrivateKey | None:
    """The configured key, None without one; refused here, before any work, if it cannot or must not be used."""
    if not (name := os.environ.get(KEY_VARIABLE)):
        return None
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    path, fix = Path(name), f"point {KEY_VARIABLE} to an Ed25519 private key in PEM, readable by you alone"
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"cannot sign: {type(error).__name__}: {error}", name, fix) from error
    if mode & 0o077:
        raise InputError("cannot sign: others can read the private key", name, "chmod 600")
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError("cannot sign: not an Ed25519 key", name, fix)
    return key


def sign(payload: bytes, key: Ed25519PrivateKey) -> dict[str, Any]:
    """A DSSE envelope with one Ed25519 signature."""
    signature = {"keyid": key_id(key.public_key().public_bytes_raw()), "sig": _base64(key.sign(_to_sign(payload)))}
    return {"payloadType": PAYLOAD_TYPE, "payload": _base64(payload), "signatures": [signature]}


def check_signature(folder: Path, trusted: Iterable[Path]) -> str:
    """ "" when a trusted key signed the statement in `folder` as it stands; else what is wrong with it."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        envelope = json.loads((folder / ENVELOPE).read_bytes())
        payload = base64.b64decode(envelope["payload"])
        found = {entry["keyid"]: base64.b64decode(entry["sig"]) for entry in envelope["signatures"]}
    except FileNotFoundError:
        return "not signed"
    except (OSError, ValueError, KeyError, TypeError):
        return "the signature's envelope is damaged"
    if envelope.get("payloadType") != PAYLOAD_TYPE or payload != (folder / STATEMENT).read_bytes():
        return "the statement is not the one that was signed"
    keys = [load_pem_public_key(path.read_bytes()) for path in trusted]
    known = {key_id(key.public_bytes_raw()): key for key in keys if isinstance(key, Ed25519PublicKey)}
    for name in set(found) & set(known):
        try:
            known[name].verify(found[name], _to_sign(payload))
        except InvalidSignature:
            return f"bad signature of key {name[:16]}"
        return ""
    return f"signed by a key that is not trusted ({', '.join(name[:16] for name in found) or 'none'})"


def trusted_keys(root: Path) -> list[Path]:
    return sorted((root / "specs" / "keys").glob("*.pem"))


def key_id(public: bytes) -> str:
    return hashlib.sha256(public).hexdigest()


def _to_sign(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
