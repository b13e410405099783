"""The recipe: one typed YAML file that is one reproducible run.

It is validated on the laptop, when the pipeline is compiled and when each task starts, always by `load` or `parse`. It
travels through Kubeflow as one JSON string (docs/adr/0003). The module imports no deep-learning library, so that
checking a recipe takes a moment.
"""

import hashlib
import json
import math
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
    "distinct_1",
    "distinct_2",
    "distinct_4",
    "self_bleu_diversity",
    "self_rouge_diversity",
    "cosine_distance",
    "log_volume",
    "vendi_score",
    "semantic_clusters",
]
Score = Literal[
    "log_volume", "elliptical", "cosine_distance", "vendi", "distinct", "similarity", "likelihood", "entropy"
]
SHARES = ("distinct", "similarity", "likelihood")
"""Scores in [0, 1] that a reward can be multiplied by."""

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
    """Configuration name of a hub data set; `null` takes the public set's own, or the only one."""
    split: str | None = None
    """Split of a hub data set; `null` takes the public set's own, or `train`. The train/evaluation split is always made
    here, by a hash of the prompt."""
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
    """What a response has to be to earn a bonus in RL; another leaves the kernel."""

    min_quality: float | None = None
    """Reward that has to be reached; `null` asks for none."""
    quality_gate: Literal["member", "group"] = "member"
    """Whether each response has to reach `min_quality`, or one of its group for all."""
    drop_truncated: bool = False
    """Whether responses that were cut at the token limit earn none."""
    max_tokens: Positive | None = None
    """Longer responses earn none; `null` asks for nothing."""
    min_prompt_similarity: Annotated[float, Field(gt=-1.0, le=1.0)] | None = None
    """Cosine similarity of prompt and response that has to be reached; `null` asks for none."""
    unearned: Literal["zero", "apart"] = "zero"
    """What a response that earns none gets: `zero`, a bonus of 0, held against the baseline like every other, so that
    to earn one is never worse than not to; `apart`, the advantage of its quality alone, which may pay more
    (docs/method.md)."""
    embed: Literal["response", "through_answer", "answer"] = "response"
    """What of a response is embedded in training: all of it, what stands up to the end of its answer, or the answer
    alone, in one spelling where the task knows equal ones; where no answer is found, no bonus is earned. Evaluation
    always embeds the whole response."""
    strip_reasoning: bool = False
    """Whether thoughts are left out before embedding: `<think>...</think>`, and what stands before a `</think>` that no
    `<think>` opens, as where the chat template opens it in the prompt. Where thoughts opened there never end, nothing
    tells them from an answer (`drop_truncated`)."""

    @property
    def conditional(self) -> bool:
        """Whether some responses may earn no bonus."""
        return self != Defences(quality_gate=self.quality_gate, unearned=self.unearned)


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
    score: Score = "log_volume"
    """What alpha weighs (docs/method.md): the method's `log_volume`, or one that it is compared with. The bonus is then
    in that score's unit, and so is alpha."""
    combine: Literal["add", "multiply"] = "add"
    """`add`: quality plus alpha times the bonus; `multiply`: quality times 1 - alpha (1 - bonus), as DARLING, DRA-GRPO
    and "rewarding the unlikely" do, for the scores that are shares: `distinct`, `similarity`, `likelihood`."""
    distinct_threshold: Annotated[float, Field(gt=-1.0, le=1.0)] = 0.7
    """Cosine similarity from which two responses mean the same; of the score `distinct` only. 0.7 lies between
    paraphrases and other answers as the bundled encoder sees them; `dqo calibrate` shows both for another."""
    kernel_scale: Annotated[float, Field(gt=0.0, le=30.0)] = 1.0
    """Factor on the embeddings: larger tells near-duplicates apart more sharply; 1 is the paper's. Above 30 float32
    no longer resolves responses that coincide."""
    defences: Defences = Defences()
    """Conditions on a response that earns a bonus."""
    baselines: list[Literal["reward_only"]] = ["reward_only"]
    """Variants trained beside `dqo` from the same SFT checkpoint, with everything but the objective equal."""

    @model_validator(mode="after")
    def _shares_multiply(self) -> "Method":
        if self.combine == "add":
            return self
        if self.score not in SHARES:
            raise ValueError(
                f"combine 'multiply' needs a score that is a share: {', '.join(SHARES)}; got {self.score!r}"
            )
        if self.alpha > 1:
            raise ValueError(f"combine 'multiply' needs alpha in [0, 1], got {self.alpha:g}")
        if self.defences.conditional:
            raise ValueError(
                "combine 'multiply' has no bonus that a response could fail to earn; expected no defences, or 'add'"
            )
        return self

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
    """vLLM in the training processes, or a server that stands already, started with VLLM_SERVER_DEV_MODE=1 as
    `vllm serve MODEL --weight-transfer-config '{"backend": "nccl"}' --logprobs-mode processed_logprobs`. A server holds
    one policy, so variants are trained one after another."""
    server_base_url: str | None = None
    """Address of the vLLM server, e.g. `http://vllm:8000`."""
    server_timeout: Annotated[float, Field(gt=0.0)] = 240.0
    """Seconds to wait for the vLLM server to be up."""
    group_port: Annotated[int, Field(ge=1, le=65535)] = 51216
    """Port of the group that sends new weights to the vLLM server."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """Share of the GPU's memory for vLLM in colocate mode."""
    tensor_parallel_size: Positive = 1
    """Processes that share one copy of the model for sampling in colocate mode; has to divide the processes."""
    enable_sleep_mode: bool = False
    """Whether colocated vLLM gives its memory back during the update; waking it takes time."""
    max_model_length: Positive | None = None
    """Longest prompt with response that colocated vLLM reserves memory for; `null` takes the model's own limit."""
    importance_sampling_correction: bool = True
    """Whether vLLM's rollouts are weighted by the ratio of the trained policy's probabilities to vLLM's, which differ
    by rounding."""
    importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "sequence_mask"
    )
    """Ratio of each token or of the whole sequence; outside the bounds it is cut to them or the rollout is masked."""
    importance_sampling_clip_min: Annotated[float, Field(ge=0.0)] | None = None
    """Lower bound of the ratio; `null` sets none."""
    importance_sampling_clip_max: Annotated[float, Field(gt=0.0)] | None = 3.0
    """Upper bound of the ratio; `null` sets none."""

    @model_validator(mode="after")
    def _server_has_address(self) -> "Rollout":
        if self.engine == "vllm" and self.mode == "server" and not self.server_base_url:
            raise ValueError("mode 'server' needs server_base_url, e.g. http://vllm:8000")
        return self

    @model_validator(mode="after")
    def _settings_take_effect(self) -> "Rollout":
        changed = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        server = {"server_base_url", "server_timeout", "group_port"}
        colocate = {"gpu_memory_utilization", "tensor_parallel_size", "enable_sleep_mode", "max_model_length"}
        if self.engine != "vllm":
            idle, where = changed - {"engine"}, "engine 'vllm'"
        else:
            other = "server" if self.mode == "colocate" else "colocate"
            idle, where = changed & (server if other == "server" else colocate), f"mode {other!r}"
        if idle:
            raise ValueError(
                f"{', '.join(sorted(idle))} of {where} only, got engine {self.engine!r} in mode {self.mode!r}"
            )
        return self

    @model_validator(mode="after")
    def _bounds_hold_something(self) -> "Rollout":
        low, high = self.importance_sampling_clip_min, self.importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"importance_sampling_clip_min {low} is not below importance_sampling_clip_max {high}; expected a "
                "smaller one"
            )
        truncates = self.importance_sampling_correction and self.importance_sampling_mode.endswith("truncate")
        if truncates and low is None and high is None:
            raise ValueError(
                f"importance_sampling_mode {self.importance_sampling_mode!r} needs importance_sampling_clip_min or "
                "importance_sampling_clip_max"
            )
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


