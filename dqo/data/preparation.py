"""From a source to training and evaluation prompts: validate, merge, split, write.

What happens to a row:

- It is used whole or quarantined whole: one bad reference of several costs the row, so that what is put aside can be
  mended and put back as it stands. References are stripped, and each is kept once.
- A row whose prompt occurred before gives its new references to the first one (CommonGen, for one, has a row for each
  reference). It is quarantined as a duplicate when it brings nothing new, or when its other fields differ.
- Prompts are the same when they are equal up to Unicode form (NFKC), letter case and white space. Their hash is the
  row's id and decides its side of the split, so a prompt falls on the same side whatever the file, the order or the
  other rows, and no rewording of spaces or case carries it across.
"""

import hashlib
import json
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dqo.data.card import DataCard, TokenLengths
from dqo.data.chat import encode_demonstration, special_tokens
from dqo.data.sources import RejectedRow, Source, SourceRow, read_source
from dqo.errors import DQOError
from dqo.files import write_jsonl, write_text
from dqo.recipe import Recipe
from dqo.tasks import calling
from dqo.tasks.base import Message, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = {"train.jsonl", "eval.jsonl", "quarantine.jsonl", "card.json", "card.md"}


def prompt_id(prompt: Iterable[Message]) -> str:
    """Return 16 hex digits that name a prompt: the start of the SHA-256 of its normalised text.

    The text is the messages' contents, NFKC-normalised and case-folded, white space collapsed.
    """
    text = "\n".join(message["content"] for message in prompt)
    # Folding may undo the normal form (Unicode 3.13, D145), hence twice.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return hashlib.sha256(" ".join(folded.split()).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def side(id_: str, eval_fraction: float) -> Literal["train", "eval"]:
    """Say where a prompt belongs: the id, read as a fraction in [0, 1), is compared with `eval_fraction`."""
    return "eval" if int(id_, 16) < eval_fraction * 2**64 else "train"


def prepare(
    recipe: Recipe,
    task: Task,
    tokenizer: "PreTrainedTokenizerBase",
    out_dir: Path,
    stop_ids: Collection[int] = (),
) -> DataCard:
    """Validate and split a recipe's data.

    Writes `train.jsonl`, `eval.jsonl` (rows: `id`, `prompt` as chat messages, `references`, and the task's fields),
    `quarantine.jsonl` (rows: `file`, `line`, `reason`, `row` as text), `card.json` and `card.md`. The folder appears
    when all of it is written; the output of an earlier call is replaced.

    Args:
        recipe: Its `data` section, `sft.max_response_tokens` and the name of the policy's model are used.
        task: Makes prompts of rows and says which rows are usable.
        tokenizer: The policy's tokenizer, with its chat template.
        out_dir: Folder to write; its parent must be writable.
        stop_ids: See `dqo.data.encode_demonstration`.

    Returns:
        The card that was written.

    Raises:
        DQOError: If the source cannot be read, a larger share than `data.max_bad_share` of its rows is unusable, or a
            side of the split is empty; then nothing is written but `<out_dir>.quarantine.jsonl`, which the message
            names. Also if `out_dir` holds other files, the tokenizer has no chat template, or a function of the task
            fails.
    """
    _check_replaceable(out_dir)
    if not tokenizer.chat_template:
        raise DQOError(
            f"policy.model {recipe.policy.model!r}: its tokenizer has no chat template; expected that of a chat or "
            "instruct model"
        )
    source = read_source(recipe.data, task)
    sifted = _sift(source, _Examiner(recipe, task, tokenizer, stop_ids))
    rows = [example.row() for example in sifted.examples]
    sides = {
        name: [row for row in rows if side(row["id"], recipe.data.eval_fraction) == name] for name in ("train", "eval")
    }
    # A failed call leaves no folder behind, so the rows to look at need a place beside it.
    stopped = out_dir.with_name(f"{out_dir.name}.quarantine.jsonl")
    problem = _too_many_bad(recipe, source, sifted, stopped) or _empty_side(recipe, source, sides)
    if problem:
        write_jsonl(stopped, _quarantine(source, sifted))
        raise DQOError(problem)
    card = _card(recipe, task, source, sifted, sides)
    _write(out_dir, source, sifted, sides, card)
    stopped.unlink(missing_ok=True)
    return card


