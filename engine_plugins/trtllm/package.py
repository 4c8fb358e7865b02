"""The plugin package: this repository's ops and adapter as a wheel that registers itself wherever tensorrt_llm is used.

The 8 ranks of a server are MPI processes of their own, which get `sys.path` and variables named TRTLLM* or TLLM* from
their parent and nothing that a flag imported there. So the wheel brings a `.pth` file: every Python process of that
environment looks, at start, whether it is one of ours. Unpacked into a bundle's `site/` the same files do it through
`sitecustomize`, for an image that nobody rebuilds.

It refuses to hold torch or a compiler's output of another machine, and to share an environment with kilotok itself:
both would be called `engine_plugins`.

Run it: `python -m engine_plugins.trtllm.package OUT` writes the wheel; infra/trtllm/Dockerfile installs it.
"""

from __future__ import annotations

import base64
import hashlib
import sys
import zipfile
from pathlib import Path

from engine_plugins.trtllm import PLUGINS_ENV

ROOT = Path(__file__).resolve().parents[2]
NAME, VERSION = "kilotok_trtllm", "0.1.0"
PATTERNS = (
    "specs/__init__.py",
    "specs/errors.py",
    "specs/digest.py",
    "engine_plugins/__init__.py",
    "engine_plugins/contract.py",
    "engine_plugins/native/__init__.py",
    "engine_plugins/native/admission.py",
    "engine_plugins/ops/**/*.py",
    "engine_plugins/ops/**/*.cu",
    "engine_plugins/ops/**/*.cuh",
    "engine_plugins/ops/**/*.h",
    *(
        f"engine_plugins/trtllm/{name}.py"
        for name in ("__init__", "adapter", "front", "hook", "placeholders", "relay", "seats")
    ),
)
HOOK = f"import os; {PLUGINS_ENV!r} in os.environ and __import__('engine_plugins.trtllm.hook').trtllm.hook.install()\n"
# A folder on PYTHONPATH reads no .pth file. Ours must not hide a sitecustomize that the image has.
SITECUSTOMIZE = f'''"""Runs at the start of every Python process with this folder on its path. Written by kilotok."""

import importlib.machinery
import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))
_rest = [path for path in sys.path if os.path.abspath(path or ".") != _here]
_spec = importlib.machinery.PathFinder.find_spec("sitecustomize", _rest)
if _spec and _spec.origin:
    exec(compile(open(_spec.origin).read(), _spec.origin, "exec"), {{"__name__": "sitecustomize"}})
{HOOK}'''
_TIMESTAMP = (1980, 1, 1, 0, 0, 0)  # the same files are the same wheel


def files(root: Path = ROOT) -> dict[str, bytes]:
    """Archive name -> content of everything the package holds."""
    found = {path for pattern in PATTERNS for path in root.glob(pattern) if "__pycache__" not in path.parts}
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(found)}


def build_wheel(folder: Path, root: Path = ROOT) -> Path:
    """Write the wheel; its version carries a digest of its content. Returns its path."""
    content = files(root)
    digest = hashlib.sha256(b"".join(name.encode() + data for name, data in content.items())).hexdigest()[:12]
    version = f"{VERSION}+{digest}"
    info = f"{NAME}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: kilotok-trtllm\nVersion: {version}\nSummary: Fused ops for Llama 4\n"
    content |= {
        f"{NAME}.pth": HOOK.encode(),
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: kilotok\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in content.items()]
    content[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,", ""]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{NAME}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in content.items():
            entry = zipfile.ZipInfo(name, _TIMESTAMP)
            entry.external_attr = 0o644 << 16
            wheel.writestr(entry, data)
    return path


def unpack(wheel: Path, site: Path) -> None:
    """The wheel's modules as a folder for PYTHONPATH."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE)


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    print(build_wheel(Path(sys.argv[1])))