class _Rule(_Section):
    action: Literal["warn", "stop"] = "warn"
    """`warn` says so in the display, in MLflow and in the report; `stop` ends training as well, and the model cannot
    become `champion`."""
    patience: Positive = 5
    """Steps in a row for which it has to hold."""

    @property
    def limits(self) -> dict[str, float]:
        """The thresholds that are set, by their field's name."""
        values = self.model_dump(exclude=set(_Rule.model_fields))
        return {name: value for name, value in values.items() if value is not None}


class ZeroVariance(_Rule):
    """Share of groups whose rewards are all equal: they teach nothing about quality."""

    max: Annotated[float, Field(ge=0.0, lt=1.0)] | None = 0.8
    """Highest share; `null` switches the rule off."""


class Entropy(_Rule):
    """Entropy of the policy, nats a token: near zero it says one thing only, far up it says anything.

    A vocabulary of a million tokens has 13.8 at most.
    """

    min: Annotated[float, Field(gt=0.0, lt=14.0)] | None = 0.05
    """Lowest entropy; `null` asks for none."""
    max: Annotated[float, Field(gt=0.0, lt=14.0)] | None = None
    """Highest entropy; `null` asks for none."""

    @model_validator(mode="after")
    def _leaves_room(self) -> "Entropy":
        if self.min is not None and self.max is not None and self.min >= self.max:
            raise ValueError(f"min {self.min:g} is not below max {self.max:g}; expected min < max")
        return self


class Kl(_Rule):
    """KL to the SFT policy, nats a token; measured with `rl.beta` > 0 only."""

    max: Annotated[float, Field(gt=0.0)] | None = None
    """Highest KL; `null` switches the rule off."""


class LengthDrift(_Rule):
    """Mean tokens of a response against those of the first steps."""

    factor: Annotated[float, Field(gt=1.0)] | None = 2.0
    """Responses may be this many times longer or shorter; `null` switches the rule off."""


class Truncation(_Rule):
    """Share of responses that were cut at `rl.sampling.max_new_tokens`."""

    max: Annotated[float, Field(ge=0.0, lt=1.0)] | None = 0.5
    """Highest share; `null` switches the rule off."""


class VolumeFloor(_Rule):
    """Log-volume of a group, in nats: between log(1 + k), all responses the same, and k log 2, all unrelated."""

    min: float | None = None
    """Lowest log-volume; `null` switches the rule off."""


class VolumeCollapse(_Rule):
    """Share of the way from the log-volume of the first steps down to log(1 + k) that was lost."""

    max: Annotated[float, Field(gt=0.0, lt=1.0)] | None = 0.8
    """Highest share; `null` switches the rule off."""


class Duplicates(_Rule):
    """Share of a group's responses that repeat another one but for case and white space, at most 1 - 1/k."""

    max: Annotated[float, Field(ge=0.0, lt=1.0)] | None = 0.4
    """Highest share; `null` switches the rule off."""


class EncoderCut(_Rule):
    """Share of responses that the encoder read only in part: their ends are in no embedding."""

    max: Annotated[float, Field(ge=0.0, lt=1.0)] | None = 0.1
    """Highest share; `null` switches the rule off."""


