"""Encoding a demonstration with the model's own chat template, and proving that the right tokens are trained."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from dqo.errors import DQOError
from dqo.tasks.base import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is not trained (the default `ignore_index` of torch's cross-entropy)."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt and its response as token ids, up to and including the end-of-turn token.

    Attributes:
        input_ids: Ids of the prompt, the response and the end-of-turn token.
        labels: The same ids, with -100 on the prompt.
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def response_tokens(self) -> int:
        """Number of trained tokens, the end-of-turn token included."""
        return sum(label != IGNORED for label in self.labels)

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens that are not trained."""
        return len(self.labels) - self.response_tokens


def encode_demonstration(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: list[Message],
    reference: str,
    stop_ids: Collection[int] = (),
) -> Demonstration:
    """Encode a demonstration so that training on it teaches what sampling will ask for.

    Checked on the token ids: the prompt as sampling sees it (with the generation prompt) is a prefix of the whole; the
    trained tokens decode to the reference followed by a token that ends sampling. What a template writes after that
    token (often a line break) is never sampled and is left out. White space that a template puts around a response is
    trained, because it is sampled too.

    Args:
        tokenizer: The policy's tokenizer, with its chat template.
        prompt: Chat messages.
        reference: The response to train on.
        stop_ids: Tokens that end sampling beside the tokenizer's end-of-sequence token, where the model's generation
            configuration lists more (`dqo.policy.stop_ids`).

    Raises:
        DQOError: If there is no chat template, it refuses the messages, or a check fails; with what was seen.
    """
    prompt_ids = _template_ids(tokenizer, prompt, generate=True)
    ids = _template_ids(tokenizer, [*prompt, {"role": "assistant", "content": reference}], generate=False)
    start = len(prompt_ids)
    if ids[:start] != prompt_ids:
        parted = next((i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), len(ids))
        raise DQOError(
            f"chat template: from token {parted + 1} of the prompt on, sampling sees "
            f"{tokenizer.decode(prompt_ids[parted:])!r} but training {tokenizer.decode(ids[parted : start + 1])!r}; "
            "expected a template whose generation prompt is how it begins an assistant message"
        )
    stops = {tokenizer.eos_token_id, *stop_ids}
    end = next((i for i in range(start, len(ids)) if ids[i] in stops), None)
    if end is None:
        raise DQOError(
            f"chat template: no token that ends sampling follows the reference in {tokenizer.decode(ids[start:])!r}; "
            f"expected one of {tokenizer.convert_ids_to_tokens(sorted(s for s in stops if s is not None))}"
        )
    decoded = str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))
    if decoded.strip() != reference.strip():
        raise DQOError(
            f"chat template: the reference {reference!r} comes back from the tokens before the end of turn as "
            f"{decoded!r}; expected the same text"
        )
    return Demonstration(input_ids=ids[: end + 1], labels=[IGNORED] * start + ids[start : end + 1])


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Tokens that structure a conversation; written in a text, they would be read as structure."""
    return sorted(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)


def _template_ids(tokenizer: "PreTrainedTokenizerBase", messages: list[Message], generate: bool) -> list[int]:
    if not tokenizer.chat_template:
        raise DQOError(
            f"tokenizer {tokenizer.name_or_path!r}: has no chat template; expected that of a chat or instruct model"
        )
    try:
        encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=generate, return_dict=True)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DQOError(f"chat template: refuses messages of the roles {roles} ({error})") from None
    return encoded["input_ids"]
