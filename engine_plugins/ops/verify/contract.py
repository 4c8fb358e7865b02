"""Contract of verify: greedy exact match, or rejection sampling whose output follows the target's distribution.

What it refuses to be: tree verification. Run it: `python -m engine_plugins.native.bench --ops`.
"""

from engine_plugins.contract import Axis, OpContract

CONTRACT = OpContract(
    name="verify",
    does="accept/reject k drafts, next token",
    axes={"k": Axis(0, 15), "V": Axis(2, 1 << 20)},
    inputs={"p_KV": "target probabilities, k+1 rows", "q_KV": "draft probabilities, k rows", "draft_K": "int"},
    outputs={"tokens": "accepted drafts and one more"},
    notes="Leviathan et al. 2023, algorithm 1, for a chain",
    gpu_axes={"k": Axis(0, 7)},
)