@dataclass
class _Example:
    """A usable row.

    Attributes:
        line: Where its prompt occurred first.
        id: See `prompt_id`.
        prompt: Chat messages.
        fields: The task's fields.
        references: Each reference with its length in tokens.
        prompt_tokens: Length of the prompt in tokens.
    """

    line: int
    id: str
    prompt: list[Message]
    fields: dict[str, Any]
    references: dict[str, int]
    prompt_tokens: int

    def row(self) -> dict[str, Any]:
        return {"id": self.id, "prompt": self.prompt, "references": list(self.references), **self.fields}


@dataclass(frozen=True)
class _Sifted:
    examples: list[_Example]
    rejected: list[RejectedRow]
    merged: int


class _Examiner:
    """Judges one row at a time."""

    def __init__(
        self, recipe: Recipe, task: Task, tokenizer: "PreTrainedTokenizerBase", stop_ids: Collection[int]
    ) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.special_tokens = special_tokens(tokenizer)
        self.max_prompt_tokens = recipe.data.max_prompt_tokens
        self.max_response_tokens = recipe.sft.max_response_tokens

    def __call__(self, row: SourceRow) -> _Example | RejectedRow:
        """Return the row as an example, or the first reason against it."""
        problem = calling.check(self.task, row.values)
        if problem:
            return RejectedRow.of(row, "unusable field", problem)
        prompt = calling.prompt(self.task, row.values)
        references = row.values["references"]
        if not isinstance(references, (list, tuple)) or not all(isinstance(one, str) for one in references):
            # The `check` of a task of one's own may let it pass.
            return RejectedRow.of(row, "unusable field", f"references: got {references!r}; expected a list of texts")
        references = list(dict.fromkeys(reference.strip() for reference in references))
        fields = {name: row.values[name] for name in self.task.fields}
        if not prompt or not all(message["content"].strip() for message in prompt):
            return RejectedRow.of(row, "empty prompt", f"got {prompt!r}; expected messages with text")
        texts = [message["content"] for message in prompt] + references
        problem = _not_text([*texts, json.dumps(fields, ensure_ascii=False, default=str)])
        if problem:
            return RejectedRow.of(row, "not text", problem)
        for text in texts:
            for token in self.special_tokens:
                if token in text:
                    reason = f"{text!r} holds {token!r}, which structures a conversation; expected plain text"
                    return RejectedRow.of(row, "special token", reason)
        return self._measured(row, prompt, references, fields)

    def _measured(
        self, row: SourceRow, prompt: list[Message], references: list[str], fields: dict[str, Any]
    ) -> _Example | RejectedRow:
        example = _Example(row.line, prompt_id(prompt), prompt, fields, {}, 0)
        for number, reference in enumerate(references, start=1):
            try:
                encoded = encode_demonstration(self.tokenizer, prompt, reference, self.stop_ids)
            except DQOError as error:
                return RejectedRow.of(row, "chat template", str(error).removeprefix("chat template: "))
            if encoded.prompt_tokens > self.max_prompt_tokens:
                return RejectedRow.of(
                    row,
                    "prompt too long",
                    f"{encoded.prompt_tokens} tokens; data.max_prompt_tokens allows {self.max_prompt_tokens}",
                )
            if encoded.response_tokens > self.max_response_tokens:
                return RejectedRow.of(
                    row,
                    "reference too long",
                    f"reference {number} has {encoded.response_tokens} tokens with the end of turn; "
                    f"sft.max_response_tokens allows {self.max_response_tokens}",
                )
            example.prompt_tokens = encoded.prompt_tokens
            example.references[reference] = encoded.response_tokens
        return example


def _not_text(texts: Sequence[str]) -> str | None:
    r"""Find half of a surrogate pair: JSON can write one (`"\ud83d"`), UTF-8 and the tokenizer cannot."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"holds the lone surrogate {text[error.start]!r}; expected Unicode characters"
    return None


def _sift(source: Source, examine: _Examiner) -> _Sifted:
    """Examine every row, in order; see the module's text for what happens to repeated prompts."""
    first: dict[str, _Example] = {}
    rejected: list[RejectedRow] = []
    merged = 0
    for row in source.rows:
        if isinstance(row, RejectedRow):
            rejected.append(row)
            continue
        found = examine(row)
        if isinstance(found, RejectedRow):
            rejected.append(found)
        elif found.id not in first:
            first[found.id] = found
        elif problem := _nothing_to_merge(first[found.id], found, source.unit):
            rejected.append(RejectedRow.of(row, "duplicate prompt", problem))
        else:
            first[found.id].references |= found.references
            merged += 1
    return _Sifted(list(first.values()), rejected, merged)


