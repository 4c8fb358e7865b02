"""The spec's `engine:` section as TensorRT-LLM wants it: arguments YAML, `trtllm-serve` argv, environment.

What it is: a pure function of the spec and the version's contract. Paths and addresses are placeholders that the deploy
step fills in, so that a bundle can be moved.
What it refuses to be: lenient. An option the version does not know, says twice or would ignore stops the plan.
Run it: `kilotok plan specs/llama4-maverick-b200.yaml --json`, under `engine.rendered`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from engine_plugins.trtllm.contract import Complaint, Contract, complaints, contract_for, env_complaints
from engine_plugins.trtllm.placeholders import filled
from engine_plugins.trtllm.seats import SEATS
from specs.errors import SpecError
from specs.schema import Spec

CHECKPOINT, DRAFT, ARGS, HOST, PORT = "{checkpoint}", "{draft}", "{args}", "{host}", "{port}"


@dataclass(frozen=True)
class Rendered:
    """How to start the server; {checkpoint}, {draft}, {args}, {host} and {port} stand for what deploy knows."""

    args_yaml: dict[str, Any]
    argv: list[str]
    env: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for plans and bundles."""
        return asdict(self)

    def resolve(self, **values: str) -> Rendered:
        """The same with the placeholders named in `values` filled in."""
        return Rendered(*(filled(part, values) for part in (self.args_yaml, self.argv, self.env)))


def render(spec: Spec | dict[str, Any], version: str | None = None) -> Rendered:
    """Render a spec (or the slice of one that has `engine` and `draft`) for its version, or for `version`."""
    plain = spec.to_dict() if isinstance(spec, Spec) else spec
    engine = plain["engine"]
    if engine["backend"] != "trtllm":
        raise SpecError(
            "only backend trtllm is rendered", "engine.backend", "use backend: trtllm", key="engine.backend"
        )
    wanted = version or engine["version"]
    contract = contract_for(wanted)
    for section, complaint in _all_complaints(contract, engine, wanted):
        raise _refusal(spec, section, complaint)
    seated = {op for op, _ in SEATS.values()}
    for op in engine["plugins"]:
        if op not in seated:
            what = f"{op} has no place in TensorRT-LLM, which has its own"
            raise _refusal(spec, "plugins", Complaint((), what, f"use any of {', '.join(sorted(seated))}", op))
    flags: list[str] = []
    options = _split(contract, contract.fields, engine["options"], flags)
    arguments = {**options, **_speculation(contract, plain)}
    return Rendered(arguments, _argv(contract, engine, flags), dict(sorted(engine.get("env", {}).items())))


def _all_complaints(contract: Contract, engine: dict[str, Any], version: str) -> Iterator[tuple[str, Complaint]]:
    yield from (("options", one) for one in complaints(contract, engine["options"], version))
    yield from (("env", one) for one in env_complaints(contract, engine.get("env", {}), version))
    yield from (("options", one) for one in _contradictions(engine))


def _contradictions(engine: dict[str, Any]) -> Iterator[Complaint]:
    """Rules between fields: upstream's validators, and combinations it would accept and ignore."""
    options, tensor, expert = engine["options"], engine["tensor_parallel"], engine["expert_parallel"]
    batch, draft = engine["max_batch_size"], engine["draft_tokens"]
    graphs = options.get("cuda_graph_config") or {}
    sizes, largest = graphs.get("batch_sizes"), graphs.get("max_batch_size", 0)
    graph = "cuda_graph_config"
    if sizes and largest not in (0, max(sizes)):
        yield Complaint(
            (graph, "batch_sizes"),
            f"{graph}.max_batch_size is {largest}, max(batch_sizes) {max(sizes)}",
            "make them equal",
        )
    if max(largest, *(sizes or [0])) > batch:
        what = f"{graph} goes up to {max(largest, *(sizes or [0]))}, engine.max_batch_size to {batch}"
        yield Complaint((graph,), what, "lower the one or raise the other")
    if (options.get("max_num_tokens") or 8192) < batch * (draft + 1):
        what = f"max_num_tokens is below the {batch * (draft + 1)} tokens of one full step"
        yield Complaint(("max_num_tokens",), what, "raise it, or lower engine.max_batch_size")
    if options.get("enable_min_latency") and options.get("enable_attention_dp"):
        yield Complaint(
            ("enable_min_latency",), "enable_min_latency has no effect with enable_attention_dp", "keep one"
        )
    if options.get("enable_min_latency") and expert != 1:
        what = "enable_min_latency needs engine.expert_parallel 1"
        yield Complaint(("enable_min_latency",), what, f"found {expert}; its MoE kernel is for tensor parallel only")
    experts = options.get("moe_tensor_parallel_size")
    if experts and experts * expert != tensor:
        what = f"moe_tensor_parallel_size {experts} x expert_parallel {expert} is not tensor_parallel {tensor}"
        yield Complaint(("moe_tensor_parallel_size",), what, "drop it: it follows from the other two")
    yield from _speculation_contradictions(options.get("speculative_config") or {}, draft)


