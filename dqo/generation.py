"""Sampling groups of responses from a causal language model held in memory.

`transformers.generate` prefills a prompt once for every response of its group, copies its whole cache at every token
and draws one random number a vocabulary entry. `sample` prefills each prompt once and repeats its cache into memory
that is reserved for the whole response, draws by inverse transform (one uniform number a token), drops finished rows
from the batch, and multiplies by merged weights where an adapter allows. The distribution is the same. Serving engines
do better on a GPU: use vLLM there (recipe: `rl.rollout`).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from dqo.errors import DQOError
from dqo.recipe import Sampling
from dqo.shared_prompt import prefill


def shares_prompts(config: PretrainedConfig) -> bool:
    """Whether a prompt may be computed once and repeated for the responses of its group.

    True for decoders whose layers all keep a plain, growing cache (full attention) and whose logits are the head
    applied to the last hidden state; False for recurrent states, sliding windows, encoder-decoders, and logits that are
    scaled or capped afterwards, for which callers fall back to whole sequences.
    """
    text_config = config.get_text_config()
    if config.is_encoder_decoder or getattr(text_config, "is_encoder_decoder", False):
        return False
    altered = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    if any(getattr(text_config, name, None) is not None for name in altered):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=text_config).layers)


def left_pad(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad token lists on the left; returns ids and attention mask, both `(rows, longest)`, int64."""
    longest = max(len(ids) for ids in sequences)
    ids = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in sequences], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in sequences], device=device)
    return ids, mask


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    eos_ids: Sequence[int],
    pad_id: int,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Draw one response for each row of `prompts`; equal prompts are prefilled once.

    Args:
        model: Causal language model for which `shares_prompts` holds (a peft model works too).
        prompts: Token ids of each row's prompt; a group is the same prompt k times.
        settings: Temperature, nucleus, top-k and length.
        eos_ids: Tokens that end a response.
        pad_id: Any valid token id, for padding.
        generator: Source of randomness; `None` takes torch's default.

    Returns:
        Token ids of each response, with the end token where it was reached.
    """
    device = model.device
    unique = list(dict.fromkeys(tuple(ids) for ids in prompts))
    row_of = {ids: index for index, ids in enumerate(unique)}
    rows = torch.tensor([row_of[tuple(ids)] for ids in prompts], device=device)
    prompt_ids, prompt_mask = left_pad(unique, pad_id, device)
    ends = torch.tensor(list(eos_ids), device=device)

    with _merged(model):
        return _decode(model, prompt_ids, prompt_mask, rows, settings, ends, pad_id, generator)


def _decode(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    rows: Tensor,
    settings: Sampling,
    ends: Tensor,
    pad_id: int,
    generator: torch.Generator | None,
) -> list[list[int]]:
    """Draw a response for each of `rows`, which name prompts of `(prompts, p)`."""
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    warpers: Any = _warpers(settings)
    prefilled = prefill(causal, prompt_ids, prompt_mask)
    cache, mask, position = prefilled.cache, prefilled.mask[rows], prefilled.next_position[rows]
    logits = _logits(causal, prefilled.last_hidden[:, -1])
    _require_finite(logits)
    logits = logits[rows]
    cache.layers = [_ReservedLayer(layer, rows, settings.max_new_tokens) for layer in cache.layers]
    device, count, length = rows.device, len(rows), settings.max_new_tokens
    drawn = torch.full((count, length), pad_id, device=device)
    lengths = torch.full((count,), length, device=device)
    active = torch.arange(count, device=device)  # rows of `drawn` that the batch still holds
    alive = torch.ones(count, dtype=torch.bool, device=device)  # among them, those that have not ended
    for step in range(length):
        tokens = _draw(warpers(prompt_ids, logits.float()), generator)
        drawn[active, step] = torch.where(alive, tokens, pad_id)
        ended = alive & torch.isin(tokens, ends)
        lengths[active[ended]] = step + 1
        alive = alive & ~ended
        left = int(alive.sum())
        if left == 0 or step == length - 1:
            break
        if left <= 0.75 * len(alive):  # gathering the cache costs about one step, so not at every end
            keep = alive.nonzero().squeeze(-1)
            cache.batch_select_indices(keep)
            active, tokens, mask, position = active[keep], tokens[keep], mask[keep], position[keep]
            alive = alive[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        hidden = causal.base_model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=position[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        logits = _logits(causal, hidden)
        position = position + 1
    return [row[:end] for row, end in zip(drawn.tolist(), lengths.tolist(), strict=True)]


class _ReservedLayer(DynamicLayer):
    """A growing layer of the cache in memory reserved beforehand; the plain one copies all of it at every token."""

    def __init__(self, layer: Any, rows: Tensor, extra: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self._length = layer.keys.shape[-2]
        self._reserved = [_reserve(states, rows, extra) for states in (layer.keys, layer.values)]
        self.keys, self.values = (states[:, :, : self._length] for states in self._reserved)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start, self._length = self._length, self._length + key_states.shape[-2]
        for states, new in zip(self._reserved, (key_states, value_states), strict=True):
            states[:, :, start : self._length] = new
        self.keys, self.values = (states[:, :, : self._length] for states in self._reserved)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._reserved = [states[indices] for states in self._reserved]
        self.keys, self.values = (states[:, :, : self._length] for states in self._reserved)


def _reserve(states: Tensor, rows: Tensor, extra: int) -> Tensor:
    """Some rows of `(rows, heads, length, d)`, with room for `extra` more tokens."""
    _, heads, length, size = states.shape
    reserved = states.new_empty(len(rows), heads, length + extra, size)
    reserved[:, :, :length] = states[rows]
    return reserved


@contextmanager
def _merged(model: PreTrainedModel) -> Iterator[None]:
    """Hold a LoRA model's float32 weights merged: two small products less for each large one.

    The frozen weights are set aside and put back, not subtracted, so that nothing drifts. Weights in bfloat16 stay as
    they are: rounding would swallow an adapter's small updates, and the sampled policy were not the trained one.
    """
    layers = list(_mergeable(model))
    weights = [layer.get_base_layer().weight for layer in layers]
    frozen = [weight.data for weight in weights]
    try:
        for layer in layers:
            layer.merge(safe_merge=True)  # into a copy of the weight
        yield
    finally:
        for layer, weight, data in zip(layers, weights, frozen, strict=True):
            weight.data = data
            layer.merged_adapters.clear()


def _mergeable(model: PreTrainedModel) -> Iterable[LoraLinear]:
    """Tuned layers, if the model is on a CPU and merging all of them loses nothing; else none."""
    layers = plain_lora(model) if model.device.type == "cpu" else None
    if layers is None or any(layer.get_base_layer().weight.dtype != torch.float32 for layer in layers.values()):
        return ()
    return layers.values()


def plain_lora(model: torch.nn.Module) -> dict[str, LoraLinear] | None:
    """Return a peft model's tuned layers by module name, where each is merged by adding B A to its own weight.

    Returns:
        `None` for a model without adapters, and where anything that is tuned is not a plain LoRA of a linear layer
        (DoRA, biases, embeddings), is merged already, or shares its weight with another layer.
    """
    if not isinstance(model, PeftModel):
        return None
    tuned = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    uses = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
    plain = {
        name: layer
        for name, layer in tuned.items()
        if isinstance(layer, LoraLinear)
        and not layer.merged
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and uses[id(layer.get_base_layer().weight)] == 1
    }
    return plain if len(plain) == len(tuned) else None


def _logits(causal: Any, hidden: Tensor) -> Tensor:
    """The head applied to the last hidden states, `(rows, d)` -> `(rows, vocabulary)`."""
    head = causal.get_output_embeddings()
    if hidden.device.type == "cpu" and head.bias is None:
        # A tall product is about twice as fast on a CPU as its transpose, a wide one of few rows.
        return (head.weight @ hidden.T).T
    return head(hidden)


def _require_finite(logits: Tensor) -> None:
    """A diverged policy has no distribution to draw from.

    Raises:
        DQOError: If a logit is NaN or infinite above.
    """
    if torch.isnan(logits).any() or torch.isposinf(logits).any():
        raise DQOError(
            "the policy's logits are not finite, so no response can be drawn: training has diverged; lower "
            "learning_rate or max_grad_norm"
        )


def _warpers(settings: Sampling) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if settings.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        processors.append(TopPLogitsWarper(settings.top_p))
    return processors


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token a row by inverse transform; logits `(rows, vocabulary)` float32 -> tokens `(rows,)`."""
    # Cumulated in float64: float32 sums over 50k entries are off by more than rare tokens' probabilities.
    cumulated = logits.softmax(-1).double().cumsum(-1)
    total = cumulated[:, -1:]
    uniform = torch.rand(total.shape, dtype=torch.float64, device=logits.device, generator=generator)
    # right=True never picks a token of probability zero; u < 1 keeps the index inside the vocabulary.
    return torch.searchsorted(cumulated, uniform * total, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


@dataclass(frozen=True)
class Response:
    """One sampled response.

    Attributes:
        text: Decoded, without special tokens.
        tokens: Its length in tokens, the end token included.
        truncated: It was cut at `max_new_tokens`.
        ids: Its token ids.
    """

    text: str
    tokens: int
    truncated: bool
    ids: tuple[int, ...] = field(default=(), repr=False)


def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
    n: int,
    settings: Sampling,
    eos_ids: Sequence[int],
    generator: torch.Generator | None = None,
) -> list[list[Response]]:
    """Sample a group of n responses for each chat prompt.

    Works for every causal language model: those for which `shares_prompts` does not hold go through
    `transformers.generate`, whose draws come from torch's default generator (reseeded from `generator`).
    """
    encoded: Any = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, return_dict=True)
    rows = [ids for ids in encoded["input_ids"] for _ in range(n)]
    pad_id = tokenizer.pad_token_id
    if shares_prompts(model.config):
        drawn = sample(model, rows, settings, eos_ids, pad_id, generator)
    else:
        if generator is not None:
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator, device=generator.device)))
        generate: Any = model.generate
        ids, mask = left_pad(rows, pad_id, model.device)
        with torch.no_grad():
            out = generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                max_new_tokens=settings.max_new_tokens,
                eos_token_id=list(eos_ids),
                pad_token_id=pad_id,
            )
        ends = set(eos_ids)
        drawn = []
        for tail in out[:, ids.shape[1] :].tolist():
            stop = next((index + 1 for index, token in enumerate(tail) if token in ends), len(tail))
            drawn.append(tail[:stop])
    texts = tokenizer.batch_decode(drawn, skip_special_tokens=True)
    responses = [
        Response(text.strip(), len(ids), ids[-1] not in set(eos_ids), tuple(ids))
        for text, ids in zip(texts, drawn, strict=True)
    ]
    return [responses[start : start + n] for start in range(0, len(responses), n)]
