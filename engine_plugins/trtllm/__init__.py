"""TensorRT-LLM's PyTorch backend behind the same spec: its versioned contract, the spec rendered for it, the front that
makes trtllm-serve a slot of a deployment, and the plugin package that carries our ops into its processes.

What it refuses to be: an import of tensorrt_llm. Everything here runs where there is no GPU.
Run it: `kilotok plan specs/llama4-maverick-b200.yaml --json` shows the rendered arguments.
"""

# MPI workers are given only the variables of their parent that start with TRTLLM or TLLM.
PLUGINS_ENV = "TLLM_KILOTOK_PLUGINS"  # ops to graft, separated by commas
EVIDENCE_ENV = "TLLM_KILOTOK_EVIDENCE"  # folder where each process says what is live in it