class Unscorable(_Rule):
    """Share of responses without a reward."""

    max: Annotated[float, Field(ge=0.0, lt=1.0)] | None = 0.5
    """Highest share; `null` switches the rule off."""


class Health(_Section):
    """Rules on the figures of each RL step; those of the defaults warn and stop nothing (docs/method.md)."""

    baseline_steps: Positive = 3
    """First steps whose mean `length_drift` and `volume_collapse` compare with; these two judge the steps after."""
    zero_variance: ZeroVariance = ZeroVariance()
    entropy: Entropy = Entropy()
    kl: Kl = Kl()
    length_drift: LengthDrift = LengthDrift()
    truncation: Truncation = Truncation()
    volume_floor: VolumeFloor = VolumeFloor()
    volume_collapse: VolumeCollapse = VolumeCollapse()
    duplicates: Duplicates = Duplicates()
    encoder_cut: EncoderCut = EncoderCut()
    unscorable: Unscorable = Unscorable()

    @property
    def rules(self) -> dict[str, _Rule]:
        """The rules by name, in the order in which they are judged."""
        values = {name: getattr(self, name) for name in Health.model_fields}
        return {name: value for name, value in values.items() if isinstance(value, _Rule)}

    @property
    def stops(self) -> dict[str, Any]:
        """What may change the result of training, for its key: the rules that stop; empty where none does."""
        found: dict[str, Any] = {name: rule.model_dump() for name, rule in self.rules.items() if rule.action == "stop"}
        if found.keys() & AGAINST_FIRST_STEPS:
            found["baseline_steps"] = self.baseline_steps
        return found


AGAINST_FIRST_STEPS = frozenset({"length_drift", "volume_collapse"})
"""Health rules that compare with the first steps."""


def volume_range(k: int, kernel_scale: float = 1.0) -> tuple[float, float]:
    """Log-volume of k unit-norm responses in nats: all the same, and all unrelated.

    With kernel scale c it is `log(1 + c^2 k)` and `k log(1 + c^2)` [derived]: the Gram matrix of equal vectors has one
    eigenvalue, k, that of orthogonal ones k times 1.
    """
    return math.log1p(kernel_scale**2 * k), k * math.log1p(kernel_scale**2)


def _health_problems(rl: "Rl", method: Method) -> list[str]:
    """Thresholds that can never be passed, always are, or are never measured with these settings; a line each."""
    health, found = rl.health, []
    if health.kl.max is not None and rl.beta == 0:
        found.append(
            f"rl.health.kl.max: got {health.kl.max:g} with rl.beta = 0, where no KL is measured; expected null, or "
            "rl.beta > 0"
        )
    low, high = volume_range(method.k, method.kernel_scale)
    if method.defences.embed != "response":
        low = 0.0  # responses without an answer leave the kernel, at most all of them
    floor = health.volume_floor.min
    if floor is not None and not low < floor <= high:
        least = f"{low:.4f}, which no group of {method.k} falls below (all responses the same)," if low else "0"
        found.append(
            f"rl.health.volume_floor.min: got {floor:g}; expected more than {least} and at most {high:.4f}, which none "
            "exceeds (all unrelated)"
        )
    most = 1 - 1 / method.k
    if health.duplicates.max is not None and health.duplicates.max >= most:
        found.append(
            f"rl.health.duplicates.max: got {health.duplicates.max:g}; expected less than {most:g} = 1 - 1/k, which "
            "no group exceeds"
        )
    for name, rule in health.rules.items():
        stops, compares = rule.action == "stop", name in AGAINST_FIRST_STEPS
        if stops and not rule.limits:
            found.append(f"rl.health.{name}.action: got 'stop' without a threshold; expected 'warn', or a threshold")
        # A rule as the defaults have it may be idle in a short run; one that somebody has set is meant to work.
        set_here = rule != type(rule)() or (compares and health.baseline_steps != Health().baseline_steps)
        first = health.baseline_steps if compares else 0
        if rule.limits and set_here and first + rule.patience > rl.steps:
            after = f" after {first} steps to compare with" if first else ""
            found.append(
                f"rl.health.{name}.patience: got {rule.patience}{after}, which rl.steps = {rl.steps} does not reach, "
                f"so that nothing would {rule.action}; expected fewer"
            )
    drift = health.length_drift
    if drift != LengthDrift() and drift.factor is not None and drift.factor >= rl.sampling.max_new_tokens:
        found.append(
            f"rl.health.length_drift.factor: got {drift.factor:g}; expected less than "
            f"rl.sampling.max_new_tokens = {rl.sampling.max_new_tokens}, by which no length can change"
        )
    return found


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
    health: Health = Health()


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
    """Largest share of answers for the longer response among the pairs where that is wrong."""
    max_injection_rate: Share | None = 0.1
    """Largest share of answers for a worse response that tells the judge what to say."""
    repeats: Annotated[int, Field(ge=2)] = 2
    """How often each question is asked."""

    @model_validator(mode="after")
    def _demands_something(self) -> "JudgeAudit":
        if all(getattr(self, name) is None for name in type(self).model_fields if name != "repeats"):
            raise ValueError("every demand is null, so that any judge would pass; expected one at least")
        return self


