r"""Calibration before training: how far qualities and bonuses differ within groups, and what alpha makes of that.

One round of rollouts from the untrained policy (or from a checkpoint) says what a recipe will meet at its first step.
Read alpha against it: the gradient sees differences within a group, so what matters is not how large the bonus is but
how far it differs between the members, beside how far their qualities do.

    s_q = sqrt(mean over groups of var(quality advantage)),   s_b = sqrt(mean over groups of var(bonus))
    share(alpha) = alpha s_b / s_q,                           alpha(share) = share s_q / s_b              [ours]

with Bessel's correction, over members that count, and the quality advantage as `dqo.advantage` computes it (so that
`method.quality_scale` is in it). What counts for the bonus is what does in the advantage: under `unearned: zero` every
response with a reward, with a bonus of 0 where it earns none; under `apart` those that earn one. The share is that of
the first step: as training raises the quality, its spread shrinks and the same alpha weighs more.

Where `method.defences` keep responses from earning, the recipe's score is also measured as if all of them did
(`Calibration.ungated`): an untrained policy may reach no `min_quality` at all, and SFT comes before RL.

    result = calibrate(load("recipes/quickstart.yaml"))
    print(result.balanced_alpha, *result.reasoning, sep="\n")
"""

import inspect
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dqo.advantage import group_advantages
from dqo.checkpoint import CheckpointCard
from dqo.data import prepare, read_rows
from dqo.defences import Defences, embedded_text
from dqo.defences import check as check_defences
from dqo.diversity import Group, group_score
from dqo.embedding import ResponseEncoder
from dqo.errors import DQOError
from dqo.evaluation.statistics import Interval, bootstrap_interval
from dqo.files import read_jsonl
from dqo.generation import Response, left_pad, sample_texts, shares_prompts
from dqo.policy import default_device, end_of_turn_ids, load_for_inference, load_tokenizer, stop_ids
from dqo.recipe import Method, Recipe
from dqo.rewards import TIE, build, score, tied_groups
from dqo.shared_prompt import add_shared_prompt_forward
from dqo.tasks import get_task

PAIRS = Path(__file__).with_name("encoder_pairs.jsonl")
"""Labelled pairs of sentences; see encoder_pairs.LICENSE.md."""

SHARE = 0.25
"""Share of the quality's spread that the balanced alpha gives to the bonus [ours]."""

_DRAWS = 2000
# Scores this near to 0 or 1 are beyond 6.9 in the reward model's unit; a tenth of them is worth a remark [ours].
_SATURATED, _SATURATED_SHARE = 1e-3, 0.1
_REFERENCE_PROMPTS = 100
# What the update costs in forward passes of the same sequences, a rule of thumb [ours]: the backward pass costs one
# forward for the gradients of activations and another for those of the weights, which frozen weights do not need.
_PASSES_ADAPTER, _PASSES_FULL = 2, 3


@dataclass(frozen=True)
class Spread:
    """How far the members of a group differ.

    Attributes:
        std: Square root of the mean over groups of the variance within a group, Bessel's correction.
        range: Mean over groups of the largest minus the smallest value.
        mean: Mean over all members that count.
        groups: Groups with two members or more that count; only they are in `std` and `range`.
    """

    std: float
    range: float
    mean: float
    groups: int


@dataclass(frozen=True)
class ScoreCalibration:
    """One group score on the sampled groups.

    Attributes:
        name: As `method.score` calls it.
        bonus: Spread of its bonus.
        balanced_alpha: The alpha at which the bonus's spread is `share` of the quality's; `None` where one is zero.
        share: What the recipe's alpha makes of this score: alpha times its spread over the quality's; `None` where
            the qualities do not differ.
    """

    name: str
    bonus: Spread
    balanced_alpha: float | None
    share: float | None


@dataclass(frozen=True)
class Lengths:
    """Tokens of the responses.

    Attributes:
        mean: Mean.
        median: Median.
        p95: The length that 95 % do not exceed.
        longest: The longest.
        limit: `rl.sampling.max_new_tokens`.
        truncated: Share of the responses that were cut there.
    """

    mean: float
    median: float
    p95: float
    longest: int
    limit: int
    truncated: float


