"""TensorRT-LLM's PyTorch backend behind the same spec: its versioned contract, and the spec rendered for it.

What it refuses to be: an import of tensorrt_llm. Everything here runs where there is no GPU.
Run it: `kilotok plan specs/llama4-maverick-b200.yaml --json` shows the rendered arguments.
"""