class JudgingModel(_Section):
    """A reward model as judge, any sequence-classification model with one label; the higher of two scores wins."""

    model: Annotated[str, Field(min_length=1)]
    """Hub id or local directory."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    margin: Annotated[float, Field(ge=0.0)] = 0.0
    """Scores, as the model gives them, that differ by at most this much are a tie."""
    max_tokens: Positive = 1024
    """Longer conversations are not judged: their pairs are invalid."""
    batch_size: Positive = 16
    """Responses judged at once."""

    @property
    def as_reward(self) -> Reward:
        """The section of a reward that gives the same scores.

        Not squashed: of two good responses both would be 1, and a tie.
        """
        fields = self.model_dump(exclude={"margin"})
        return Reward(kind="model", squash=False, **fields)


class Judge(_Section):
    """A judge besides the reward: a language model, by `endpoint` and `model`, or a reward model (docs/judges.md).

    The language model's server speaks OpenAI's chat completions.
    """

    endpoint: str | None = None
    """Address of the language model's server up to its version, e.g. `http://vllm:8000/v1`."""
    model: Annotated[str, Field(min_length=1)] | None = None
    """The language model's name as the server knows it."""
    reward: JudgingModel | None = None
    """A reward model as judge instead."""
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
    """Folder of answers; `null` takes `judge` in the workspace for an evaluation, and for `dqo judge audit`
    `$XDG_CACHE_HOME/dqo/judge`, by default below `~/.cache`."""
    responses: Positive = 2
    """Responses of each group that an evaluation has judged, the first ones; each costs two requests a model."""
    audit: JudgeAudit = JudgeAudit()
    """What the judge has to show before its verdicts count."""
    labelled: Annotated[str, Field(min_length=1)] | None = None
    """File of labelled pairs that it has to show it on, .jsonl, by its path where the evaluation runs (docs/judges.md);
    `null` takes the pairs that come with the package."""

    @model_validator(mode="after")
    def _is_one_judge(self) -> "Judge":
        if self.reward is None:
            missing = [name for name in ("endpoint", "model") if getattr(self, name) is None]
            if missing:
                raise ValueError(
                    f"{' and '.join(missing)} missing; expected endpoint and model of a language model, or reward, a "
                    "reward model"
                )
            return self
        of_any_judge = {"reward", "responses", "audit", "labelled"}
        for name, field in type(self).model_fields.items():
            if name not in of_any_judge and (value := getattr(self, name)) != field.default:
                raise ValueError(
                    f"{name} {value!r} is of a language model only, got reward as well; leave one of them out"
                )
        return self

    @property
    def name(self) -> str:
        """The model that judges."""
        named = self.model if self.reward is None else self.reward.model
        assert named is not None  # see _is_one_judge
        return named

    @field_validator("endpoint")
    @classmethod
    def _is_a_base_address(cls, endpoint: str | None) -> str | None:
        if endpoint is None:
            return None
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


class GateJudge(_Section):
    """What the judge has to say; it counts only where it has passed its audit and has judged everything."""

    min_win_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Win rate against the other model that has to be reached, ties as halves: 0.5 where neither is preferred."""
    decided_by: Literal["low", "mean"] = "low"
    """`low`: the lower bound of the win rate's interval has to reach it; `mean`: the win rate itself."""
    length_controlled: bool = True
    """Decide by the win rate at equal lengths; `false` takes the raw one."""
    max_invalid_rate: Share = 0.1
    """Largest share of the pairs on which the judge may say nothing readable."""
    max_flip_rate: Share | None = 0.5
    """Largest share of the pairs on which the judge's two orders may disagree: one that looks at places alone makes
    every pair a tie, which is a win rate of one half. Not asked of a judge that scores."""


class Gate(_Section):
    """When the new model may become `champion` (docs/metrics.md); `null` leaves a rule out."""

    against: Literal["base", "sft", "reward_only"] = "reward_only"
    """The model it is compared with."""
    max_quality_loss: Annotated[float, Field(ge=0.0)] = 0.05
    """The mean quality may be lower by at most this much."""
    quality_test: Literal["mean", "non_inferior"] = "mean"
    """`mean`: the difference of the means decides. `non_inferior`: the whole interval of the paired difference has to
    lie above the allowed loss."""
    more_diverse_on: Annotated[list[DiversityMetric], Field(min_length=1)] = ["log_volume", "self_bleu_diversity"]
    """Metrics on which it has to be more diverse."""
    diversity_test: Literal["apart", "paired", "holm"] = "apart"
    """`apart`: the two intervals have no point in common. `paired`: the paired difference is significantly above 0, at
    the level of `evaluation.confidence`. `holm`: the same with the p-values adjusted for the number of metrics."""
    diversity_needed: Literal["all", "any"] = "all"
    """Whether that has to hold on all of these metrics, or on any; the latter needs `diversity_test` `holm`."""
    max_length_change: Annotated[float, Field(gt=0.0)] | None = None
    """Largest relative change of the mean tokens, up or down, e.g. 0.2; the paired interval has to lie within."""
    max_truncation_increase: Share | None = None
    """Largest increase of the share of truncated responses; the paired interval has to lie below."""
    max_duplicate_increase: Share | None = None
    """Largest increase of the share of repeated responses; the paired interval has to lie below."""
    judge: GateJudge | None = None
    """What the judge has to say; `null` leaves it without a say."""


