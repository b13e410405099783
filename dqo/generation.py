"""Sampling groups of responses from a causal language model held in memory.

`transformers.generate` prefills a prompt once for every response of its group, and on a CPU spends two thirds of its
time in full-vocabulary random numbers. `sample` prefills each prompt once and repeats its cache, draws by inverse
transform (one uniform number a token instead of one a vocabulary entry) and drops finished rows from the batch. The
distribution is the same. Serving engines do better on a GPU: use vLLM there (recipe: `rl.rollout`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
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

from dqo.recipe import Sampling


def shares_prompts(config: PretrainedConfig) -> bool:
    """Whether a prompt's key-value cache may be computed once and repeated for the responses of its group.

    True for decoders whose layers all keep a plain, growing cache (full attention); False for recurrent states,
    sliding windows and encoder-decoders, for which callers fall back to whole sequences.
    """
    text_config = config.get_text_config()
    if config.is_encoder_decoder or getattr(text_config, "is_encoder_decoder", False):
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
    warpers: Any = _warpers(settings)
    ends = torch.tensor(list(eos_ids), device=device)

    cache = DynamicCache(config=model.config.get_text_config())
    positions = (prompt_mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(
        input_ids=prompt_ids,
        attention_mask=prompt_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    cache.batch_select_indices(rows)
    logits, mask, position = logits[rows], prompt_mask[rows], positions[rows, -1]

    count, length = len(prompts), settings.max_new_tokens
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
        position = position + 1
        logits = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=position[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    return [row[:end] for row, end in zip(drawn.tolist(), lengths.tolist(), strict=True)]


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
    """

    text: str
    tokens: int
    truncated: bool


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
        Response(text.strip(), len(ids), ids[-1] not in set(eos_ids)) for text, ids in zip(texts, drawn, strict=True)
    ]
    return [responses[start : start + n] for start in range(0, len(responses), n)]
