"""Log-probabilities of a group's responses with the group's prompt computed once.

The k responses of a group share their prompt, yet a batch of whole sequences runs it k times, forward and backward.
Here each distinct prompt runs once; its keys and values, still part of the autograd graph, are repeated for its
responses. Values and gradients are those of whole sequences. Only the positions that predict response tokens go
through the language-model head.

The code runs inside the model's own `forward`, so that a DDP wrapper sees one ordinary forward pass.
"""

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from trl.kernels import ChunkedLogProbFunction

# Vocabulary entries a tile; the head works through the vocabulary in tiles to bound memory.
_VOCABULARY_TILE = 65536


@dataclass
class ResponseScores:
    """Per-token scores of responses, each `(rows, tokens)`, zero where the mask is zero."""

    log_probs: Tensor
    entropy: Tensor


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are the head applied to the last hidden state, with no scaling or soft cap after it."""
    config = model.config.get_text_config()
    altered = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    return all(getattr(config, name, None) is None for name in altered)


def add_shared_prompt_forward(model: PreTrainedModel, temperature: float) -> None:
    """Let `model(..., completion_ids=...)` score responses; without that argument its forward is unchanged.

    The added form takes `input_ids` and `attention_mask` of the distinct prompts, `(prompts, p)`, left-padded;
    `completion_ids` and `completion_mask`, `(rows, c)`, right-padded; and `prompt_rows`, `(rows,)`, the prompt of each
    response. It returns `ResponseScores`.

    Args:
        model: Causal language model, not yet wrapped by peft or already inside its wrapper.
        temperature: What the logits are divided by, as in sampling.
    """
    original = model.forward

    def forward(self: Any, *args: Any, completion_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if completion_ids is None:
            return original(*args, **kwargs)
        return _score(self, temperature, completion_ids=completion_ids, **kwargs)

    # Kept signature: `generate` validates its arguments against it.
    forward.__wrapped__ = original  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def _score(
    model: Any,
    temperature: float,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    prompt_rows: Tensor,
    **_: Any,
) -> ResponseScores:
    cache = DynamicCache(config=model.config.get_text_config())
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    prompt_hidden = model.base_model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1:]
    hidden = prompt_hidden[prompt_rows]
    if completion_ids.shape[1] > 1:
        cache.batch_select_indices(prompt_rows)
        steps = torch.arange(1, completion_ids.shape[1], device=positions.device)
        response_hidden = model.base_model(
            input_ids=completion_ids[:, :-1],
            attention_mask=torch.cat([attention_mask[prompt_rows], completion_mask[:, :-1]], dim=1),
            position_ids=positions[prompt_rows, -1:] + steps,
            past_key_values=cache,
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
        _VOCABULARY_TILE,
        None,
        1.0,
        ("entropy",),
    )
    # masked_scatter stays connected to the graph when a micro-batch counts no token, so that backward still runs.
    blank = log_probs.new_zeros(completion_mask.shape)
    return ResponseScores(blank.masked_scatter(counted, log_probs), blank.masked_scatter(counted, entropy))
