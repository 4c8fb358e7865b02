"""The native engine: Llama 4 text decoder + EAGLE-3 on CPU. Run: `python -m engine_plugins.native.server --bundle
DIR`."""
