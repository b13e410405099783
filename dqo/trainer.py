"""DQO on TRL's GRPOTrainer: the group's volume enters the advantage, nothing else of the trainer changes.

    J(theta) = E_x[ quality + alpha * E[log det(L + I)] - beta * KL ]

DQO-RL takes quality from rewards. DQO-SFT takes it from the demonstration's likelihood, log pi(y*|x), and uses rollouts
only for the volume term [ours: the paper's SFT loss is not known to us]. The rewards of TRL's batch and the responses'
embeddings are gathered over all processes before any group is formed, so a group that is split across processes is
scored whole.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Sampler
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import RepeatSampler

from dqo import generation
from dqo.advantage import group_advantages, weighted
from dqo.data import Demonstration
from dqo.defences import Defences
from dqo.determinant import log_volume
from dqo.diversity import Group, group_score
from dqo.embedding import ResponseEncoder
from dqo.errors import DQOError
from dqo.recipe import SHARES, Sampling
from dqo.rewards import tied_groups
from dqo.shared_prompt import add_shared_prompt_forward
from dqo.weight_sync import keep_frozen_weights


@dataclass
class DQOConfig(GRPOConfig):
    """GRPOConfig plus the determinantal term; `num_generations` is k."""

    alpha: float = field(default=1.0, metadata={"help": "Weight of the log-volume, in units of quality per nat."})
    advantage: Literal["paper", "centred", "decoupled"] = field(
        default="decoupled", metadata={"help": "How the bonus enters the advantage; see dqo.advantage."}
    )
    score: Literal[
        "log_volume", "elliptical", "cosine_distance", "vendi", "distinct", "similarity", "likelihood", "entropy"
    ] = field(default="log_volume", metadata={"help": "What alpha weighs; see dqo.diversity. DQO is log_volume."})
    combine: Literal["add", "multiply"] = field(
        default="add",
        metadata={"help": "Whether the bonus is added to the quality or multiplies it; see dqo.advantage."},
    )
    kernel_scale: float = field(default=1.0, metadata={"help": "Factor on the embeddings."})
    min_quality: float | None = field(default=None, metadata={"help": "Reward below which no bonus is earned."})
    quality_gate: Literal["member", "group"] = field(
        default="member", metadata={"help": "Whether each member has to reach min_quality, or one of its group."}
    )
    drop_truncated: bool = field(default=False, metadata={"help": "Truncated responses earn no bonus."})
    max_tokens: int | None = field(default=None, metadata={"help": "Longer responses earn no bonus."})
    min_prompt_similarity: float | None = field(
        default=None, metadata={"help": "Cosine similarity of prompt and response below which no bonus is earned."}
    )
    unearned: Literal["zero", "apart"] = field(
        default="zero",
        metadata={"help": "What earns no bonus gets: a bonus of 0, or its quality alone; dqo.advantage."},
    )
    distinct_threshold: float = field(
        default=0.7, metadata={"help": "Cosine similarity of equal meaning, of distinct."}
    )
    quality: Literal["reward", "demonstration"] = field(
        default="reward", metadata={"help": "DQO-RL (reward functions) or DQO-SFT (likelihood of a demonstration)."}
    )
    measure_diversity: bool = field(
        default=True, metadata={"help": "With alpha = 0, embed rollouts all the same, to log their volume."}
    )
    share_prompts: bool = field(
        default=True,
        metadata={"help": "Compute each distinct prompt once, in sampling and in the update, where the model allows."},
    )

    def __post_init__(self) -> None:
        if self.num_generations is None or self.num_generations < 2:
            raise ValueError(f"num_generations (k) must be 2 or more to span a volume, got {self.num_generations}")
        super().__post_init__()
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, got {self.alpha}")
        if self.advantage == "paper" and self.scale_rewards != "none":
            raise ValueError(
                f"advantage 'paper' is r + alpha * b as it stands; scale_rewards must be 'none', got "
                f"{self.scale_rewards!r}"
            )
        if self.combine == "multiply" and self.score not in SHARES:
            raise ValueError(f"combine 'multiply' needs a score in {SHARES}, got {self.score!r}")


class _EpochSampler(RepeatSampler):
    """TRL's sampler with an order of prompts that the epoch decides, so that resuming in a later epoch finds it again.

    TRL's draws each epoch's order from where the last one left its generator, which a resumed process does not know.
    """

    _epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader at the start of each epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + self._epoch)
        return super().__iter__()


class DQOTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages hold each response's contribution to the volume of its group.

    Args:
        encoder: Frozen sentence encoder; needed unless `alpha` is 0 and diversity is not measured.
        args: Configuration.
        reward_funcs: TRL reward functions; none for `quality="demonstration"`.
        embedded_text: Picks the words of a response that are embedded, `None` for one that earns no bonus; the whole
            response by default. See `dqo.defences.embedded_text`.
        kwargs: Everything else that `GRPOTrainer` takes. For `quality="demonstration"` the data set has a column
            `demonstrations`: per row a list of `{"input_ids", "labels"}` (see `dqo.data.encode_demonstration`).
    """

    args: DQOConfig

    def __init__(
        self,
        *,
        args: DQOConfig,
        encoder: ResponseEncoder | None = None,
        reward_funcs: Any = None,
        embedded_text: Callable[[str], str | None] = str,
        **kwargs: Any,
    ) -> None:
        if args.quality == "demonstration":
            if reward_funcs is not None:
                raise ValueError("quality='demonstration' takes no reward functions")
            reward_funcs = _no_reward
        self.encoder = encoder
        self._embedded_text = embedded_text
        self._embeds = args.alpha > 0 or (args.measure_diversity and args.quality == "reward")
        if self._embeds and encoder is None:
            raise ValueError("an encoder is needed for alpha > 0 and for measuring diversity")
        super().__init__(args=args, reward_funcs=reward_funcs, **kwargs)
        if self.use_vllm and isinstance(self.model, PeftModel):
            keep_frozen_weights(self.vllm_generation)
        wrapped: Any = self.model
        base: Any = wrapped.get_base_model() if isinstance(wrapped, PeftModel) else wrapped
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self._shares_prompts = (
            args.share_prompts and generation.shares_prompts(base.config) and not self._is_vlm and not sharded
        )
        self._scores_shared = self._shares_prompts and not args.gradient_checkpointing
        if self._scores_shared:
            add_shared_prompt_forward(base)
        elif args.quality == "demonstration" and args.temperature != 1.0:
            # TRL's fused head divides the logits by the rollouts' temperature; a likelihood has none.
            raise ValueError(f"quality='demonstration' needs temperature 1.0 for this model, got {args.temperature}")
        self._gathered_rewards = torch.empty(0)
        self._gathered_embeddings = torch.empty(0)
        self._gathered_unembedded = torch.empty(0, dtype=torch.bool)
        self._gathered_truncated = torch.empty(0, dtype=torch.bool)
        self._gathered_tokens = torch.empty(0, dtype=torch.long)
        self._gathered_similarity: Tensor | None = None
        self._defences = Defences(
            args.min_quality, args.quality_gate, args.drop_truncated, args.max_tokens, args.min_prompt_similarity
        )
        self._encoder_cut_share = 0.0
        self._likelihood_sums = torch.zeros(2)  # of the step's demonstrations in this process: nats, tokens

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        sampler: Any = super()._get_train_sampler(dataset)
        return _EpochSampler(
            sampler.data_source,
            sampler.mini_repeat_count,
            sampler.batch_size,
            sampler.repeat_count,
            sampler.shuffle,
            sampler.seed,
        )

    # Rollouts ---------------------------------------------------------------------------------------------------

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):  # type: ignore[no-untyped-def]
        handled = (
            self._shares_prompts
            and not self.use_vllm
            and not self.use_transformers_continuous_batching
            and not multimodal_fields
            and self.min_p is None
            and self.repetition_penalty == 1.0
            and self.args.generation_kwargs is None
        )
        if not handled:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
        sampling = Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k or 0,
            max_new_tokens=self.max_completion_length,
        )
        with (
            unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model,
            self.accelerator.autocast(),
        ):
            training = model.training
            model.eval()
            try:
                responses = generation.sample(
                    model, prompt_ids, sampling, self.eos_token_ids, self._tokenizer.pad_token_id
                )
            finally:
                model.train(training)
        return responses, None

    # Scoring ----------------------------------------------------------------------------------------------------

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if torch.isnan(rewards).all():
            raise DQOError(
                f"reward {', '.join(self.reward_func_names)}: no response of the step could be scored (all "
                f"{len(rewards)} rewards are None or NaN); expected at least one number"
            )
        self._gathered_rewards = rewards
        if self._embeds:
            assert self.encoder is not None
            device, gather = self.accelerator.device, self.accelerator.gather
            picked = [self._embedded_text(_text(completion)) for completion in completions]
            embedded = self.encoder([text or "" for text in picked])
            vectors = embedded.vectors.to(device)
            self._encoder_cut_share = gather(vectors.new_tensor([embedded.cut_share])).mean().item()
            # k x d floats a group are cheap to move; similarities of a part of a group are not a part of its volume.
            self._gathered_embeddings = gather(vectors)
            self._gathered_unembedded = gather(torch.tensor([text is None for text in picked], device=device))
            cut = [not ids or ids[-1] not in self.eos_token_ids for ids in completion_ids_list]
            self._gathered_truncated = gather(torch.tensor(cut, device=device))
            self._gathered_tokens = gather(torch.tensor([len(ids) for ids in completion_ids_list], device=device))
            if self.args.min_prompt_similarity is not None:
                asked = self.encoder([_text(prompt) for prompt in prompts])
                self._gathered_similarity = gather((asked.vectors.to(device) * vectors).sum(-1))
                self._log_metric("encoder_cut_share/prompts", asked.cut_share)  # averaged over processes by TRL
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        demonstrates = self.args.quality == "demonstration"
        if demonstrates and self.args.alpha == 0:
            return self._demonstrations(inputs)
        output = super()._generate_and_score_completions(inputs)
        model: Any = self.model
        mode = "train" if model.training else "eval"
        k: Any = self.num_generations if mode == "train" else self.num_generations_eval
        weights = self.reward_weights.to(self._gathered_rewards.device)
        unscorable = torch.isnan(self._gathered_rewards).all(dim=1)
        rewards = (self._gathered_rewards * weights).nansum(dim=1).masked_fill(unscorable, torch.nan).view(-1, k)
        failed = {"unscorable": unscorable.view(-1, k)}
        score = group_score(self.args.score, k, self.args.kernel_scale, self.args.distinct_threshold)
        volume = None
        if self._embeds:
            embeddings = self._gathered_embeddings.view(-1, k, self._gathered_embeddings.shape[-1])
            similarity = self._gathered_similarity
            failed = self._defences.failed(
                rewards,
                self._gathered_truncated.view(-1, k),
                self._gathered_tokens.view(-1, k),
                None if similarity is None else similarity.view(-1, k),
            ) | {"no_answer": self._gathered_unembedded.view(-1, k)}
            volume = log_volume(embeddings, ~(failed["unscorable"] | failed["no_answer"]), self.args.kernel_scale)
        earns = ~torch.stack(list(failed.values())).any(0)
        bonus = torch.zeros_like(rewards)
        if self._embeds:
            likelihood = self._log_likelihood(output).view(-1, k) if score.of_likelihood else None
            bonus = score.bonus(Group(embeddings, earns, likelihood))
        scale: Any = self.args.scale_rewards
        if self.args.combine == "multiply":
            if (rewards < 0).any():
                raise DQOError(
                    f"method.combine 'multiply': the reward {rewards.nan_to_num().min().item():g} is negative, and a "
                    "share would make it better; expected rewards of 0 and more, or combine 'add'"
                )
            product = weighted(rewards, bonus, self.args.alpha)
            advantages = group_advantages(product, torch.zeros_like(bonus), 0.0, self.args.advantage, scale)
        else:
            advantages = group_advantages(
                rewards, bonus, self.args.alpha, self.args.advantage, scale, score.middle, earns, self.args.unearned
            )
        flat = advantages.flatten()
        start = self.accelerator.process_index * len(inputs)
        output["advantages"] = flat[start : start + len(inputs)]
        self._log_group_metrics(mode, rewards, bonus, volume, failed)
        logged: Any = self._logs["advantages"]  # TRL has put its own advantages there
        for index, value in enumerate(flat.tolist(), start=len(logged) - len(flat)):
            logged[index] = value
        return output | self._demonstrations(inputs) if demonstrates else output

    def _log_likelihood(self, output: dict[str, Any]) -> Tensor:
        """Return log pi(y | x) of the step's rollouts in nats, gathered over all processes, `(groups * k,)`."""
        log_probs = output.get("old_per_token_logps")
        if log_probs is None:
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
            mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
            with torch.no_grad():
                log_probs, _, _ = self._get_per_token_logps_and_entropies(
                    self.model, ids, mask, output["completion_ids"].shape[1], self.args.per_device_train_batch_size
                )
        gathered: Tensor = self.accelerator.gather((log_probs * output["completion_mask"]).sum(-1))
        return gathered

    def _log_group_metrics(
        self, mode: str, rewards: Tensor, bonus: Tensor, volume: Tensor | None, failed: dict[str, Tensor]
    ) -> None:
        metrics = self._metrics[mode]
        scored = ~failed["unscorable"]
        if self.args.quality == "reward":
            metrics["quality"].append(rewards[scored].mean().item())
            metrics["unscorable_rate"].append((~scored).float().mean().item())
            # TRL's own, under its name, asks whether a standard deviation is within 1e-8 of 0, which that of eight
            # times 2/3 is not; it takes the batch's for each group's where that scales the quality, and NaN, of a
            # group with fewer than two rewards, for a difference.
            metrics["frac_reward_zero_std"][-1] = tied_groups(rewards).float().mean().item()
        if volume is not None:
            metrics["bonus"].append(bonus[scored].mean().item())
            metrics["no_bonus_rate"].append(torch.stack(list(failed.values())).any(0).float().mean().item())
            for reason in set(failed) - {"unscorable"}:
                metrics[f"no_bonus_rate/{reason}"].append(failed[reason].float().mean().item())
            metrics["log_volume"].append(volume[scored.any(1)].mean().item())
            metrics["encoder_cut_share"].append(self._encoder_cut_share)
        k = rewards.shape[1]
        texts = [" ".join(_text(completion).split()).casefold() for completion in self._logs["completion"]]
        groups = [texts[start : start + k] for start in range(len(texts) - rewards.numel(), len(texts), k)]
        metrics["duplicate_rate"].append(sum(1 - len(set(group)) / k for group in groups) / len(groups))
        metrics["truncation_rate"].append(metrics["completions/clipped_ratio"][-1])
        metrics["mean_tokens"].append(metrics["completions/mean_length"][-1])

    # The update -------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(  # type: ignore[no-untyped-def]
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **kwargs,
    ):
        if not self._scores_shared or compute_aux_loss or model is self.ref_model:
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
                **kwargs,
            )
        split = input_ids.shape[1] - logits_to_keep
        pieces = []
        size = batch_size or len(input_ids)
        for start in range(0, len(input_ids), size):
            ids, mask = input_ids[start : start + size], attention_mask[start : start + size]
            prompts, rows = torch.unique(torch.cat([ids[:, :split], mask[:, :split]], 1), dim=0, return_inverse=True)
            with self.accelerator.autocast():
                scores = model(
                    input_ids=prompts[:, :split],
                    attention_mask=prompts[:, split:],
                    completion_ids=ids[:, split:],
                    completion_mask=mask[:, split:],
                    prompt_rows=rows,
                    temperature=self.temperature,
                )
            pieces.append(scores)
        log_probs = torch.cat([piece.log_probs for piece in pieces])
        return log_probs, torch.cat([piece.entropy for piece in pieces]) if compute_entropy else None, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if "demonstration_ids" not in inputs:
            return super()._compute_loss(model, inputs)
        loss = self._demonstration_loss(model, inputs)
        if "completion_ids" in inputs:
            # TRL's dr_grpo averages over the k members of a group; the objective sums them.
            loss = loss + self.num_generations * super()._compute_loss(model, inputs)
        return loss

    # Demonstrations ---------------------------------------------------------------------------------------------

    def _demonstrations(self, inputs: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """One demonstration a row, equal within a group: another one of the prompt's each step."""
        device = self.accelerator.device
        chosen = [
            Demonstration(**row["demonstrations"][self.state.global_step % len(row["demonstrations"])])
            for row in inputs
        ]
        longest = max(len(one.input_ids) for one in chosen)
        pad = self._tokenizer.pad_token_id
        ids = [one.input_ids + [pad] * (longest - len(one.input_ids)) for one in chosen]
        labels = [one.labels + [-100] * (longest - len(one.labels)) for one in chosen]
        mask = [[1] * len(one.input_ids) + [0] * (longest - len(one.input_ids)) for one in chosen]
        return {
            "demonstration_ids": torch.tensor(ids, device=device),
            "demonstration_labels": torch.tensor(labels, device=device),
            "demonstration_mask": torch.tensor(mask, device=device),
        }

    def _demonstration_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Minus the log-likelihood of the demonstrations: their sum over tokens, the mean over prompts.

        Divided by the constant `max_completion_length` like TRL's dr_grpo, so that alpha weighs nats against nats. A
        group's k rows carry its demonstration k times; each distinct row is computed once and weighted by its count
        over k, which stays right when micro-batches or processes cut a group.
        """
        packed = torch.cat(
            [inputs["demonstration_ids"], inputs["demonstration_labels"], inputs["demonstration_mask"]], 1
        )
        distinct, counts = torch.unique(packed, dim=0, return_counts=True)
        ids, labels, mask = distinct.chunk(3, dim=1)
        with self.accelerator.autocast():
            if self._scores_shared:
                log_probs = model(**_split(ids, labels, mask), temperature=1.0).log_probs
            else:
                log_probs = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
        k, rows = self.num_generations, self.args.generation_batch_size
        assert k is not None and rows is not None  # set by GRPOConfig
        weights, prompts = counts / k, rows / k
        likelihood = (log_probs.sum(-1) * weights).sum() * self.accelerator.num_processes / prompts
        tokens = ((labels[:, 1:] != -100).sum(-1) * weights).sum()
        sums = torch.stack([(log_probs.detach().sum(-1) * weights).sum(), tokens])
        logged = self._metrics["train"]["demonstration_nll"]
        if logged:  # an earlier micro-batch of the step
            sums = sums + self._likelihood_sums
        self._likelihood_sums = sums
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        logged[:] = [-total / count]
        return -likelihood / self.max_completion_length


def _split(ids: Tensor, labels: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Right-padded demonstrations, `(rows, t)`, as prompts and responses in the form of `add_shared_prompt_forward`."""
    lengths, trained = mask.sum(-1).tolist(), (labels != -100).sum(-1).tolist()
    prompts = [row[: end - count] for row, end, count in zip(ids.tolist(), lengths, trained, strict=True)]
    responses = [row[end - count : end] for row, end, count in zip(ids.tolist(), lengths, trained, strict=True)]
    input_ids, attention_mask = generation.left_pad(prompts, 0, ids.device)
    longest = max(trained)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "completion_ids": ids.new_tensor([row + [0] * (longest - len(row)) for row in responses]),
        "completion_mask": ids.new_tensor([[1] * len(row) + [0] * (longest - len(row)) for row in responses]),
        "prompt_rows": torch.arange(len(ids), device=ids.device),
    }


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    """Rollouts of DQO-SFT are judged by their volume only."""
    return [0.0] * len(completions)


def _text(completion: Any) -> str:
    """The response's text, from TRL's string or message-list form; the prompt is never embedded."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)
