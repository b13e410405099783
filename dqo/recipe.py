"""The recipe: one typed YAML file that is one reproducible run.

It is validated on the laptop, when the pipeline is compiled and when each task starts, always by `load` or `parse`. It
travels through Kubeflow as one JSON string (docs/adr/0003). The module imports no deep-learning library, so that
checking a recipe takes a moment.
"""

import hashlib
import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlparse

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dqo.errors import DQOError
from dqo.tasks import problem as unknown_task

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
DiversityMetric = Literal[
    "distinct_1", "distinct_2", "distinct_4", "self_bleu_diversity", "cosine_distance", "log_volume", "vendi_score"
]

UNGROUPED = 2
"""Rows a prompt in SFT without rollouts: a group is only the trainer's way to count then, and two is the least."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Data(_Section):
    """Where the prompts come from and how they are split."""

    source: str = "bundled"
    """`bundled` (the task's own small set), `public` (its public set on the hub), a path to a .jsonl or .parquet file,
    or `hub:<dataset id>`."""
    revision: str | None = None
    """Commit or tag of a hub data set."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of a hub data set; the train/evaluation split is always made here, by a hash of the prompt."""
    columns: dict[str, str] = {}
    """Field of the task -> column of the source, where the names differ, e.g. `{references: target}`."""
    eval_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.16
    """Share of the prompts that the hash puts aside for evaluation."""
    max_prompts: Positive | None = None
    """Use at most this many rows of the source."""
    max_prompt_tokens: Positive = 512
    """Longer prompts are quarantined, never cut."""
    max_bad_share: Share = 0.02
    """The run stops when more than this share of the rows is unusable; fewer are quarantined and reported."""


class Lora(_Section):
    """Low-rank adapters (peft); `lora: null` in the policy trains all weights."""

    r: Positive = 16
    """Rank."""
    alpha: Positive = 32
    """Scaling numerator: the update is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Modules that get an adapter."""


class Policy(_Section):
    """The model that is trained."""

    model: str = "bundled:smollm2-135m-instruct"
    """Hub id, local directory, or `bundled:<name>`."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the frozen weights and of the computation. `auto`: bfloat16 where the processor computes in it (a
    GPU, or a CPU with AMX or AVX512-BF16) and the weights are frozen, else float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    lora: Lora | None = Lora()


class Encoder(_Section):
    """The frozen sentence encoder whose embeddings span the volume."""

    model: str = "bundled:all-minilm-l6-v2"
    """Hub id of a sentence-transformers model, local directory, or `bundled:<name>`."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    max_tokens: Positive = 256
    """Longer responses are cut before embedding; the share that was cut is logged."""
    batch_size: Positive = 64
    """Responses embedded at once."""


class Reward(_Section):
    """What a response is worth, in training and in evaluation."""

    kind: Literal["auto", "rule", "reference_similarity", "model"] = "auto"
    """`rule`: the task's own; `reference_similarity`: cosine similarity to the nearest reference, as the encoder sees
    them; `model`: a reward model. `auto` takes the task's rule, or reference similarity where it has none."""
    model: str | None = None
    """Hub id or local directory of a sequence-classification model with one label; of `model` only."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    squash: bool = True
    """Whether a reward model's score passes through the logistic function, which puts it into (0, 1)."""
    max_tokens: Positive = 1024
    """Longer conversations are not judged: they have no reward, and are counted as unscorable."""
    batch_size: Positive = 16
    """Responses judged at once."""

    @model_validator(mode="after")
    def _model_is_named(self) -> "Reward":
        if self.kind == "model" and self.model is None:
            raise ValueError("kind 'model' needs model, the hub id or directory of a sequence-classification model")
        if self.kind != "model" and self.model is not None:
            raise ValueError(f"model {self.model!r} is of kind 'model' only, got kind {self.kind!r}")
        return self


class Defences(_Section):
    """What a response has to be to earn a bonus in RL; another leaves the kernel, its quality alone counts."""

    min_quality: float | None = None
    """Reward that has to be reached; `null` asks for none."""
    quality_gate: Literal["member", "group"] = "member"
    """Whether each response has to reach `min_quality`, or one of its group for all."""
    drop_truncated: bool = False
    """Whether responses that were cut at the token limit earn none."""
    min_prompt_similarity: Annotated[float, Field(ge=-1.0, le=1.0)] | None = None
    """Cosine similarity of prompt and response that has to be reached; `null` asks for none."""


class Method(_Section):
    """The objective: quality + alpha * log-volume of the group."""

    alpha: Annotated[float, Field(ge=0.0)] = 1.0
    """Diversity weight, in units of quality per nat."""
    k: Annotated[int, Field(ge=2)] = 8
    """Group size: responses sampled for a prompt (TRL's num_generations)."""
    advantage: Literal["paper", "centred", "decoupled"] = "decoupled"
    """How the bonus enters the advantage (docs/method.md): `paper` r + alpha b; `centred` both centred by the group;
    `decoupled` quality centred by the group, bonus by the other prompts' groups."""
    quality_scale: Literal["none", "group", "batch"] = "none"
    """Divide the quality advantage by the standard deviation of the group or of the batch. The bonus is never
    divided: alpha would cancel where qualities tie."""
    score: Literal["log_volume", "elliptical", "cosine_distance", "vendi", "distinct"] = "log_volume"
    """What alpha weighs (docs/method.md): the method's `log_volume`, or one that it is compared with. The bonus is then
    in that score's unit, and so is alpha."""
    distinct_threshold: Annotated[float, Field(gt=-1.0, le=1.0)] = 0.9
    """Cosine similarity from which two responses mean the same; of the score `distinct` only."""
    kernel_scale: Annotated[float, Field(gt=0.0, le=30.0)] = 1.0
    """Factor on the embeddings: larger tells near-duplicates apart more sharply; 1 is the paper's. Above 30 float32
    no longer resolves responses that coincide."""
    defences: Defences = Defences()
    """Conditions on a response that earns a bonus."""
    baselines: list[Literal["reward_only"]] = ["reward_only"]
    """Variants trained beside `dqo` from the same SFT checkpoint, with everything but the objective equal."""

    @model_validator(mode="after")
    def _paper_is_unscaled(self) -> "Method":
        if self.advantage == "paper" and self.quality_scale != "none":
            raise ValueError(
                f"advantage 'paper' is r + alpha * b as it stands and takes no quality_scale, got "
                f"{self.quality_scale!r}; expected 'none', or another advantage"
            )
        return self


class Sampling(_Section):
    """How responses are drawn from a policy."""

    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Softmax temperature."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus: keep the smallest set of tokens with this probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Keep this many most likely tokens; 0 keeps all."""
    max_new_tokens: Positive = 32
    """Responses are cut here; the share that was cut is logged as `truncation_rate`."""


class Rollout(_Section):
    """What generates the rollouts during training."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """`transformers` runs everywhere; `vllm` needs a GPU and the extra `gpu`."""
    mode: Literal["colocate", "server"] = "colocate"
    """vLLM in the training processes, or a `trl vllm-serve` server."""
    server_base_url: str | None = None
    """Address of the vLLM server, e.g. `http://vllm:8000`."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """Share of the GPU's memory for vLLM in colocate mode."""

    @model_validator(mode="after")
    def _server_has_address(self) -> "Rollout":
        if self.engine == "vllm" and self.mode == "server" and not self.server_base_url:
            raise ValueError("mode 'server' needs server_base_url, e.g. http://vllm:8000")
        return self


class _Training(_Section):
    steps: Positive
    """Optimiser steps."""
    prompts_per_step: Positive = 4
    """Prompts in one optimiser step, over all processes; each gets k rollouts."""
    micro_batch: Positive | None = None
    """Sequences in one forward pass of one process; `null` takes the whole step at once."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-4
    """Peak learning rate of AdamW."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Gradients are clipped to this norm."""
    save_every: Positive = 10
    """Steps between checkpoints; the two newest are kept for resuming."""


class Sft(_Training):
    """DQO-SFT: likelihood of the demonstration plus alpha times the log-volume of rollouts."""

    steps: Positive = 20
    """Optimiser steps."""
    prompts_per_step: Positive = 16
    """Demonstrations in one optimiser step, over all processes."""
    alpha: Annotated[float, Field(ge=0.0)] = 0.0
    """Diversity weight during SFT; 0 is plain SFT and makes no rollouts."""
    max_response_tokens: Positive = 64
    """Longer demonstrations are quarantined in preparation, never cut."""


class Rl(_Training):
    """DQO-RL: reward plus alpha times the log-volume, by policy gradient."""

    steps: Positive = 20
    """Optimiser steps."""
    beta: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the KL to the SFT policy."""
    loss_type: Literal["dr_grpo", "grpo", "bnpo", "dapo"] = "dr_grpo"
    """TRL's loss aggregation; `dr_grpo` divides by a constant, so that the gradient is the objective's own."""
    sampling: Sampling = Sampling()
    rollout: Rollout = Rollout()
    log_completions_every: Positive = 10
    """Steps between tables of responses in MLflow."""


class Evaluation(_Section):
    """How every model of the run is measured, with the same prompts, seeds and settings."""

    prompts: Positive = 48
    """Evaluation prompts used; fewer are used when the split holds fewer."""
    n: Annotated[int, Field(ge=2)] = 8
    """Responses sampled for a prompt."""
    sampling: Sampling = Sampling()
    batch_prompts: Positive = 16
    """Prompts sampled at once; each takes n sequences of memory."""
    bootstrap_draws: Annotated[int, Field(ge=100)] = 2000
    """Draws of the bootstrap over prompts behind every interval."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Level of the intervals."""


class JudgeAudit(_Section):
    """What a judge has to show on labelled pairs before its verdicts count (docs/judges.md); `null` drops a demand."""

    min_kappa: Annotated[float, Field(ge=-1.0, le=1.0)] | None = 0.6
    """Cohen's kappa of verdicts and labels that has to be reached."""
    max_first_position_deviation: Annotated[float, Field(ge=0.0, le=0.5)] | None = 0.15
    """How far the share of verdicts for the response that is shown first may lie from one half."""
    max_invalid_rate: Share | None = 0.05
    """Largest share of answers without a readable verdict."""
    min_repeat_consistency: Share | None = 0.9
    """Share of verdicts that have to be the same when asked again."""
    max_verbosity_bias: Share | None = 0.25
    """Largest share of verdicts for the longer response among the pairs where that is wrong."""
    max_injection_rate: Share | None = 0.1
    """Largest share of pairs won by a worse response that tells the judge what to say."""
    repeats: Annotated[int, Field(ge=2)] = 2
    """How often each question is asked."""

    @model_validator(mode="after")
    def _demands_something(self) -> "JudgeAudit":
        if all(getattr(self, name) is None for name in type(self).model_fields if name != "repeats"):
            raise ValueError("every demand is null, so that any judge would pass; expected one at least")
        return self


class Judge(_Section):
    """A language model as judge, behind any endpoint that speaks OpenAI's chat completions (docs/judges.md)."""

    endpoint: str
    """Address of the server up to its version, e.g. `http://vllm:8000/v1`."""
    model: Annotated[str, Field(min_length=1)]
    """The model's name as the server knows it."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key, e.g. `JUDGE_API_KEY`; `null` sends none."""
    prompt: str = "pairwise"
    """`pairwise` (which of two responses is better), `pointwise` (a rubric from 1 to 5), or a .yaml file of that form
    (docs/judges.md)."""
    temperature: Annotated[float, Field(ge=0.0)] | None = 0.0
    """Sampling temperature; `null` sends none, for models that refuse one."""
    max_tokens: Positive = 512
    """Longest answer of the judge."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls that limit: newer models of OpenAI take `max_completion_tokens` only."""
    structured_output: bool = True
    """Ask for JSON by a schema; a server that refuses is asked without it."""
    max_concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Requests in flight at once."""
    max_requests: Positive = 5000
    """Requests one evaluation or audit may send, those that are sent again included; what was judged by then stays."""
    max_attempts: Positive = 5
    """How often a request is sent that meets 429, 5xx, a timeout or a cut connection."""
    timeout: Annotated[float, Field(gt=0.0)] = 120.0
    """Seconds until a request without an answer counts as failed."""
    cache: str | None = None
    """Folder of answers; `null` takes `$XDG_CACHE_HOME/dqo/judge`, by default below `~/.cache`."""
    audit: JudgeAudit = JudgeAudit()
    """What the judge has to show before its verdicts count."""

    @field_validator("endpoint")
    @classmethod
    def _is_a_base_address(cls, endpoint: str) -> str:
        parts = urlparse(endpoint)
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                "holds credentials, a query or a fragment, which would be written into results; expected an address "
                "such as http://vllm:8000/v1, and the key in the variable that api_key_env names"
            )
        try:
            whole = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        except ValueError:  # a port that is no number
            whole = False
        if not whole:
            raise ValueError(f"got {endpoint!r}; expected an address such as http://vllm:8000/v1")
        address = endpoint.rstrip("/")
        if address.endswith("/chat/completions"):
            raise ValueError(
                f"got {endpoint!r}; expected the part before /chat/completions: "
                f"{address.removesuffix('/chat/completions')}"
            )
        return address

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        # The value is not repeated: it may be the key itself, pasted into the wrong place.
        if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            raise ValueError(
                "is no name of an environment variable; expected capitals, digits and underscores, e.g. JUDGE_API_KEY "
                "(never the key itself)"
            )
        return name


class Gate(_Section):
    """When the new model may become `champion`."""

    against: Literal["base", "sft", "reward_only"] = "reward_only"
    """The model it is compared with."""
    max_quality_loss: Annotated[float, Field(ge=0.0)] = 0.05
    """The mean quality may be lower by at most this much."""
    more_diverse_on: Annotated[list[DiversityMetric], Field(min_length=1)] = ["log_volume", "self_bleu_diversity"]
    """Metrics whose intervals must lie above the other model's, without overlap."""


class Registry(_Section):
    """The registered model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "dqo-quickstart"
    """Name in the MLflow model registry."""


class Tracking(_Section):
    """Where MLflow is."""

    uri: str | None = None
    """Tracking URI. `null` takes MLFLOW_TRACKING_URI where the stages run; without it, `dqo run` takes an sqlite file
    in its output folder, and a task on a cluster stops. A password belongs in MLFLOW_TRACKING_PASSWORD."""
    experiment: str = "dqo"
    """Experiment name."""

    @field_validator("uri")
    @classmethod
    def _holds_no_password(cls, uri: str | None) -> str | None:
        if uri is not None and "@" in urlparse(uri).netloc and uri.startswith("http"):
            raise ValueError(
                "holds a user name or password, which would be written into reports and compiled pipelines; expected "
                "http(s)://host:port, with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD set where it runs"
            )
        return uri


class Resources(_Section):
    """What each training and evaluation task asks for on a cluster; the local runner uses this machine as it is."""

    image: str = "dqo-trainer:0.1.0"
    """Container image with this library, by digest in production."""
    cpu: Annotated[str, Field(pattern=r"^\d+m?$")] = "2"
    """CPU request, Kubernetes quantity."""
    memory: Annotated[str, Field(pattern=r"^\d+(\.\d+)?(Ki|Mi|Gi|Ti)$")] = "8Gi"
    """Memory limit, Kubernetes quantity."""
    accelerator: str | None = None
    """Resource name of the accelerator, e.g. `nvidia.com/gpu`."""
    accelerator_count: Annotated[int, Field(ge=1)] = 1
    """Accelerators a task, when `accelerator` is set."""


class Recipe(_Section):
    """One reproducible run: task, data, models, method, training, evaluation, gate and resources."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?$")]
    """Name of the run and of the Kubeflow pipeline: lower-case letters, digits and dashes."""
    task: str = "story"
    """What is asked of the model; brings prompts, references and a rule or none (docs/tasks.md)."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Seed of everything that draws."""
    data: Data = Data()
    policy: Policy = Policy()
    encoder: Encoder = Encoder()
    reward: Reward = Reward()
    method: Method = Method()
    sft: Sft = Sft()
    rl: Rl = Rl()
    evaluation: Evaluation = Evaluation()
    judge: Judge | None = None
    """A language model as judge; `null` has none."""
    gate: Gate = Gate()
    registry: Registry = Registry()
    tracking: Tracking = Tracking()
    resources: Resources = Resources()

    @field_validator("task")
    @classmethod
    def _task_exists(cls, task: str) -> str:
        if reason := unknown_task(task):
            raise ValueError(reason)
        return task

    @model_validator(mode="after")
    def _sections_fit(self) -> "Recipe":
        problems = []
        if len(set(self.method.baselines)) < len(self.method.baselines):
            problems.append(f"method.baselines: got {self.method.baselines}; expected each baseline once")
        if self.gate.against == "reward_only" and "reward_only" not in self.method.baselines:
            problems.append(
                "gate.against: got 'reward_only', which method.baselines does not train; add it there or compare with "
                "'sft' or 'base'"
            )
        if self.resources.accelerator_count > 1:
            problems.append(
                f"resources.accelerator_count: got {self.resources.accelerator_count}; expected 1, since a stage is "
                "one process so far"
            )
        for name, stage, k in (
            ("sft", self.sft, self.method.k if self.sft.alpha > 0 else UNGROUPED),
            ("rl", self.rl, self.method.k),
        ):
            rows = stage.prompts_per_step * k
            if stage.micro_batch is not None and rows % stage.micro_batch:
                problems.append(
                    f"{name}.micro_batch: got {stage.micro_batch}; expected a divisor of the {rows} sequences of a "
                    f"step ({name}.prompts_per_step = {stage.prompts_per_step} times {k})"
                )
        if problems:
            raise ValueError("\n".join(problems))  # a line each, see _readable
        return self

    @property
    def model_names(self) -> list[str]:
        """Models of the run in display order: the base, the SFT checkpoint, then the variants."""
        return ["base", "sft", *self.variants]

    @property
    def variants(self) -> list[str]:
        """RL variants in the order they are trained: the baselines, then `dqo`."""
        return [*self.method.baselines, "dqo"]

    @property
    def warnings(self) -> list[str]:
        """What is allowed but unlikely to be meant, in words."""
        found = []
        if self.method.advantage == "centred" and self.method.k == 2 and self.method.alpha > 0:
            found.append(
                "method: with k = 2 both members have the same bonus, so advantage 'centred' cancels it and alpha has "
                "no effect; use k >= 3, or advantage 'decoupled' or 'paper'"
            )
        return found

    def to_json(self) -> str:
        """Return the recipe with its defaults as one canonical JSON string (keys sorted)."""
        # Not escaped: YAML reads an escaped surrogate pair as two characters.
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def to_yaml(self) -> str:
        """Return the recipe with its defaults filled in, as YAML in the order of the types."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)

    @property
    def digest(self) -> str:
        """First 12 hex digits of the SHA-256 of `to_json`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key written twice, which plain YAML silently resolves to the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # plain YAML refuses it below
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice in the same mapping", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """YAML that `_StrictLoader` reads back: a text such as a commit 5e93851 is quoted."""


# YAML 1.1 reads 2e-4 as a string; every other reader, and every author of a recipe, means a number.
for _yaml in (_StrictLoader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def _readable(error: ValidationError, where: str) -> str:
    """Name the file, field, value and expectation of every error at once."""
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"]) or "the recipe"
        value = item.get("input")
        if item["type"] == "extra_forbidden":
            lines.append(
                f"  {field}: unknown key (value {value!r}); expected one of: {', '.join(_keys_beside(item['loc']))}"
            )
        elif item["type"] == "missing":
            lines.append(f"  {field}: missing; a value is required")
        elif not item["loc"] and item["type"] == "value_error":  # Recipe._sections_fit
            lines += [f"  {problem}" for problem in item["msg"].removeprefix("Value error, ").split("\n")]
        elif isinstance(value, dict) or item["type"] == "value_error":
            lines.append(f"  {field}: {item['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"  {field}: got {value!r}; {item['msg'][0].lower()}{item['msg'][1:]}")
    count = f"{len(lines)} error" + ("s" if len(lines) > 1 else "")
    return f"{where}: {count} in the recipe\n" + "\n".join(lines)


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    """Field names that are allowed where an unknown key stands."""
    model: type[BaseModel] = Recipe
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


def parse(text: str, where: str = "recipe") -> Recipe:
    """Read a recipe from YAML or JSON text.

    Args:
        text: The document.
        where: What to call it in an error, usually the file's path.

    Raises:
        DQOError: With every error at once: file, field, value and what was expected.
    """
    return _validated(_mapping(text, where), where)


def _mapping(text: str, where: str) -> dict[Any, Any]:
    try:
        # S506 does not apply: _StrictLoader is a SafeLoader.
        content = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date such as 2024-13-45
        raise DQOError(f"{where}: not valid YAML\n  {str(error).replace(chr(10), chr(10) + '  ')}") from None
    if not isinstance(content, dict):
        raise DQOError(f"{where}: expected a mapping of recipe keys, got {type(content).__name__}")
    return content


def _validated(content: dict[Any, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise DQOError(_readable(error, where)) from None


def load(path: str | Path) -> Recipe:
    """Read a recipe file; see `parse`.

    Raises:
        DQOError: If the file cannot be read, is not UTF-8 or not a valid recipe.
    """
    return parse(_text(path), str(path))


def load_judge(path: str | Path) -> Judge:
    """Read the judge from a recipe, or from a file that holds the section's fields alone.

    Raises:
        DQOError: As `load`, and if a recipe names no judge.
    """
    content = _mapping(_text(path), str(path))
    if "endpoint" in content:
        content = {"name": "judge", "judge": content}
    judge = _validated(content, str(path)).judge
    if judge is None:
        raise DQOError(f"{path}: names no judge; expected a section `judge` with endpoint and model (docs/judges.md)")
    return judge


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DQOError(f"{path}: no such recipe file") from None
    except UnicodeDecodeError as error:
        raise DQOError(f"{path}: not UTF-8 (byte {error.start}: {error.object[error.start]:#04x})") from None
    except OSError as error:
        raise DQOError(f"{path}: cannot be read ({error.strerror})") from None


def json_schema() -> str:
    """Return the JSON schema of the recipe, for editors."""
    return json.dumps(Recipe.model_json_schema(), indent=2) + "\n"