def _speculation_contradictions(config: dict[str, Any], draft: int) -> Iterator[Complaint]:
    path = "speculative_config"
    if config and not draft:
        yield Complaint((path,), "speculative_config has no effect with engine.draft_tokens 0", "drop it")
    if config.get("use_dynamic_tree") and not config.get("dynamic_tree_max_topK"):
        yield Complaint((path, "use_dynamic_tree"), "use_dynamic_tree needs dynamic_tree_max_topK", "set it above 0")
    if config.get("use_dynamic_tree"):
        what = "use_dynamic_tree is not proven with Llama 4's chunked attention"
        yield Complaint((path, "use_dynamic_tree"), what, "drop it: drafts are chains")
    schedule = {int(key): value for key, value in (config.get("draft_len_schedule") or {}).items()}
    if schedule and (schedule.get(1) != draft or max(schedule.values()) > draft or min(schedule.values()) < 0):
        what = f"draft_len_schedule must start with 1: {draft} (engine.draft_tokens) and never exceed it"
        yield Complaint((path, "draft_len_schedule"), what, f"such as {{1: {draft}, 8: 0}}")


def _split(
    contract: Contract, rules: dict[str, dict[str, Any]], options: dict[str, Any], flags: list[str]
) -> dict[str, Any]:
    """Options for the YAML; those with a flag of their own go to `flags` instead (the YAML would override the flag)."""
    kept: dict[str, Any] = {}
    for name, value in options.items():
        rule = rules[name]
        model = next((arm for arm in rule["type"].split("|") if arm in contract.models), None)
        if "cli" in rule:
            flags += _flag(rule["cli"], value)
        elif model and value:
            inner = _split(contract, contract.models[model], value, flags)
            kept.update({name: inner} if inner else {})
        else:
            kept[name] = value
    return kept


def _flag(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag] if value else []
    return [] if value is None else [flag, str(value)]


def _speculation(contract: Contract, plain: dict[str, Any]) -> dict[str, Any]:
    engine = plain["engine"]
    draft = plain.get("draft") or {}
    if not engine["draft_tokens"]:
        return {}
    spelling = contract.spellings
    asked = dict(engine["options"].get("speculative_config") or {})
    if "draft_len_schedule" in asked:
        asked["draft_len_schedule"] = {int(key): value for key, value in asked["draft_len_schedule"].items()}
    config: dict[str, Any] = {"decoding_type": spelling["decoding_type"], "max_draft_len": engine["draft_tokens"]}
    config["speculative_model_dir"] = DRAFT  # the name that every version accepts
    if spelling["one_model"] == "explicit":
        config["eagle3_one_model"] = True
    if draft.get("capture_layers"):
        config["eagle3_layers_to_capture"] = list(draft["capture_layers"])
    return {"speculative_config": {**config, **asked}}


def _argv(contract: Contract, engine: dict[str, Any], flags: list[str]) -> list[str]:
    own = {
        "--host": HOST,  # trtllm-serve binds to localhost unless told otherwise
        "--port": PORT,
        "--tp_size": engine["tensor_parallel"],
        "--ep_size": engine["expert_parallel"],
        "--max_batch_size": engine["max_batch_size"],
        "--max_seq_len": engine["max_seq_len"],
    }
    head = ["trtllm-serve", CHECKPOINT]
    return [
        *head,
        *(str(part) for pair in own.items() for part in pair),
        *flags,
        contract.spellings["config_flag"],
        ARGS,
    ]


def _refusal(spec: Spec | dict[str, Any], section: str, complaint: Complaint) -> SpecError:
    key = ".".join(("engine", section, *complaint.path))
    place = spec.where(key) if isinstance(spec, Spec) else key
    return SpecError(complaint.what, place, complaint.fix, key=key, value=complaint.value, rule=complaint.what)