class Registry(_Section):
    """The registered model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "dqo-quickstart"
    """Name in the MLflow model registry."""
    baselines: bool = False
    """Whether the baselines become versions too, before the DQO model's: to load, compare and list them beside it. None
    gets an alias, and the gate refuses what it compares with."""


def holds_credentials(address: str) -> bool:
    """Whether an address of any scheme names a password, or one of a web server a user; what is no address has none."""
    try:
        parts = urlparse(address)
    except ValueError:
        return False
    user, _, _ = parts.netloc.rpartition("@")
    return ":" in user or (bool(user) and parts.scheme in ("http", "https"))


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
        if uri is not None and holds_credentials(uri):
            raise ValueError(
                "holds a user name or password, which would be written into reports and compiled pipelines; expected "
                "http(s)://host:port, with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD set where it runs, or "
                "for a database null and MLFLOW_TRACKING_URI there"
            )
        return uri


ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]


class Distributed(_Section):
    """How many processes train a stage, on how many machines, and what of the model each of them holds."""

    processes: Positive | None = None
    """Training processes of each node, one an accelerator; `null` takes `resources.accelerator_count`, or one without
    an accelerator. On a machine without accelerators they share its processors."""
    nodes: Annotated[int, Field(ge=1, le=1000)] = 1
    """Machines that train a stage together. More than one needs a cluster with Kubeflow Trainer, `resources` for each
    of them, and `resources.workspace_claim`, which all of them mount (docs/operations.md)."""
    runtime: ObjectName = "dqo-torch"
    """TrainingRuntime of Kubeflow Trainer that training over several nodes starts from; the chart's is
    `<fullname>-torch`."""
    strategy: Literal["ddp", "fsdp", "zero2", "zero3"] = "ddp"
    """`ddp`: all of the model in each process. `zero2`: gradients and optimiser state are split. `fsdp`, `zero3`: the
    weights too. All but `ddp` need accelerators, `zero2` and `zero3` the extra `gpu` (DeepSpeed)."""


Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(Ki|Mi|Gi|Ti)$")]
Hours = Annotated[float, Field(gt=0.0, le=24 * 365)]
Step = Literal["prepare", "sft", "rl", "evaluate", "register"]


class Toleration(_Section):
    """A taint that a training or evaluation task accepts."""

    key: str | None = None
    """Key of the taint; `null` with `Exists` accepts every one."""
    operator: Literal["Equal", "Exists"] = "Equal"
    """`Equal` compares the value, `Exists` takes any."""
    value: str | None = None
    """Value of the taint; of `Equal` only."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; `null` accepts every one."""

    @model_validator(mode="after")
    def _makes_sense(self) -> "Toleration":
        if self.operator == "Exists" and self.value is not None:
            raise ValueError(f"operator 'Exists' takes no value, got {self.value!r}; expected 'Equal', or no value")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("operator 'Equal' needs key; expected the taint's key, or 'Exists' for every taint")
        return self


class NodeExpression(_Section):
    """What a node's label has to say."""

    key: Annotated[str, Field(min_length=1)]
    """The label."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = "In"
    """How it is compared."""
    values: list[str] = []
    """Values of `In` and `NotIn`, one number for `Gt` and `Lt`; none otherwise."""

    @model_validator(mode="after")
    def _values_fit(self) -> "NodeExpression":
        alone = self.operator in ("Exists", "DoesNotExist")
        fits = not self.values if alone else len(self.values) == 1 if self.operator in ("Gt", "Lt") else self.values
        if not fits:
            expected = "no values" if alone else "one value" if self.operator in ("Gt", "Lt") else "one value or more"
            raise ValueError(f"operator {self.operator!r} of key {self.key!r} with {self.values}; expected {expected}")
        return self


class NodeTerm(_Section):
    """A kind of node: every expression has to hold."""

    expressions: Annotated[list[NodeExpression], Field(min_length=1)]
    """What its labels have to say."""
    weight: Annotated[int, Field(ge=1, le=100)] | None = None
    """How much it is preferred; `null` demands it. Of several terms that are demanded, one has to hold."""


class Secrets(_Section):
    """Names of Kubernetes Secrets whose keys become environment variables of the tasks (docs/operations.md)."""

    tracking: ObjectName | None = None
    """Keys `username` and `password` of an MLflow user: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    storage: ObjectName | None = None
    """Keys `access-key-id` and `secret-access-key`: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, where MLflow has its
    clients talk to the object store themselves."""
    hub: ObjectName | None = None
    """Key `token`: HF_TOKEN, for gated models and data sets."""
    judge: ObjectName | None = None
    """Key `api-key`: the variable that `judge.api_key_env` names."""


class Retries(_Section):
    """How often Kubeflow starts a failed task again; training goes on from its newest checkpoint in the workspace."""

    count: Annotated[int, Field(ge=0, le=20)] = 2
    """Further attempts of each task."""
    backoff_seconds: Positive = 60
    """Pause before the first of them."""
    backoff_factor: Annotated[float, Field(ge=1.0)] = 2.0
    """The pause grows by this factor each time."""
    within_hours: Hours = 336
    """No attempt is begun later than this after the start of the first one, however long that one trained."""


_GPU = "nvidia.com/gpu"
_GPU_TAINT = {"key": _GPU, "operator": "Exists", "effect": "NoSchedule"}
PROFILES: dict[str, dict[str, Any]] = {
    "cpu": {},
    "gpu-small": {
        "cpu": "8", "memory": "64Gi", "accelerator": _GPU, "accelerator_count": 1, "shared_memory": "8Gi",
        "tolerations": [_GPU_TAINT],
    },
    "gpu-large": {
        "cpu": "32", "memory": "256Gi", "accelerator": _GPU, "accelerator_count": 4, "shared_memory": "32Gi",
        "tolerations": [_GPU_TAINT],
    },
    "multi-node": {
        "cpu": "64", "memory": "512Gi", "accelerator": _GPU, "accelerator_count": 8, "shared_memory": "64Gi",
        "tolerations": [_GPU_TAINT],
    },
}  # fmt: skip
"""What each profile sets of `Resources`; a recipe's own values go before."""


