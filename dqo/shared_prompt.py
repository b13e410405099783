"""Computing a prompt once: for the k responses of its group, and what all prompts begin with once for all of them.

The k responses of a group share their prompt, and the prompts of a task share their beginning (a system message, the
wording of the question); yet a batch of whole sequences runs both for every row, forward and backward. Here each
distinct prompt runs once and the common beginning once for all; keys and values, still part of the autograd graph, are
repeated for the rows. Only the positions that predict response tokens go through the language-model head. Values and
gradients are those of whole sequences.

The code runs inside the model's own `forward`, so that a DDP wrapper sees one ordinary forward pass.
"""

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from trl.kernels import ChunkedLogProbFunction

# Vocabulary entries a tile: the head works through the vocabulary in tiles to bound memory. On a CPU a tile has to stay
# in the processor's cache, or the passes over it cost more than the products (docs/development.md).
_CPU_TILE, _GPU_TILE = 4096, 65536


@dataclass
class ResponseScores:
    """Per-token scores of responses, each `(rows, tokens)`, zero where the mask is zero."""

    log_probs: Tensor
    entropy: Tensor


def add_shared_prompt_forward(model: PreTrainedModel) -> None:
    """Let `model(..., completion_ids=...)` score responses; without that argument its forward is unchanged.

    The added form takes `input_ids` and `attention_mask` of the distinct prompts, `(prompts, p)`, left-padded;
    `completion_ids` and `completion_mask`, `(rows, c)`, right-padded; `prompt_rows`, `(rows,)`, the prompt of each
    response; and `temperature`, what the logits are divided by. It returns `ResponseScores`.

    Args:
        model: Causal language model, not yet wrapped by peft or already inside its wrapper.
    """
    original = model.forward

    def forward(self: Any, *args: Any, completion_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if completion_ids is None:
            return original(*args, **kwargs)
        return _score(self, completion_ids=completion_ids, **kwargs)

    # Kept signature: `generate` validates its arguments against it.
    forward.__wrapped__ = original  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


@dataclass
class Prefilled:
    """Prompts that have run through the model.

    Attributes:
        cache: Keys and values, a row a prompt.
        mask: Which cached positions count, `(prompts, cached)`.
        next_position: Position of the first response token, `(prompts,)`.
        last_hidden: Hidden state that predicts it, `(prompts, 1, d)`.
    """

    cache: DynamicCache
    mask: Tensor
    next_position: Tensor
    last_hidden: Tensor


def prefill(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Prefilled:
    """Run left-padded prompts, `(prompts, p)`, what they all begin with only once.

    Args:
        model: Causal language model without peft's wrapper (adapters inside its layers take part).
        input_ids: Token ids.
        attention_mask: 1 for tokens, 0 for padding.
    """
    cache = DynamicCache(config=model.config.get_text_config())
    prompts, width = input_ids.shape
    starts = width - attention_mask.sum(-1, keepdim=True)
    common = _common_beginning(input_ids, starts)
    if common:
        model.base_model(input_ids=_aligned(input_ids[:1], starts[:1], common), past_key_values=cache, use_cache=True)
        cache.batch_select_indices(torch.zeros(prompts, dtype=torch.long, device=input_ids.device))
    # The longest prompt starts in column 0, so what is left of it starts in column `common`; the others start later.
    columns = torch.arange(common, width, device=input_ids.device)
    mask = torch.cat([attention_mask.new_ones(prompts, common), (columns >= starts + common).to(attention_mask)], dim=1)
    positions = (columns - starts).clamp(min=0)
    last_hidden = model.base_model(
        input_ids=input_ids[:, common:],
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1:]
    return Prefilled(cache, mask, positions[:, -1] + 1, last_hidden)


def _aligned(input_ids: Tensor, starts: Tensor, count: int) -> Tensor:
    """The first `count` tokens of each left-padded row."""
    return input_ids.gather(1, starts + torch.arange(count, device=input_ids.device))


def _common_beginning(input_ids: Tensor, starts: Tensor) -> int:
    """Number of tokens that all prompts begin with; each keeps one of its own, whose hidden state is needed."""
    shortest = input_ids.shape[1] - int(starts.max())
    if len(input_ids) == 1:
        return 0
    beginnings = _aligned(input_ids, starts, shortest - 1)
    return int((beginnings == beginnings[:1]).all(0).cumprod(0).sum())


def _score(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    prompt_rows: Tensor,
    temperature: float,
    **_: Any,
) -> ResponseScores:
    prompts = prefill(model, input_ids, attention_mask)
    hidden = prompts.last_hidden[prompt_rows]
    if completion_ids.shape[1] > 1:
        prompts.cache.batch_select_indices(prompt_rows)
        steps = torch.arange(completion_ids.shape[1] - 1, device=completion_ids.device)
        response_hidden = model.base_model(
            input_ids=completion_ids[:, :-1],
            attention_mask=torch.cat([prompts.mask[prompt_rows], completion_mask[:, :-1]], dim=1),
            position_ids=prompts.next_position[prompt_rows, None] + steps,
            past_key_values=prompts.cache,
            use_cache=True,
        ).last_hidden_state
        hidden = torch.cat([hidden, response_hidden], dim=1)
    counted = completion_mask.bool()
    head = model.get_output_embeddings()
    log_probs, entropy, *_unused = ChunkedLogProbFunction.apply(
        hidden[counted],
        head.weight,
        head.bias,
        completion_ids[counted],
        temperature,
        _CPU_TILE if hidden.device.type == "cpu" else _GPU_TILE,
        None,
        1.0,
        ("entropy",),
    )
    # masked_scatter stays connected to the graph when a micro-batch counts no token, so that backward still runs.
    blank = log_probs.new_zeros(completion_mask.shape)
    return ResponseScores(blank.masked_scatter(counted, log_probs), blank.masked_scatter(counted, entropy))
