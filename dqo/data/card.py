"""What a prepared data set says about itself."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dqo.errors import DQOError
from dqo.files import read_jsonl


@dataclass(frozen=True)
class TokenLengths:
    """Lengths in tokens over a data set; `p95` is the length of a row (nearest rank), not interpolated."""

    min: int
    mean: float
    p95: int
    max: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "TokenLengths":
        """Summarise one or more lengths."""
        p95 = int(np.quantile(lengths, 0.95, method="inverted_cdf"))
        return cls(min(lengths), round(float(np.mean(lengths)), 2), p95, max(lengths))


@dataclass(frozen=True)
class DataCard:
    """Where prepared data comes from and what it holds; `card.json`.

    Attributes:
        task: Name of the task.
        source: The recipe's source; of a hub data set with revision, subset and split.
        source_digest: SHA-256 of the source file's bytes; of a hub data set, SHA-256 of the rows that were read.
        licence: SPDX identifier, `None` where the source does not state one.
        tokenizer: The recipe's model, whose tokenizer and chat template were used, with its revision.
        rows_read: Rows of the source, blank lines left out.
        rows_merged: Rows that repeat a prompt and gave it further references.
        rows_quarantined: Rows that were put aside, by reason. Prompts, merged and quarantined rows add up to
            `rows_read`.
        train_rows: Training prompts.
        eval_rows: Evaluation prompts.
        references: References over all prompts.
        prompt_tokens: Lengths of the prompts with the chat template.
        reference_tokens: Lengths of the references with the end-of-turn token.
        digest: SHA-256 of the training and evaluation rows, in their order.
    """

    task: str
    source: str
    source_digest: str
    licence: str | None
    tokenizer: str
    rows_read: int
    rows_merged: int
    rows_quarantined: dict[str, int]
    train_rows: int
    eval_rows: int
    references: int
    prompt_tokens: TokenLengths
    reference_tokens: TokenLengths
    digest: str

    def to_json(self) -> str:
        """Return the card as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> "DataCard":
        """Read a `card.json`.

        Raises:
            DQOError: If there is none, or it is not one of ours.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            lengths = {name: TokenLengths(**content[name]) for name in ("prompt_tokens", "reference_tokens")}
            return cls(**{**content, **lengths})
        except FileNotFoundError:
            raise DQOError(f"{path}: missing; expected the data card written by the prepare stage") from None
        except (TypeError, KeyError, ValueError) as error:
            raise DQOError(f"{path}: not a data card ({type(error).__name__}: {error})") from None

    def to_markdown(self, example: dict[str, Any], rejected: Sequence[str]) -> str:
        """Return the card for a human reader.

        Args:
            example: A training row.
            rejected: Place and reason of the quarantined rows.
        """
        quarantined = sum(self.rows_quarantined.values())
        facts = {
            "source": self.source,
            "source digest": f"sha256:{self.source_digest}",
            "licence": self.licence or "not stated by the source",
            "tokenizer": self.tokenizer,
            "rows read": f"{self.rows_read}",
            "rows merged": f"{self.rows_merged} (a prompt that occurred before, with further references)",
            "rows quarantined": f"{quarantined} ({quarantined / self.rows_read:.1%})",
            "training prompts": f"{self.train_rows}",
            "evaluation prompts": f"{self.eval_rows}",
            "references": f"{self.references}",
            "prompt tokens": _lengths(self.prompt_tokens),
            "reference tokens": _lengths(self.reference_tokens),
            "digest": f"sha256:{self.digest}",
        }
        lines = [f"# Data card: {self.task}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in facts.items()]
        lines += ["", "A training row:", "", f"    {json.dumps(example, ensure_ascii=False)}"]
        if rejected:
            lines += ["", "## Quarantined", "", "| reason | rows |", "|---|---|"]
            lines += [f"| {_cell(kind)} | {count} |" for kind, count in self.rows_quarantined.items()]
            lines += ["", "The first of them (all in quarantine.jsonl):", ""]
            lines += [f"    {reason}" for reason in rejected[:10]]
        return "\n".join(lines) + "\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a `train.jsonl`, `eval.jsonl` or `quarantine.jsonl` that the prepare stage wrote.

    Raises:
        DQOError: If it is missing.
    """
    try:
        return read_jsonl(path)
    except FileNotFoundError:
        raise DQOError(f"{path}: missing; expected a file written by the prepare stage") from None


def _lengths(lengths: TokenLengths) -> str:
    return f"{lengths.min} to {lengths.max}, mean {lengths.mean:.1f}, 95% at most {lengths.p95}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