def _nothing_to_merge(first: _Example, again: _Example, unit: str) -> str | None:
    for name, value in first.fields.items():
        if again.fields[name] != value:
            return f"the prompt of {unit} {first.line} with {name} {again.fields[name]!r} instead of {value!r}"
    if again.references.keys() <= first.references.keys():
        return f"the prompt of {unit} {first.line} with no new reference"
    return None


def _reasons(source: Source, sifted: _Sifted) -> list[str]:
    return [f"{source.unit} {row.line}: {row.kind}: {row.reason}" for row in sifted.rejected]


def _quarantine(source: Source, sifted: _Sifted) -> list[dict[str, Any]]:
    return [
        {"file": source.file, "line": row.line, "reason": f"{row.kind}: {row.reason}", "row": row.raw}
        for row in sifted.rejected
    ]


def _too_many_bad(recipe: Recipe, source: Source, sifted: _Sifted, quarantine: Path) -> str | None:
    bad, read = len(sifted.rejected), len(source.rows)
    if bad / read <= recipe.data.max_bad_share:
        return None
    shown = "".join(f"\n  {reason}" for reason in _reasons(source, sifted)[:3])
    return (
        f"{source.file}: {bad} of {read} rows ({bad / read:.1%}) are unusable; data.max_bad_share allows "
        f"{recipe.data.max_bad_share:.1%}. The first:{shown}\n  All of them: {quarantine}"
    )


def _empty_side(recipe: Recipe, source: Source, sides: dict[str, list[dict[str, Any]]]) -> str | None:
    train, evaluation = len(sides["train"]), len(sides["eval"])
    if train and evaluation:
        return None
    return (
        f"{source.file}: data.eval_fraction = {recipe.data.eval_fraction} gives {train} training and {evaluation} "
        f"evaluation prompts of {train + evaluation} usable ones; expected at least one of each: give more rows or "
        "another fraction"
    )


def _card(
    recipe: Recipe, task: Task, source: Source, sifted: _Sifted, sides: dict[str, list[dict[str, Any]]]
) -> DataCard:
    reference_tokens = [count for example in sifted.examples for count in example.references.values()]
    digest = hashlib.sha256()
    for name, rows in sides.items():
        for row in rows:
            digest.update(f"{name} {json.dumps(row, sort_keys=True, separators=(',', ':'))}\n".encode())
    revision = recipe.policy.revision
    return DataCard(
        task=task.name,
        source=source.name,
        source_digest=source.digest,
        licence=source.licence,
        tokenizer=recipe.policy.model + (f"@{revision}" if revision else ""),
        rows_read=len(source.rows),
        rows_merged=sifted.merged,
        rows_quarantined=dict(Counter(row.kind for row in sifted.rejected).most_common()),
        train_rows=len(sides["train"]),
        eval_rows=len(sides["eval"]),
        references=len(reference_tokens),
        prompt_tokens=TokenLengths.of([example.prompt_tokens for example in sifted.examples]),
        reference_tokens=TokenLengths.of(reference_tokens),
        digest=digest.hexdigest(),
    )


def _check_replaceable(out_dir: Path) -> None:
    """Refuse to replace a folder that holds anything but an earlier output."""
    if out_dir.exists() and not out_dir.is_dir():
        raise DQOError(f"{out_dir}: is a file; expected a folder to write the data to")
    others = sorted({path.name for path in out_dir.iterdir()} - _FILES) if out_dir.exists() else []
    if others:
        raise DQOError(
            f"{out_dir}: holds {others[0]!r}, which is no prepared data; expected a new or empty folder, or an earlier "
            "output to replace"
        )


def _write(
    out_dir: Path, source: Source, sifted: _Sifted, sides: dict[str, list[dict[str, Any]]], card: DataCard
) -> None:
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}.") as scratch:
        unfinished = Path(scratch) / "new"
        for name, rows in sides.items():
            write_jsonl(unfinished / f"{name}.jsonl", rows)
        write_jsonl(unfinished / "quarantine.jsonl", _quarantine(source, sifted))
        write_text(unfinished / "card.json", card.to_json())
        write_text(unfinished / "card.md", card.to_markdown(sides["train"][0], _reasons(source, sifted)))
        if out_dir.exists():
            out_dir.rename(Path(scratch) / "old")
        unfinished.rename(out_dir)
