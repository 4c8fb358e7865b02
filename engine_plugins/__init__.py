"""Fused operators, the native engine that hosts them, and the TensorRT-LLM adapter. Run: `python -m
engine_plugins.native.bench`."""
