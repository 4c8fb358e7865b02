"""What a spec may say: every section, field, unit, limit and default, as frozen pydantic models.

What it is: the only definition of the spec. `kilotok schema` and docs/spec.md are generated from it.
What it refuses to be: lenient. Unknown keys and wrong types do not get past it, and it resolves nothing:
`${env:NAME}` and `prefect://secret/NAME` stay references until an edge uses them.
Run it: `kilotok schema`, or `python -m specs.reference` for docs/spec.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from specs import rules
from specs.rules import Section, measured, section
from specs.validation import Validation

Positive = Annotated[int, Field(ge=1)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]


class Model(Section):
    """The checkpoint to serve, and where it comes from."""

    source: Annotated[str, rules.SOURCE] = Field(
        description="Checkpoint in Hugging Face format: `hf://ORG/NAME`, `s3://BUCKET/PREFIX` or `file:PATH`."
    )
    revision: str = Field("main", min_length=1, description="Branch, tag or commit of a hub; `kilotok lock` pins it.")
    files: Strings | None = Field(
        None, description="Globs of the files to take; null takes all of them. Weights must be safetensors."
    )
    token: Annotated[str, rules.SECRET_REFERENCE] | None = Field(
        None, description="Hub token as a reference; null uses the machine's own login."
    )


class Calibration(Section):
    """The text that sets the scales of the activations."""

    dataset: Annotated[str, rules.SOURCE] = Field(description="JSONL of prompts: `file:`, `s3://` or `hf://`.")
    samples: Positive = measured(512, "prompts", "Prompts to run.")
    sequence_length: Positive = measured(2048, "tokens", "Longest prompt.")
    batch_size: Positive = measured(8, "prompts", "Prompts per forward pass.")


class Quantize(Section):
    """From BF16 to FP8 through nvidia-modelopt."""

    recipe: Annotated[str, rules.RECIPE] = Field(
        "general/ptq/fp8_default-kv_fp8",
        description="modelopt's recipe: its name in modelopt's library, or `file:PATH` of a YAML of your own.",
    )
    calibration: Calibration = Field(description="What the scales are calibrated on.")
    max_divergence: float | None = measured(
        None,
        "nats/token",
        "KL to BF16 at which no more layers are kept in BF16, the ones that cost most per byte first; null keeps none.",
        gt=0,
    )


class DraftData(Section):
    """What the draft head learns from."""

    prompts: Annotated[str, rules.SOURCE] = Field(
        description="JSONL of {id, domain, prompt}: `file:`, `s3://`, `hf://datasets/ORG/NAME[@COMMIT]/FILE`."
    )
    samples: Positive = measured(4096, "prompts", "Prompts to answer, spread over the domains.")
    answers: Literal["target"] = Field("target", description="Who answers: the quantized target, as it will be served.")
    max_new_tokens: Positive = measured(256, "tokens", "Longest answer.")


class DraftTraining(Section):
    """How long and how hard the draft head trains."""

    epochs: Positive = measured(2, "epochs", "Passes over the answers.")
    learning_rate: float = Field(1e-4, gt=0, lt=1, description="Peak learning rate of AdamW.")
    batch_size: Positive = measured(8, "sequences", "Sequences per optimizer step.")
    ttt_steps: int = measured(7, "tokens", "Training-time test: draft positions unrolled per step.", ge=1, le=8)
    sequence_length: Positive = measured(4096, "tokens", "Longest training sequence.")
    max_seconds: Positive | None = measured(None, "s", "Wall-clock budget; training stops at the step that exceeds it.")
    seed: int = Field(0, ge=0, description="Seed of initialisation and shuffling.")
    hidden_states_gib: float = measured(
        8.0, "GiB", "Disk for the target's hidden states; what does not fit is computed again each epoch.", ge=0
    )
    warm_start: Annotated[str, rules.ARTIFACT] | None = Field(
        None,
        description="An earlier head to go on from: `last_good`, an artifact's URI, or `train_draft/KEY`; null starts "
        "anew. With `nightly.refresh_draft`, `last_good` makes the refresh a continuation.",
    )


class DraftLaunch(Section):
    """How many processes train the head. They share each batch: their number changes the time, not the head."""

    nodes: Positive = measured(1, "nodes", "Machines; more than one are reached through Slurm's srun.")
    processes_per_node: Positive = measured(
        1, "processes", "Processes on each, an equal share of its GPUs to each; 1 spreads a large target over all."
    )


class Draft(Section):
    """The EAGLE-3 head that guesses the next tokens."""

    method: Literal["eagle3"] = Field("eagle3", description="Drafting method.")
    capture_layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] | None = Field(
        None, description="Three target layers whose OUTPUT the head sees, from 0; null takes {1, n/2-1, n-4} of n."
    )
    target: Literal["source", "quantized"] = Field(
        "source",
        description="Whose hidden states it learns from: the BF16 source's, or the quantized checkpoint's, as served.",
    )
    vocab_size: Positive | None = Field(
        None, description="Draft vocabulary; null takes the target's, a smaller one keeps the most frequent tokens."
    )
    ffn_multiplier: float | None = measured(
        None, "x", "Width of the head's MLP as a multiple of the target's hidden size.", gt=0
    )
    intermediate_size: Positive | None = Field(
        None, description="Width of the head's MLP; null leaves it to `ffn_multiplier`, then to the target's dense MLP."
    )
    data: DraftData = Field(description="What it learns from.")
    training: DraftTraining = section(DraftTraining)
    launch: DraftLaunch = section(DraftLaunch)

    @model_validator(mode="after")
    def _consistent(self) -> Draft:
        layers = self.capture_layers
        if layers is not None and (len(layers) != 3 or list(layers) != sorted(set(layers))):
            raise ValueError("capture_layers are not three different layers in ascending order; such as [1, 23, 44]")
        if self.ffn_multiplier is not None and self.intermediate_size is not None:
            raise ValueError("ffn_multiplier and intermediate_size say the same thing; keep one")
        if (count := self.launch.nodes * self.launch.processes_per_node) > self.training.batch_size:
            raise ValueError(f"launch has {count} processes for a batch of {self.training.batch_size}; take fewer")
        return self


class Engine(Section):
    """What runs the model."""

    backend: Literal["native", "trtllm"] = Field("native", description="kilotok's own engine, or TensorRT-LLM.")
    version: Annotated[str, rules.VERSION] | None = Field(
        None, description="Version of TensorRT-LLM, such as 1.2.1; the native engine has none."
    )
    tensor_parallel: Positive = measured(1, "GPUs", "GPUs that share every layer.")
    expert_parallel: Positive = measured(
        1, "GPUs", "GPUs over which whole experts are spread; divides tensor_parallel."
    )
    draft_tokens: int = measured(3, "tokens", "Tokens guessed per cycle; 0 serves without speculation.", ge=0, le=15)
    parallel_draft: bool = Field(
        False,
        description="One pass of the drafter guesses all tokens (P-EAGLE, DFlash) instead of one pass for each: for "
        "`predict` and `explain` only; no engine here serves such a drafter yet.",
    )
    max_batch_size: Positive = measured(8, "requests", "Requests in flight.")
    max_seq_len: Positive = measured(8192, "tokens", "Prompt plus answer.")
    plugins: Annotated[tuple[Annotated[str, rules.PLUGIN], ...], Field(strict=False)] = Field(
        (), description=f"Fused ops to use: {', '.join(rules.PLUGINS)}."
    )
    gpu_architecture: Literal["sm_90a", "sm_100a"] | None = Field(
        None,
        description="GPU the fused ops are compiled for, Hopper or Blackwell; null compiles them for the CPU only. The "
        "native engine serves from such a GPU where it finds one, else from the CPU.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="TensorRT-LLM arguments, checked against `version`; the native engine takes none.",
    )
    env: dict[str, str] = Field(
        default_factory=dict, description="Environment of the server, checked against `version`; secrets as references."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Engine:
        if self.backend == "trtllm" and self.version is None:
            raise ValueError("backend trtllm needs a version; add `version: 1.2.1`")
        if self.backend == "native" and self.version is not None:
            raise ValueError("version is for trtllm only: the native engine is this repository; drop the key")
        if self.backend == "native" and (self.tensor_parallel, self.expert_parallel) != (1, 1):
            raise ValueError(
                "tensor_parallel and expert_parallel are 1 on the native engine: it runs on one device; drop them"
            )
        if self.backend == "native" and self.options:
            raise ValueError(
                f"options are for trtllm only: the native engine takes none; drop {', '.join(sorted(self.options))}"
            )
        if self.tensor_parallel % self.expert_parallel:
            divisors = [n for n in range(1, self.tensor_parallel + 1) if self.tensor_parallel % n == 0]
            near = min(divisors, key=lambda n: abs(n - self.expert_parallel))
            raise ValueError(
                f"expert_parallel does not divide tensor_parallel {self.tensor_parallel}; use expert_parallel: {near}"
            )
        if len(set(self.plugins)) != len(self.plugins):
            raise ValueError("plugins names an op twice; keep one")
        return self


class Deploy(Section):
    """Where the candidate starts, and how it takes over."""

    to: Literal["process", "docker", "kubernetes"] = Field("process", description="What starts the server.")
    strategy: Literal["blue_green", "drain_swap"] = Field(
        "blue_green", description="`blue_green` when old and new fit in memory together, `drain_swap` when they do not."
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address the endpoint listens on.")
    port: int = Field(8000, ge=1, le=65535, description="Port of the promoted endpoint.")
    image: str | None = Field(
        None, description="Container image, by digest; null takes the TensorRT-LLM release image of `engine.version`."
    )
    start_timeout_s: Positive = measured(120, "s", "From start to healthy.")
    require_signature: bool = Field(False, description="Refuse a bundle that is not signed.")


class Nightly(Section):
    """The scheduled rebuild."""

    cron: Annotated[str, rules.CRON] = Field(description="Five cron fields: minute hour day month weekday.")
    timezone: Annotated[str, rules.TIMEZONE] = Field("UTC", description="IANA time zone of the schedule.")
    work_pool: str = Field("kilotok", min_length=1, description="Prefect work pool that runs it.")
    probes: int = measured(
        2, "runs", "Measurements of what is live, each night; two or more give the noise, 0 measures nothing.", ge=0
    )
    refresh_draft: Literal["never", "drift", "always"] = Field(
        "never",
        description="When the draft is trained anew, from another seed, though nothing changed: never, once for each "
        "lasting drop of acceptance, or every night. The gates decide which of the two stays.",
    )
    commit_status: str | None = Field(
        None,
        pattern=r"https?://.*\{commit\}.*",
        description="URL that is told the outcome, as GitHub's commit status API is; `{commit}` stands for the commit.",
    )
    token: Annotated[str, rules.SECRET_REFERENCE] | None = Field(
        None, description="Token for `commit_status`, as a reference."
    )


class Spec(Section):
    """One thing that is served: from a checkpoint to a promoted endpoint."""

    kilotok: Literal[1] = Field(description="Version of this schema: 1.")
    name: Annotated[str, rules.NAME] = Field(description="Name of the deployment, its lock and its nightly.")
    hardware: str | None = Field(
        None,
        min_length=1,
        description="What it will run on, for predictions: the name of a file in specs/hardware/, such as `b200`; "
        "null takes this machine's CPU for the native engine.",
    )
    model: Model = Field(description=Model.__doc__ or "")
    quantize: Quantize = Field(description=Quantize.__doc__ or "")
    draft: Draft = Field(description=Draft.__doc__ or "")
    engine: Engine = section(Engine)
    deploy: Deploy = section(Deploy)
    validation: Validation = Field(alias="validate", description=Validation.__doc__ or "")
    nightly: Nightly | None = Field(None, description="The scheduled rebuild; null schedules nothing.")

    _path: Path = PrivateAttr(default=Path("spec.yaml"))
    _marks: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def path(self) -> Path:
        """The YAML file this spec was read from."""
        return self._path

    @property
    def root(self) -> Path:
        """What `file:` paths are relative to: the nearest folder above with a pyproject.toml, else the spec's own."""
        folder = self._path.resolve().parent
        return next((above for above in (folder, *folder.parents) if (above / "pyproject.toml").is_file()), folder)

    def where(self, dotted: str) -> str:
        """ "FILE:LINE:COLUMN dotted.key" of a key of this spec, or of the nearest one above that was written down."""
        key = dotted
        while key and key not in self._marks:
            key = key.rpartition(".")[0]
        return f"{self._marks[key]} {dotted}" if key else dotted

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dict with the YAML's key names and every default filled in."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON Schema 2020-12 of a spec file, for editors; a file that `extends` another may leave keys out."""
        schema = cls.model_json_schema(by_alias=True)
        schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
        schema["title"] = "kilotok spec"
        schema["properties"] = {
            "extends": {"type": "string", "description": "Another spec, beside this one, that this one changes."},
            **schema["properties"],
        }
        schema["if"] = {"required": ["extends"]}
        schema["then"] = {"required": ["name"]}
        schema["else"] = _requirements(schema, schema["$defs"])
        return schema


def _requirements(node: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """Take `required` out of a section and those below it: a spec that extends another may leave any key out."""
    found: dict[str, Any] = {"required": node.pop("required")} if "required" in node else {}
    for key, field in node["properties"].items():
        arms = [arm["$ref"].rsplit("/", 1)[1] for arm in (field, *field.get("anyOf", ())) if "$ref" in arm]
        inner = _requirements(sections[arms[0]], sections) if arms else {}
        if inner:
            found.setdefault("properties", {})[key] = inner
    return found
