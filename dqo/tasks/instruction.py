"""The instruction task: short instructions and questions with short free answers (the form of Dolly).

There is no rule for what a free answer is worth, so `reward` is None: the quality comes from `reward.kind` of the
recipe, reference similarity (`dqo.rewards.similarity`, where it says how that is gamed) or a reward model.

The bundled rows have two or three references that say different things, because most of these instructions have many
good answers.
"""

from pathlib import Path
from typing import Any

from dqo.tasks.base import Message, PublicSet, Row, Task


def prompt(row: Row) -> list[Message]:
    """Ask with the instruction as it stands; a context follows it after an empty line."""
    instruction, context = row["instruction"].strip(), (row["context"] or "").strip()
    return [{"role": "user", "content": f"{instruction}\n\n{context}" if context else instruction}]


def check(row: Row) -> str | None:
    """Say why a row is unusable, naming field and value; `None` when it is usable.

    A context may be empty or null.
    """
    instruction, context, references = row.get("instruction"), row.get("context"), row.get("references")
    if not isinstance(instruction, str) or not instruction.strip():
        return f"instruction: got {instruction!r}; expected a text"
    if context is not None and not isinstance(context, str):
        return f"context: got {context!r}; expected a text, which may be empty"
    if not isinstance(references, (list, tuple)) or not references:
        return f"references: got {references!r}; expected a list of answers"
    for reference in references:
        if not isinstance(reference, str) or not reference.strip():
            return f"references: got {reference!r}; expected texts"
    return None


def from_dolly(row: Row) -> dict[str, Any]:
    """A row of Dolly: its one response is the only reference."""
    response = row["response"]
    return {
        "instruction": row["instruction"],
        "context": row["context"],
        "references": [response] if isinstance(response, str) else response,
    }


DOLLY = PublicSet(
    dataset="databricks/databricks-dolly-15k",
    split="train",
    licence="CC-BY-SA-3.0",
    columns=("instruction", "context", "response"),
    convert=from_dolly,
)
"""15,000 instructions with one answer each, by employees of Databricks. Answers and contexts may be long: raise
`sft.max_response_tokens` and `data.max_prompt_tokens`, or allow a larger `data.max_bad_share`."""

INSTRUCTION = Task(
    name="instruction",
    fields=("instruction", "context"),
    bundled=Path(__file__).with_name("instructions.jsonl"),
    licence="CC0-1.0",
    prompt=prompt,
    check=check,
    reward=None,
    public=DOLLY,
)