@dataclass(frozen=True)
class References:
    """Whether the encoder sees that references belong to one prompt.

    Attributes:
        prompts: Prompts with two references or more.
        within: Mean cosine similarity of two references of one prompt.
        between: Of references of different prompts.
        auc: Probability that a pair of the first kind is the more similar one.
    """

    prompts: int
    within: float
    between: float
    auc: float


@dataclass(frozen=True)
class EncoderCheck:
    """Whether the encoder tells the same meaning in other words from another answer.

    Attributes:
        similarity: Kind of pair (`paraphrase`, `same_topic`, `unrelated`) -> mean cosine similarity.
        auc_same_topic: Probability that a paraphrase is more similar than another answer about the same things; 0.5 is
            chance.
        auc_unrelated: The same against an unrelated sentence.
        linked: Kind of pair -> share that `method.distinct_threshold` takes for one meaning.
        references: Of the training prompts; `None` where no prompt has two.
    """

    similarity: dict[str, Interval]
    auc_same_topic: Interval
    auc_unrelated: Interval
    linked: dict[str, float]
    references: References | None


@dataclass(frozen=True)
class Cost:
    """Seconds of one RL step with the recipe's processes, each as fast as the one here.

    A process does its share of a step; what they tell each other is not in it. Samples are drawn here by transformers,
    whatever `rl.rollout.engine` says.

    Attributes:
        sampling: Measured on a process's share.
        reward: The same.
        embedding: The same.
        update: An estimate: a measured forward pass over the responses, times what a backward pass costs beside it.
        steps: `rl.steps`.
        variants: Trainings of that length: `dqo` and the baselines.
        processes: The recipe's, among which a step is divided.
        engine: What samples in the recipe's training.
    """

    sampling: float
    reward: float
    embedding: float
    update: float
    steps: int
    variants: int
    processes: int
    engine: str

    @property
    def step(self) -> float:
        """All of a step; an estimate, as it holds one."""
        return self.sampling + self.reward + self.embedding + self.update

    @property
    def run(self) -> float:
        """RL of all variants."""
        return self.step * self.steps * self.variants


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` has measured.

    Attributes:
        recipe: Name of the recipe.
        digest: Its digest.
        policy: The base model, or the checkpoint's folder.
        prompts: Training prompts that were sampled.
        k: Responses a prompt.
        alpha: The recipe's.
        score: The recipe's.
        share: What `balanced_alpha` balances for.
        quality: Spread of the reward.
        quality_advantage_std: The spread `std` of the quality's part of the advantage; that of the reward unless
            `method.quality_scale` divides it.
        unscorable: Share of responses without a reward.
        no_bonus: Share of responses that earn none, by `method.defences` or for want of a reward.
        ungated: The recipe's score as it would be if every response with a reward, and with something to embed, earned
            its bonus; `None` where they do.
        saturated: Share of scores of a squashed reward model within 1e-3 of 0 or 1, where it hardly tells responses
            apart; `None` for another reward.
        tied_groups: Share of groups whose rewards are all equal.
        tied_pairs: Share of pairs within groups whose rewards are equal.
        scores: Every group score; the recipe's is first.
        lengths: Tokens.
        encoder_cut: Share of responses that the encoder reads in part only.
        encoder_cut_shares: The same of `prompts` and `references`, as far as similarities are taken to them.
        encoder: What the encoder tells apart.
        cost: Seconds.
        reasoning: What follows for alpha, in words.
        remarks: What is worth a look.
        problems: What makes training as the recipe has it pointless; empty where nothing does.
        responses: A row a prompt: `id`, `prompt`, `responses`, `qualities`, `bonuses`, `tokens`, `truncated`.
    """

    recipe: str
    digest: str
    policy: str
    prompts: int
    k: int
    alpha: float
    score: str
    share: float
    quality: Spread
    quality_advantage_std: float
    unscorable: float
    no_bonus: float
    saturated: float | None
    tied_groups: float
    tied_pairs: float
    scores: list[ScoreCalibration]
    ungated: ScoreCalibration | None
    lengths: Lengths
    encoder_cut: float
    encoder_cut_shares: dict[str, float]
    encoder: EncoderCheck
    cost: Cost
    reasoning: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    responses: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def balanced_alpha(self) -> float | None:
        """The recipe's score's."""
        return self.scores[0].balanced_alpha

    def to_json(self) -> str:
        """Everything but the responses as JSON; what is not a number is null."""
        document = {name: value for name, value in asdict(self).items() if name != "responses"}
        document["cost"] |= {"step": self.cost.step, "run": self.cost.run}
        return json.dumps(_plain(document), indent=1, allow_nan=False) + "\n"


def calibrate(
    recipe: Recipe,
    prompts: int = 16,
    checkpoint: Path | None = None,
    share: float = SHARE,
    tell: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Sample groups on training prompts and measure; nothing is trained.

    What is sampled follows from the recipe's seed; only the seconds differ between calls.

    Args:
        recipe: The recipe.
        prompts: Training prompts to sample; fewer are used when there are fewer.
        checkpoint: Folder of a trained checkpoint, e.g. the output of SFT; `None` takes the base model.
        share: Share of the quality's spread that `balanced_alpha` gives to the bonus.
        tell: Called with what is being done, for a display.

    Raises:
        DQOError: If a number is out of range, the data or a model cannot be used, the checkpoint is of another base
            model, or no group holds two responses with a reward.
    """
    if prompts < 1:
        raise DQOError(f"prompts: got {prompts}; expected 1 or more")
    if not (math.isfinite(share) and share > 0):
        raise DQOError(f"share: got {share}; expected a finite number above 0")
    if checkpoint is not None and (base := CheckpointCard.read(checkpoint).base_model) != recipe.policy.model:
        raise DQOError(
            f"{checkpoint}: trained from {base!r}, but the recipe's policy.model is {recipe.policy.model!r}; expected "
            "a checkpoint of the recipe's model"
        )
    device, task = default_device(), get_task(recipe.task)
    check_defences(recipe, task)
    tell("preparing the data")
    tokenizer = load_tokenizer(recipe.policy)
    with tempfile.TemporaryDirectory() as folder:
        prepare(recipe, task, tokenizer, Path(folder) / "data", stop_ids(recipe.policy))
        train = read_rows(Path(folder) / "data" / "train.jsonl")
    random.Random(recipe.seed).shuffle(train)
    rows = train[:prompts]

    tell("loading the models")
    reward = build(recipe, task, device)
    encoder = ResponseEncoder(recipe.encoder, device)
    model = load_for_inference(recipe.policy, device, checkpoint)
    if shares_prompts(model.config) and not recipe.policy.gradient_checkpointing:
        add_shared_prompt_forward(model)
    method, k = recipe.method, recipe.method.k
    step = recipe.rl.prompts_per_step

    groups: list[list[Response]] = []
    qualities: list[list[float | None]] = []
    vectors, similarities, unembedded, likelihoods = [], [], [], []
    cut_shares: list[dict[str, float]] = []
    pick = embedded_text(method.defences.embed, method.defences.strip_reasoning, task)
    cut, seconds = 0.0, _Stopwatch(device)
    for start in range(0, len(rows), step):
        batch = rows[start : start + step]
        tell(f"sampling, {start} of {len(rows)} prompts")
        asked = [row["prompt"] for row in batch]
        count = len(batch) * k
        with seconds("sampling", count):
            generator = torch.Generator(device).manual_seed(recipe.seed * 1_000_003 + start)
            ends = end_of_turn_ids(tokenizer, model)
            drawn = sample_texts(model, tokenizer, asked, k, recipe.rl.sampling, ends, generator)
        texts = [one.text for group in drawn for one in group]
        with seconds("reward", count):
            values = score(reward, texts, [row for row in batch for _ in range(k)])
        cut_shares.append(getattr(reward, "cut_shares", {}))
        with seconds("embedding", count):
            picked = [pick(text) for text in texts]
            embedded = encoder([text or "" for text in picked])
        vectors.append(embedded.vectors.view(len(batch), k, -1).cpu())
        unembedded += [[text is None for text in picked[at : at + k]] for at in range(0, count, k)]
        if method.defences.min_prompt_similarity is not None:
            questions = encoder(["".join(message["content"] for message in prompt) for prompt in asked])
            similarities.append((questions.vectors.cpu().unsqueeze(1) * vectors[-1]).sum(-1))
            cut_shares.append({"prompts": questions.cut_share})
        with seconds("forward", count):
            likelihoods.append(_log_likelihood(model, tokenizer, asked, drawn, recipe).view(-1, k).cpu())
        cut += embedded.cut_share * count
        groups += drawn
        qualities += [values[at : at + k] for at in range(0, count, k)]

    rewards = torch.tensor([[math.nan if q is None else q for q in group] for group in qualities], dtype=torch.float64)
    scored = ~rewards.isnan()
    if not scored.any():
        raise DQOError(
            f"reward {reward.name!r}: none of the {scored.numel()} responses could be scored (None or NaN); expected "
            "at least one number"
        )
    if not (scored.sum(1) > 1).any():
        raise DQOError(
            f"reward {reward.name!r}: no group of {k} holds two responses with a reward, so nothing can be compared "
            f"within a group ({int(scored.sum())} of {scored.numel()} responses have one)"
        )
    embeddings = torch.cat(vectors)
    truncated = torch.tensor([[one.truncated for one in group] for group in groups])
    failed = Defences(**method.defences.model_dump(exclude={"embed", "strip_reasoning", "unearned"})).failed(
        rewards,
        truncated,
        torch.tensor([[one.tokens for one in group] for group in groups]),
        torch.cat(similarities) if similarities else None,
    ) | {"no_answer": torch.tensor(unembedded)}
    earns = ~torch.stack(list(failed.values())).any(0)
    quality = spread(rewards, scored)
    advantage = group_advantages(
        rewards, torch.zeros_like(rewards), 0.0, method.advantage, method.quality_scale, earns=earns
    )
    advantage_std = spread(advantage, scored).std
    likelihood = torch.cat(likelihoods)
    counted = earns if method.defences.unearned == "apart" else scored
    names = list(get_args(Method.model_fields["score"].annotation))
    names.sort(key=lambda name: name != method.score)  # the recipe's first, the others as they are
    measured = [
        _score(name, method, Group(embeddings, earns, likelihood), counted, rewards, advantage_std, share)
        for name in names
    ]
    bonuses = measured[0][1]
    ungated, able = None, scored & ~failed["no_answer"]
    if not torch.equal(earns, able):
        everyone = Group(embeddings, able, likelihood)
        ungated, _ = _score(method.score, method, everyone, able, rewards, advantage_std, share)

    tell("checking the encoder")
    equal_groups, equal_pairs = ties(rewards)
    tokens = np.array([one.tokens for group in groups for one in group])
    per_response = {name: seconds.per_response(name) for name in ("sampling", "reward", "embedding", "forward")}
    rows_of_step = step * k / recipe.processes
    result = Calibration(
        recipe=recipe.name,
        digest=recipe.digest,
        policy=recipe.policy.model if checkpoint is None else str(checkpoint),
        prompts=len(rows),
        k=k,
        alpha=method.alpha,
        score=method.score,
        share=share,
        quality=quality,
        quality_advantage_std=advantage_std,
        unscorable=1 - scored.double().mean().item(),
        no_bonus=1 - earns.double().mean().item(),
        saturated=_saturated(recipe, rewards[scored]),
        tied_groups=equal_groups,
        tied_pairs=equal_pairs,
        scores=[one for one, _ in measured],
        ungated=ungated,
        lengths=Lengths(
            mean=float(tokens.mean()),
            median=float(np.median(tokens)),
            p95=float(np.quantile(tokens, 0.95)),
            longest=int(tokens.max()),
            limit=recipe.rl.sampling.max_new_tokens,
            truncated=truncated.double().mean().item(),
        ),
        encoder_cut=cut / scored.numel(),
        encoder_cut_shares={
            name: float(np.mean([one[name] for one in cut_shares if name in one]))
            for name in sorted({name for one in cut_shares for name in one})
        },
        encoder=check_encoder(encoder, recipe, [row["references"] for row in train[:_REFERENCE_PROMPTS]]),
        cost=Cost(
            sampling=per_response["sampling"] * rows_of_step,
            reward=per_response["reward"] * rows_of_step,
            embedding=per_response["embedding"] * rows_of_step,
            update=per_response["forward"] * rows_of_step * _passes(recipe),
            steps=recipe.rl.steps,
            variants=len(recipe.variants),
            processes=recipe.processes,
            engine=recipe.rl.rollout.engine,
        ),
        responses=[
            {
                "id": row["id"],
                "prompt": row["prompt"][-1]["content"],
                "responses": [one.text for one in group],
                "qualities": values,
                "bonuses": [round(value, 6) for value in bonus],
                "tokens": [one.tokens for one in group],
                "truncated": [one.truncated for one in group],
            }
            for row, group, values, bonus in zip(rows, groups, qualities, bonuses.tolist(), strict=True)
        ],
    )
    result.reasoning.extend(_reasoning(result, recipe))
    # What the base model does not earn, it may after SFT, which comes before RL.
    unreached = checkpoint is None and result.no_bonus == 1 and ungated is not None and _differs(ungated.bonus)
    result.problems.extend(_problems(result, unreached))
    result.remarks.extend(_remarks(result, recipe, prompts, unreached))
    return result


def spread(values: Tensor, counted: Tensor) -> Spread:
    """How far values differ within their groups.

    Args:
        values: Shape `(groups, k)`; anything where not counted.
        counted: Boolean, shape `(groups, k)`.

    Returns:
        See `Spread`; `std` and `range` are nan when no group has two members that count.
    """
    members = [row[mask] for row, mask in zip(values.double(), counted, strict=True)]
    compared = [row for row in members if len(row) > 1]
    together = torch.cat(members)
    if not compared:
        return Spread(math.nan, math.nan, together.mean().item(), 0)
    return Spread(
        std=math.sqrt(float(np.mean([row.var().item() for row in compared]))),
        range=float(np.mean([(row.max() - row.min()).item() for row in compared])),
        mean=together.mean().item(),
        groups=len(compared),
    )


def ties(rewards: Tensor) -> tuple[float, float]:
    """Share of groups whose rewards are all equal (`dqo.rewards.tied_groups`), and of pairs within groups.

    Args:
        rewards: Shape `(groups, k)`; NaN where a response could not be scored.
    """
    equal_pairs, pairs = 0, 0
    for row in rewards:
        values = row[~row.isnan()]
        same = ((values.unsqueeze(0) - values.unsqueeze(1)).abs() <= TIE).triu(1).sum().item()
        equal_pairs, pairs = equal_pairs + int(same), pairs + len(values) * (len(values) - 1) // 2
    return tied_groups(rewards).double().mean().item(), equal_pairs / pairs if pairs else math.nan


def _saturated(recipe: Recipe, scores: Tensor) -> float | None:
    if recipe.reward.kind != "model" or not recipe.reward.squash:
        return None
    return ((scores < _SATURATED) | (scores > 1 - _SATURATED)).double().mean().item()


def _score(
    name: str, method: Method, group: Group, counted: Tensor, rewards: Tensor, quality_std: float, share: float
) -> tuple[ScoreCalibration, Tensor]:
    """One score on the sampled groups, and its bonuses, which are 0 outside the group's mask.

    Where the recipe multiplies, what its score adds to a reward r is alpha r (s - 1), so that r (s - 1) is its bonus.

    Args:
        name: The score.
        method: The recipe's.
        group: Its mask holds those that earn a bonus.
        counted: Members over which the bonus is compared, boolean, shape `(groups, k)`.
        rewards: Shape `(groups, k)`.
        quality_std: Spread of the quality's part of the advantage.
        share: Share of it that the balanced alpha gives to the bonus.
    """
    assert group.mask is not None
    bonus = group_score(name, method.k, method.kernel_scale, method.distinct_threshold).bonus(group)
    if name == method.score and method.combine == "multiply":
        bonus = (rewards * (bonus - 1)).where(group.mask, 0.0)
    part = spread(bonus, counted) if counted.any() else Spread(math.nan, math.nan, math.nan, 0)
    balanced = share * quality_std / part.std if _differs(part) and quality_std > 0 else None
    if balanced is not None and balanced > 1 and name == method.score and method.combine == "multiply":
        balanced = None  # a share cannot take more from a reward than all of it
    return ScoreCalibration(
        name,
        part,
        balanced,
        method.alpha * part.std / quality_std if quality_std > 0 and part.groups else None,
    ), bonus


def _differs(part: Spread) -> bool:
    """False where nothing was compared; float32 leaves a rounding where members coincide."""
    return part.std > 1e-9  # false for nan


# The encoder ----------------------------------------------------------------------------------------------------------


def check_encoder(encoder: ResponseEncoder, recipe: Recipe, references: Sequence[Sequence[str]] = ()) -> EncoderCheck:
    """Measure what an encoder tells apart on the labelled pairs and on references.

    Intervals are bootstraps over the first sentences of the pairs, each of which stands in one pair of every kind.

    Args:
        encoder: The encoder.
        recipe: Its seed, `method.distinct_threshold` and the level of `evaluation.confidence`.
        references: References of each prompt.
    """
    pairs = read_jsonl(PAIRS)
    kinds = list(dict.fromkeys(pair["kind"] for pair in pairs))
    similarity = {}
    for kind in kinds:
        first = encoder([pair["a"] for pair in pairs if pair["kind"] == kind]).vectors
        second = encoder([pair["b"] for pair in pairs if pair["kind"] == kind]).vectors
        similarity[kind] = (first * second).sum(-1).double().cpu().numpy()
    level, seed = recipe.evaluation.confidence, recipe.seed
    return EncoderCheck(
        similarity={kind: bootstrap_interval(values, _DRAWS, level, seed) for kind, values in similarity.items()},
        auc_same_topic=auc_interval(similarity["paraphrase"], similarity["same_topic"], level, seed),
        auc_unrelated=auc_interval(similarity["paraphrase"], similarity["unrelated"], level, seed),
        linked={
            kind: float((values >= recipe.method.distinct_threshold).mean()) for kind, values in similarity.items()
        },
        references=_references(encoder, references),
    )


def auc(above: NDArray[np.float64], below: NDArray[np.float64]) -> float:
    """Probability that a value of `above` is larger than one of `below`; a tie counts half (Mann-Whitney)."""
    # Ranks by bisection: no matrix of all pairs of pairs.
    ordered = np.sort(below)
    smaller = np.searchsorted(ordered, above, side="left")
    not_larger = np.searchsorted(ordered, above, side="right")
    return float((smaller + not_larger).mean() / 2 / len(ordered))


def auc_interval(above: NDArray[np.float64], below: NDArray[np.float64], confidence: float, seed: int) -> Interval:
    """`auc` with a percentile bootstrap; `above[i]` and `below[i]` share an item and are drawn together."""
    generator = np.random.default_rng(seed)
    draws = [auc(above[at], below[at]) for at in generator.integers(len(above), size=(_DRAWS, len(above)))]
    tail = (1 - confidence) / 2
    return Interval(auc(above, below), *(float(bound) for bound in np.quantile(draws, [tail, 1 - tail])))


def _references(encoder: ResponseEncoder, references: Sequence[Sequence[str]]) -> References | None:
    several = [list(group) for group in references if len(group) > 1]
    if len(several) < 2:
        return None
    vectors = encoder([text for group in several for text in group]).vectors.double()
    owner = torch.tensor([index for index, group in enumerate(several) for _ in group], device=vectors.device)
    rows, columns = torch.triu_indices(len(owner), len(owner), 1, device=vectors.device)
    similarity, together = (vectors @ vectors.T)[rows, columns], owner[rows] == owner[columns]
    within, between = similarity[together].cpu().numpy(), similarity[~together].cpu().numpy()
    return References(len(several), float(within.mean()), float(between.mean()), auc(within, between))


# Seconds --------------------------------------------------------------------------------------------------------------


class _Stopwatch:
    """Seconds a response of each activity, the work of an accelerator included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: dict[str, list[float]] = {}

    def __call__(self, name: str, responses: int) -> "_Lap":
        return _Lap(self._device, self._seen.setdefault(name, []), responses)

    def per_response(self, name: str) -> float:
        """Median over the batches."""
        return float(np.median(self._seen[name]))


class _Lap:
    def __init__(self, device: torch.device, into: list[float], responses: int) -> None:
        self._device, self._into, self._responses = device, into, responses

    def __enter__(self) -> None:
        self._wait()
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._wait()
        self._into.append((time.perf_counter() - self._start) / self._responses)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _passes(recipe: Recipe) -> int:
    """Forward passes that an update is worth: see the constants; recomputation and the KL's reference add one each."""
    passes = _PASSES_FULL if recipe.policy.lora is None else _PASSES_ADAPTER
    return passes + int(recipe.policy.gradient_checkpointing) + int(recipe.rl.beta > 0)


@torch.no_grad()
def _log_likelihood(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[dict[str, str]]],
    groups: Sequence[Sequence[Response]],
    recipe: Recipe,
) -> Tensor:
    """Log-likelihood of each response in nats, `(responses,)`, by the pass with which the trainer scores them.

    In pieces of `rl.micro_batch` sequences, and with the logits of the responses alone: those of a whole step of a 7B
    model fill an accelerator's memory.
    """
    encoded = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, return_dict=True)["input_ids"]
    drawn = [(row, one.ids) for row, group in enumerate(groups) for one in group]
    size = recipe.rl.micro_batch or len(drawn)
    shares = shares_prompts(model.config) and not recipe.policy.gradient_checkpointing
    score = _of_shared_prompts if shares else _of_whole_sequences
    return torch.cat(
        [
            score(
                model,
                [encoded[row] for row, _ in drawn[start : start + size]],
                [ids for _, ids in drawn[start : start + size]],
                tokenizer.pad_token_id,
                recipe.rl.sampling.temperature,
            )
            for start in range(0, len(drawn), size)
        ]
    )


def _of_shared_prompts(
    model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad: int, temperature: float
) -> Tensor:
    """Log-likelihood of each response to the prompt of the same index; equal prompts are computed once."""
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    place = {ids: index for index, ids in enumerate(distinct)}
    ids, attention = left_pad(distinct, pad, model.device)
    completions, mask = _right_pad(responses, pad, model.device)
    scores = model(input_ids=ids, attention_mask=attention, completion_ids=completions, completion_mask=mask,
                   prompt_rows=torch.tensor([place[tuple(one)] for one in prompts], device=model.device),
                   temperature=temperature)  # fmt: skip
    log_probs: Tensor = scores.log_probs
    return log_probs.sum(-1)


def _of_whole_sequences(
    model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad: int, temperature: float
) -> Tensor:
    """The same of each prompt with its response, for models whose prompts cannot be shared."""
    ids, attention = left_pad(prompts, pad, model.device)
    completions, mask = _right_pad(responses, pad, model.device)
    attention = torch.cat([attention, mask], 1)
    width = completions.shape[1]
    # Models that take `logits_to_keep` put the head to those positions only; of others the rest is dropped here.
    forward = model.get_base_model().forward if hasattr(model, "get_base_model") else model.forward
    fewer = {"logits_to_keep": width + 1} if "logits_to_keep" in inspect.signature(forward).parameters else {}
    logits = model(input_ids=torch.cat([ids, completions], 1), attention_mask=attention,
                   position_ids=(attention.cumsum(-1) - 1).clamp(min=0), **fewer).logits  # fmt: skip
    total = torch.zeros(len(completions), device=model.device)
    for at in range(width):  # the logits in front of each token; all of them in float32 would be the largest tensor
        scores = logits[:, at - width - 1].float() / temperature
        chosen = scores.gather(-1, completions[:, at, None]).squeeze(-1)
        total += (chosen - scores.logsumexp(-1)) * mask[:, at]
    return total


def _right_pad(sequences: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists padded on the right, and what of them is none, both `(rows, longest)`."""
    longest = max(len(ids) for ids in sequences)
    ids = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in sequences], device=device)
    mask = torch.tensor([[int(at < len(ids)) for at in range(longest)] for ids in sequences], device=device)
    return ids, mask


# Words ----------------------------------------------------------------------------------------------------------------


def _reasoning(result: Calibration, recipe: Recipe) -> list[str]:
    own, q = result.scores[0], result.quality_advantage_std
    unit = "nats" if own.name == "log_volume" else f"of {own.name}"
    scaled = "" if recipe.method.quality_scale == "none" else f" (after quality_scale {recipe.method.quality_scale!r})"
    words = [
        f"Within a group, quality differs by {q:.3g} (standard deviation){scaled}"
        + (
            ", and no response earns a bonus."
            if result.no_bonus == 1 or math.isnan(own.bonus.std)
            else f" and the bonus by {own.bonus.std:.3g} {unit}."
        )
    ]
    if own.share is not None and result.no_bonus < 1:
        words.append(
            f"At the recipe's alpha = {result.alpha:g} the bonus weighs {result.alpha * own.bonus.std:.3g}, "
            f"{own.share:.0%} of what quality weighs; the most and the least different member of a group are "
            f"{result.alpha * own.bonus.range:.3g} of quality apart."
        )
    if own.name == "log_volume" and recipe.method.kernel_scale == 1.0:
        held_against = recipe.method.defences.unearned == "zero" and result.ungated is not None
        room = math.log(2) - (0.0 if held_against else math.log1p(1 / result.k))
        words.append(
            f"The bonus lies between {math.log1p(1 / result.k):.3f} (it repeats all others) and {math.log(2):.3f} nats "
            f"(it is unlike all others){', and is 0 where none is earned' if held_against else ''}: at most "
            f"{result.alpha * room:.3g} of quality at that alpha."
        )
    if own.balanced_alpha is not None:
        words.append(
            f"alpha = {own.balanced_alpha:.2g} gives the bonus {result.share:.0%} of the quality's weight at the first "
            "step. The share grows as training raises the quality and its spread shrinks, so begin low."
        )
    elif recipe.method.combine == "multiply" and _differs(own.bonus) and q > 0:
        words.append(
            f"alpha = 1, the most that combine 'multiply' takes, gives the bonus {own.bonus.std / q:.0%} of the "
            f"quality's weight, less than {result.share:.0%}."
        )
    if result.ungated is not None and _differs(result.ungated.bonus):
        balanced = result.ungated.balanced_alpha
        words.append(
            f"If every response earned its bonus ({result.no_bonus:.0%} earn none), it would differ by "
            f"{result.ungated.bonus.std:.3g} {unit}"
            + (f", and alpha = {balanced:.2g} would give it {result.share:.0%}." if balanced is not None else ".")
        )
    return words


def _problems(result: Calibration, unreached: bool) -> list[str]:
    found = []
    if result.quality_advantage_std == 0 or result.tied_groups == 1:
        found.append(
            "every group's rewards are equal: quality gives no signal at all, and no alpha balances it; change the "
            "reward, the prompts or the policy (SFT first?)"
        )
    own = result.scores[0]
    if not _differs(own.bonus) and result.alpha > 0 and not unreached:
        found.append(
            f"the bonus of {own.name} is equal for all members of every group: alpha has nothing to weigh"
            + (f" ({result.no_bonus:.0%} of the responses earn none, see method.defences)" if result.no_bonus else "")
        )
    for kind, area in (("an unrelated sentence", result.encoder.auc_unrelated),
                       ("another answer about the same things", result.encoder.auc_same_topic)):  # fmt: skip
        if area.low <= 0.5:
            found.append(
                f"the encoder does not tell a paraphrase from {kind} (AUC {area.mean:.2f} "
                f"[{area.low:.2f}, {area.high:.2f}], chance is 0.5): its volume is not one of meaning"
            )
    return found


def _remarks(result: Calibration, recipe: Recipe, prompts: int, unreached: bool) -> list[str]:
    health, found = recipe.rl.health, []
    if unreached:
        found.append(
            "no response of the base model earns a bonus (method.defences); what would be if each did is shown beside. "
            "RL begins with the SFT checkpoint; once `dqo run` has trained that (it may be interrupted then), sample "
            "from it with --checkpoint <out>/workspace/stages/sft-<key>/output"
        )
    if result.prompts < prompts:
        found.append(f"{prompts} prompts were asked for, the training data holds {result.prompts}")
    for value, limit, words in (
        (result.tied_groups, health.zero_variance.max, "of the groups have equal rewards (rl.health.zero_variance)"),
        (result.lengths.truncated, health.truncation.max, "of the responses are truncated (rl.health.truncation)"),
        (result.encoder_cut, health.encoder_cut.max, "of the responses are cut by the encoder (rl.health.encoder_cut)"),
        (result.unscorable, health.unscorable.max, "of the responses have no reward (rl.health.unscorable)"),
    ):
        if limit is not None and value > limit:
            found.append(f"{value:.0%} {words}, more than {limit:.0%}")
    for name, value in result.encoder_cut_shares.items():
        if value > 0:
            found.append(f"{value:.0%} of the {name} are cut by the encoder: what comes behind is in no similarity")
    if result.saturated is not None and result.saturated > _SATURATED_SHARE:
        found.append(
            f"{result.saturated:.0%} of the reward model's scores are within {_SATURATED:g} of 0 or 1, where the "
            "logistic function leaves no difference between responses: reward.squash false keeps the model's unit, in "
            "which alpha, min_quality and gate.max_quality_loss are read then"
        )
    if result.score == "distinct" and result.encoder.linked["paraphrase"] < 0.5:
        found.append(
            f"method.distinct_threshold = {recipe.method.distinct_threshold:g} takes only "
            f"{result.encoder.linked['paraphrase']:.0%} of the paraphrases for one meaning"
        )
    return found


def _plain(value: Any) -> Any:
    """With None for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