class Resources(_Section):
    """What tasks get on a cluster; the local runner uses this machine as it is.

    A field that a recipe leaves out is what its profile says; the defaults below are those of `cpu`.
    """

    profile: Literal["cpu", "gpu-small", "gpu-large", "multi-node"] = "cpu"
    """`gpu-small`: one GPU; `gpu-large`: four of one node; `multi-node`: eight of each node (docs/operations.md)."""
    image: str = "dqo-trainer:0.1.0"
    """Container image with this library, by digest in production."""
    cpu: Annotated[str, Field(pattern=r"^\d+m?$")] = "2"
    """CPU request of a training or evaluation task, Kubernetes quantity."""
    memory: Quantity = "8Gi"
    """Memory limit of a training or evaluation task, Kubernetes quantity."""
    accelerator: str | None = None
    """Resource name of the accelerator, e.g. `nvidia.com/gpu`."""
    accelerator_count: Annotated[int, Field(ge=1)] = 1
    """Accelerators of each training task, when `accelerator` is set; `distributed.processes` follows."""
    shared_memory: Quantity | None = None
    """Size of /dev/shm, part of the memory limit; `null` leaves the container's 64 MiB, too little for NCCL."""
    node_selector: dict[str, str] = {}
    """Labels that the node of a training or evaluation task has to have."""
    tolerations: list[Toleration] = []
    """Taints that these tasks accept."""
    node_affinity: list[NodeTerm] = []
    """Nodes that these tasks demand or prefer."""
    queue: ObjectName | None = None
    """LocalQueue of Kueue in which these tasks wait for their resources."""
    workspace_claim: ObjectName | None = None
    """Volume claim mounted at /workspace in all tasks: checkpoints, finished stages; without, nothing resumes."""
    models_claim: ObjectName | None = None
    """Volume claim mounted at /models in all tasks: Hugging Face's cache below `huggingface`, models by path."""
    offline: bool = False
    """Whether tasks may not ask a model hub: HF_HUB_OFFLINE."""
    secrets: Secrets = Secrets()
    environment: dict[str, str] = {}
    """Further environment variables of all tasks, e.g. `MLFLOW_S3_ENDPOINT_URL`; secrets have their own section."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When nodes fetch the image; `null` leaves it to Kubernetes."""
    image_pull_secrets: list[ObjectName] = []
    """Secrets with registry credentials."""
    run_as_user: Annotated[int, Field(ge=1)] | None = 10001
    """User id of all tasks, never root; `null` takes the image's."""
    run_as_group: Annotated[int, Field(ge=0)] | None = 10001
    """Group id of all tasks; `null` takes the image's."""
    retries: Retries = Retries()
    timeouts: dict[Step, Hours] = {}
    """Hours after which Kubernetes ends an attempt of a step, e.g. `{rl: 24}`; a step that is not named may go on."""
    caching: dict[Step, bool] = {}
    """Whether Kubeflow may take a step's earlier output when its inputs are equal, e.g. `{evaluate: false}`; a step
    that is not named may, but for `prepare`, whose data may have changed unseen, and `evaluate` with a judge, which may
    have been away. Stages that the workspace holds are taken up all the same."""

    @model_validator(mode="before")
    @classmethod
    def _profile_fills_in(cls, values: Any) -> Any:
        profile = values.get("profile") if isinstance(values, dict) else None
        return PROFILES.get(profile, {}) | values if isinstance(profile, str) else values

    @field_validator("environment")
    @classmethod
    def _holds_no_secret(cls, environment: dict[str, str]) -> dict[str, str]:
        for name, value in environment.items():
            # The value is not repeated: it may be the secret.
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no name of an environment variable")
            secret = r"(PASSWORD|PASSWD|TOKEN|SECRET|CREDENTIALS|(ACCESS|API|PRIVATE|SECRET)_?KEY)(_ID)?$"
            if re.search(secret, name.upper()) or holds_credentials(value):
                raise ValueError(
                    f"{name} would be readable in the compiled pipeline; expected a Secret's name in resources.secrets"
                )
        return environment

    @model_validator(mode="after")
    def _shared_memory_fits(self) -> "Resources":
        if self.shared_memory is not None and _bytes(self.shared_memory) >= _bytes(self.memory):
            raise ValueError(
                f"shared_memory {self.shared_memory} is part of memory {self.memory}; expected less than that"
            )
        return self


def _bytes(quantity: str) -> float:
    """Bytes of a Kubernetes quantity with a binary suffix."""
    return float(quantity[:-2]) * 2 ** (10 * (1 + "KMGT".index(quantity[-2])))


