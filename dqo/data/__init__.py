"""Data preparation: rows of any source become validated chat prompts with references, split by a hash of the prompt."""

from dqo.data.card import DataCard, TokenLengths, read_rows
from dqo.data.chat import Demonstration, encode_demonstration
from dqo.data.preparation import prepare, prompt_id, side
from dqo.data.sources import hub_dataset, source_fingerprint

__all__ = [
    "DataCard",
    "Demonstration",
    "TokenLengths",
    "encode_demonstration",
    "hub_dataset",
    "prepare",
    "prompt_id",
    "read_rows",
    "side",
    "source_fingerprint",
]
