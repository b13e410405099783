"""A reward model: any sequence-classification model with one label, which scores a conversation.

The conversation is the row's prompt and the response as the assistant's message, written by the tokenizer's chat
template. A tokenizer without one gets prompt and response as a pair where it marks pairs (BERT and its kin), else as
one text, the response after a line break [ours].
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from dqo.bundled import locate
from dqo.data.chat import special_tokens
from dqo.errors import DQOError
from dqo.policy import computes_in_bfloat16
from dqo.recipe import Reward
from dqo.tasks.base import Row

_EXPECTED = "expected a hub id or local directory of a trained sequence-classification model with one label"


def check(spec: Reward, field: str = "reward") -> None:
    """Look at a reward model's configuration, which is quick, before anything is trained.

    Args:
        spec: The section of the recipe that names it.
        field: That section's name, for errors.

    Raises:
        DQOError: If it cannot be read or does not have exactly one label.
    """
    _configuration(spec, field)


class RewardModel:
    """A frozen reward model in eval mode, kept out of every optimiser and autocast.

    Weights are bfloat16 on a GPU that computes in it, else float32; scores are float32.

    Args:
        spec: The section of the recipe that names it.
        device: Where it runs.
        field: That section's name, for errors.

    Raises:
        DQOError: If the model or its tokenizer cannot be loaded, it does not have exactly one label, or its head has
            not been trained.
    """

    name = "reward_model"

    def __init__(self, spec: Reward, device: torch.device, field: str = "reward") -> None:
        assert spec.model is not None  # of kind 'model', see dqo.recipe.Reward
        configuration = _configuration(spec, field)
        location = locate(spec.model, spec.revision)
        wide = device.type == "cuda" and computes_in_bfloat16(device)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(location.load, revision=location.hub_revision)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                location.load,
                revision=location.hub_revision,
                dtype=torch.bfloat16 if wide else torch.float32,
                output_loading_info=True,
            )
            model = model.to(device)
        except (OSError, ValueError, RuntimeError) as error:
            raise _unloadable(spec, field, error) from error
        if info["missing_keys"]:
            raise DQOError(
                f"{field}.model {spec.model!r}: its files lack the weights {', '.join(sorted(info['missing_keys']))}, "
                f"which would be random; {_EXPECTED}"
            )
        self._model: Any = model.eval().requires_grad_(False)
        text = configuration.get_text_config()
        self._padding: int | None = text.pad_token_id
        self._special = special_tokens(self._tokenizer)
        self._spec, self._field = spec, field
        # A model with learned positions has no more of them than this, whatever the recipe allows.
        positions = getattr(text, "max_position_embeddings", None) or spec.max_tokens
        self._max_tokens = min(spec.max_tokens, self._tokenizer.model_max_length, positions)

    def __call__(self, responses: Sequence[str], rows: Sequence[Row]) -> list[float | None]:
        """See `dqo.rewards.Reward`; rows hold `prompt`.

        None for a conversation longer than `reward.max_tokens` or than the model reads, for a response that holds one
        of the tokenizer's special tokens as text (the model would read it as structure, such as a message of the
        user's), and where the model returns NaN. Equal conversations are scored once.

        Raises:
            DQOError: If the chat template refuses the messages.
        """
        encoded = [self._encode(text, row["prompt"]) for text, row in zip(responses, rows, strict=True)]
        distinct = {_key(one): one for one in encoded if one is not None and len(one["input_ids"]) <= self._max_tokens}
        # Like lengths together, so that little is padded; ties in a fixed order.
        keys = sorted(distinct, key=lambda key: (len(key), key))
        scores: dict[tuple[int, ...], float | None] = {}
        for start in range(0, len(keys), self._spec.batch_size):
            batch = keys[start : start + self._spec.batch_size]
            scores |= dict(zip(batch, self._score([distinct[key] for key in batch]), strict=True))
        return [None if one is None else scores.get(_key(one)) for one in encoded]

    def _encode(self, response: str, prompt: str | list[dict[str, str]]) -> dict[str, list[int]] | None:
        if any(token in response for token in self._special):
            return None
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        tokenizer = self._tokenizer
        encoded: Any
        if tokenizer.chat_template:
            try:
                encoded = tokenizer.apply_chat_template(
                    [*messages, {"role": "assistant", "content": response}], return_dict=True
                )
            except TemplateError as error:
                raise DQOError(
                    f"{self._field}.model {self._spec.model!r}: its chat template refuses messages of the roles "
                    f"{', '.join([message['role'] for message in messages] + ['assistant'])} ({error})"
                ) from None
        else:
            asked = "\n".join(message["content"] for message in messages)
            marks_pairs = tokenizer.num_special_tokens_to_add(True) > tokenizer.num_special_tokens_to_add(False)
            encoded = tokenizer(asked, response) if marks_pairs else tokenizer(f"{asked}\n{response}")
        return {name: list(ids) for name, ids in encoded.items()}

    def _score(self, batch: list[dict[str, list[int]]]) -> list[float | None]:
        longest = max(len(one["input_ids"]) for one in batch)
        padding = {"input_ids": self._padding_id(batch)}
        inputs = {
            name: torch.tensor(
                [one[name] + [padding.get(name, 0)] * (longest - len(one[name])) for one in batch],
                device=self._model.device,
            )
            for name in batch[0]
        }
        with torch.no_grad(), torch.autocast(self._model.device.type, enabled=False):
            scores = self._model(**inputs).logits.float().squeeze(-1)
        squashed = scores.sigmoid() if self._spec.squash else scores
        # An infinite score is a broken model's; unsquashed, it is refused where all rewards are checked.
        values = torch.where(scores.isfinite(), squashed, scores).tolist()
        return [None if math.isnan(value) else value for value in values]

    def _padding_id(self, batch: list[dict[str, list[int]]]) -> int:
        """Id that fills the rows of a batch up on the right.

        A decoder scores at the last token that is not padding, by its configuration. Where that names no padding token,
        the model was made to score at the very last one, so it is told to take an id that no row holds: the tokenizer's
        (often its end-of-sequence token, with which conversations end) would move the place of the score.
        """
        if self._padding is not None:
            return self._padding
        used = {token for one in batch for token in one["input_ids"]}
        free = next(token for token in range(len(used) + 1) if token not in used)
        self._model.config.get_text_config().pad_token_id = free
        return free


def _key(encoded: dict[str, list[int]]) -> tuple[int, ...]:
    return tuple(encoded["input_ids"])


def _configuration(spec: Reward, field: str) -> Any:
    assert spec.model is not None
    location = locate(spec.model, spec.revision)
    try:
        configuration = AutoConfig.from_pretrained(location.load, revision=location.hub_revision)
    except (OSError, ValueError) as error:
        raise _unloadable(spec, field, error) from error
    if configuration.num_labels != 1:
        names = ", ".join(str(name) for name in configuration.id2label.values())
        raise DQOError(
            f"{field}.model {spec.model!r}: its config.json names {configuration.num_labels} labels ({names}); "
            "expected a sequence-classification model with exactly one, whose output is the score"
        )
    return configuration


def _unloadable(spec: Reward, field: str, error: Exception) -> DQOError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return DQOError(f"{field}.model {spec.model!r}: cannot be loaded ({reason}); {_EXPECTED}")