def smallest_p_value(prompts: int) -> float:
    """The smallest two-sided p-value that `dqo.evaluation.statistics.paired_p_value` can give.

    All sides swapped, or none: 2 of 2^prompts ways; with more prompts, one of 9,999 random swaps and what is seen.
    """
    return max(2.0 ** (1 - min(prompts, 64)), 1e-4)


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
    """A judge of the responses besides the reward; `null` has none."""
    gate: Gate = Gate()
    registry: Registry = Registry()
    tracking: Tracking = Tracking()
    distributed: Distributed = Distributed()
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
        problems += self._processes_fit()
        if self.resources.secrets.judge and (self.judge is None or self.judge.api_key_env is None):
            problems.append(
                f"resources.secrets.judge: got {self.resources.secrets.judge!r}, but no variable is to hold its key; "
                "expected judge.api_key_env, or no Secret"
            )
        for name, stage, k in (("sft", self.sft, self.sft_group), ("rl", self.rl, self.method.k)):
            rows = stage.prompts_per_step * k
            each = f"{name}.prompts_per_step = {stage.prompts_per_step} times {k}"
            if rows % self.processes:
                problems.append(
                    f"{name}.prompts_per_step: got {stage.prompts_per_step}; expected a step whose {rows} sequences "
                    f"({each}) divide over {self.processes} processes"
                )
            elif stage.micro_batch is not None and rows // self.processes % stage.micro_batch:
                among = "" if self.processes == 1 else f" in each of {self.processes} processes"
                problems.append(
                    f"{name}.micro_batch: got {stage.micro_batch}; expected a divisor of the {rows // self.processes} "
                    f"sequences of a step{among} ({each})"
                )
        if self.judge is not None and self.judge.reward is not None and self.judge.reward.model == self.reward.model:
            problems.append(
                f"judge.reward.model: got {self.reward.model!r}, the model whose score is the reward; expected another "
                "one, since quality is what this one says"
            )
        if self.sft.alpha > 0 and self.method.combine == "multiply":
            problems.append(
                f"sft.alpha: got {self.sft.alpha:g} with method.combine 'multiply', but SFT has no quality for a share "
                "to multiply; expected 0, or combine 'add'"
            )
        problems += self._defences_fit()
        problems += _health_problems(self.rl, self.method)
        problems += self._gate_fits()
        if problems:
            raise ValueError("\n".join(problems))  # a line each, see _readable
        return self

    def _defences_fit(self) -> list[str]:
        """Conditions of a bonus that every response meets, or none."""
        problems = []
        defences, most = self.method.defences, self.rl.sampling.max_new_tokens
        if defences.quality_gate == "group" and defences.min_quality is None:
            problems.append(
                "method.defences.quality_gate: got 'group' without method.defences.min_quality, which it is about; "
                "expected a quality to reach, or 'member'"
            )
        if defences.max_tokens is not None and defences.max_tokens >= most:
            problems.append(
                f"method.defences.max_tokens: got {defences.max_tokens}; expected less than rl.sampling.max_new_tokens "
                f"= {most}, which no response exceeds, or drop_truncated for those that reach it"
            )
        floor, model = defences.min_quality, self.reward.kind == "model"
        if floor is not None and (not model or self.reward.squash):
            if floor <= 0:
                problems.append(
                    f"method.defences.min_quality: got {floor:g}, which every response reaches: this reward is 0 at "
                    "least; expected more than 0, or null"
                )
            elif floor > 1 or (model and floor == 1):
                bound, words = ("below 1", "less than") if model else ("1 at most", "at most")
                problems.append(
                    f"method.defences.min_quality: got {floor:g}, which no response reaches: this reward is {bound}; "
                    f"expected {words} 1"
                )
        return problems

    def _gate_fits(self) -> list[str]:
        """What of the gate and the judge can never hold."""
        problems = []
        gate, evaluation = self.gate, self.evaluation
        if self.judge is not None and self.judge.responses > evaluation.n:
            problems.append(
                f"judge.responses: got {self.judge.responses}; expected at most evaluation.n = {evaluation.n}"
            )
        if gate.judge is not None and self.judge is None:
            problems.append("gate.judge: asks for a judge, and the recipe names none; expected a section `judge`")
        if gate.diversity_needed == "any" and gate.diversity_test != "holm":
            problems.append(
                f"gate.diversity_needed: got 'any' with gate.diversity_test {gate.diversity_test!r}, under which one "
                "of several metrics may hold by chance; expected diversity_test 'holm', or 'all'"
            )
        metrics = len(set(gate.more_diverse_on)) if gate.diversity_test == "holm" else 1
        smallest, level = metrics * smallest_p_value(evaluation.prompts), 1 - evaluation.confidence
        if gate.diversity_test != "apart" and smallest > level + 1e-12:
            problems.append(
                f"gate.diversity_test: got {gate.diversity_test!r}, which can never hold: over {evaluation.prompts} "
                f"prompts{f' and {metrics} metrics' if metrics > 1 else ''} no p-value is below {smallest:.2g}, and "
                f"evaluation.confidence asks for {level:.2g}; expected more evaluation.prompts, a lower confidence or "
                "'apart'"
            )
        by_interval = {
            "gate.diversity_test 'apart'": gate.diversity_test == "apart",
            "gate.quality_test 'non_inferior'": gate.quality_test == "non_inferior",
            "gate.max_length_change": gate.max_length_change is not None,
            "gate.max_truncation_increase": gate.max_truncation_increase is not None,
            "gate.max_duplicate_increase": gate.max_duplicate_increase is not None,
            "gate.judge.decided_by 'low'": gate.judge is not None and gate.judge.decided_by == "low",
        }
        rules = [name for name, asked in by_interval.items() if asked]
        if evaluation.prompts < 2 and rules:
            problems.append(
                f"evaluation.prompts: got {evaluation.prompts}, of which no interval can be made; expected 2 or more "
                f"for {', '.join(rules)}"
            )
        return problems

    def _processes_fit(self) -> list[str]:
        """What is wrong with the number of processes and the strategy."""
        problems = []
        accelerators, strategy = self.resources.accelerator_count, self.distributed.strategy
        if self.resources.accelerator is None and accelerators > 1:
            problems.append(
                f"resources.accelerator_count: got {accelerators} without resources.accelerator; expected its name, "
                "e.g. nvidia.com/gpu, or distributed.processes for processes without accelerators"
            )
        elif self.resources.accelerator is not None and self.processes_per_node != accelerators:
            problems.append(
                f"distributed.processes: got {self.processes_per_node} with resources.accelerator_count {accelerators}"
                "; expected one process an accelerator: leave distributed.processes out, or give both the same number"
            )
        problems += self._nodes_fit()
        if strategy != "ddp" and self.processes == 1:
            problems.append(
                f"distributed.strategy: got {strategy!r} with one process, which has nobody to split the model with; "
                "expected 'ddp', or more processes"
            )
        if strategy != "ddp" and self.sft.alpha > 0 and self.rl.sampling.temperature != 1.0:
            problems.append(
                f"rl.sampling.temperature: got {self.rl.sampling.temperature} with sft.alpha > 0 and "
                f"distributed.strategy {strategy!r}, whose head would divide the demonstrations' logits by it; "
                "expected 1.0, sft.alpha 0, or 'ddp'"
            )
        if strategy == "zero3" and self.policy.lora is not None and self.policy.dtype != "float32":
            problems.append(
                f"distributed.strategy: got 'zero3' with policy.lora and policy.dtype {self.policy.dtype!r}; "
                "DeepSpeed's ZeRO-3 cannot gather float32 adapters beside bfloat16 weights (huggingface/trl#6089); "
                "expected 'fsdp', 'zero2', policy.dtype 'float32' or policy.lora null"
            )
        rollout = self.rl.rollout
        if rollout.engine != "vllm":
            return problems
        if self.processes_per_node % rollout.tensor_parallel_size:
            problems.append(
                f"rl.rollout.tensor_parallel_size: got {rollout.tensor_parallel_size}; expected a divisor of the "
                f"{self.processes_per_node} training processes" + (" of a node" if self.distributed.nodes > 1 else "")
            )
        longest = self.data.max_prompt_tokens + self.rl.sampling.max_new_tokens
        if rollout.max_model_length is not None and rollout.max_model_length < longest:
            problems.append(
                f"rl.rollout.max_model_length: got {rollout.max_model_length}; expected at least {longest} "
                "(data.max_prompt_tokens + rl.sampling.max_new_tokens)"
            )
        return problems

    def _nodes_fit(self) -> list[str]:
        """What is missing for training on several nodes."""
        problems: list[str] = []
        nodes = self.distributed.nodes
        if nodes == 1:
            return problems
        if self.resources.accelerator is None and self.distributed.processes is None:
            problems.append(
                f"distributed.nodes: got {nodes} with neither accelerators nor a number of processes; expected "
                "resources.accelerator, or distributed.processes for processes without accelerators"
            )
        if self.resources.workspace_claim is None:
            problems.append(
                f"distributed.nodes: got {nodes} without resources.workspace_claim; expected the name of a volume "
                "claim that all nodes can write (ReadWriteMany), through which they share data and checkpoints"
            )
        return problems

    @property
    def processes(self) -> int:
        """Training processes of all nodes together."""
        return self.distributed.nodes * self.processes_per_node

    @property
    def processes_per_node(self) -> int:
        """Training processes of each node: `distributed.processes`, else one an accelerator."""
        if self.distributed.processes is not None:
            return self.distributed.processes
        return self.resources.accelerator_count if self.resources.accelerator is not None else 1

    @property
    def layout(self) -> dict[str, Any]:
        """How a stage is spread, for its key: it decides which random numbers a response is drawn with."""
        return {"processes": self.processes, "strategy": self.distributed.strategy}

    @property
    def sft_group(self) -> int:
        """Rows a prompt in SFT."""
        return self.method.k if self.sft.alpha > 0 else UNGROUPED

    @property
    def models(self) -> list[tuple[str, str | None]]:
        """Name and revision of every model that the run loads."""
        judge = self.judge.reward if self.judge is not None else None
        sections = (self.policy, self.encoder, self.reward, judge)
        return [(one.model, one.revision) for one in sections if one is not None and one.model is not None]

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
        if self.resources.profile == "multi-node" and self.distributed.nodes == 1:
            found.append(
                "resources.profile: 'multi-node' with distributed.nodes 1 trains on one node; set distributed.nodes to "
                "2 or more, or take 'gpu-large'"
            )
        method, defences = self.method, self.method.defences
        # Scores of what two responses have in common; and where one member alone earns, zero tells the two apart.
        alike = method.score not in ("likelihood", "entropy") and method.combine == "add"
        told_apart = defences.conditional and defences.unearned == "zero"
        if method.advantage == "centred" and method.k == 2 and alike:
            weights = [("alpha", method.alpha > 0 and not told_apart), ("sft.alpha", self.sft.alpha > 0)]
            idle = [name for name, affected in weights if affected]
            if idle:
                found.append(
                    "method: with k = 2 both members have the same bonus, so advantage 'centred' cancels it and "
                    f"{' and '.join(idle)} {'have' if len(idle) > 1 else 'has'} no effect; use k >= 3, or advantage "
                    "'decoupled' or 'paper'"
                )
        if defences.unearned != Defences().unearned and not defences.conditional:
            # No error: a recipe that was written out with its defaults by an earlier version holds that one's.
            found.append(
                f"method.defences.unearned: got {defences.unearned!r} without a condition that a response could fail, "
                "so it has no effect; set one of method.defences, or leave it out"
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
        if isinstance(part, int):
            continue  # place in a list, whose section is found already
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
    if "name" not in content and content.keys() & {"endpoint", "reward"}:
        content = {"name": "judge", "judge": content}
    judge = _validated(content, str(path)).judge
    if judge is None:
        raise DQOError(f"{path}: names no judge; expected a section `judge` (docs/judges.md)")
    return judge


def document(path: str | Path) -> dict[Any, Any]:
    """Read a YAML file as recipes are read: a key written twice is refused, 2e-4 is a number.

    Raises:
        DQOError: If the file cannot be read, is not UTF-8, not valid YAML or no mapping.
    """
    return _mapping(_text(path), str(path))


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
