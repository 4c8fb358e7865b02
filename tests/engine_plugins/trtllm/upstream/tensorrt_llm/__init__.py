"""A stand-in for TensorRT-LLM: the names, signatures and registries that our adapter meets, with plain torch inside.

Derived from what was read of upstream's interfaces. It refuses to be an engine: its attention hands the values on.
Used by tests/engine_plugins/trtllm; its parent folder goes on sys.path.
"""

import os

__version__ = os.environ.get("KILOTOK_STUB_VERSION", "1.2.1")
