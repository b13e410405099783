"""Reading a recipe's source: every row with its place in the file, or the reason why it cannot be read.

A row that cannot be read costs itself only. What makes the whole source unusable (no such file, a column that no row
has) is an error, because it is a mistake in the recipe and not in the data.
"""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dqo.errors import DQOError
from dqo.recipe import Data
from dqo.tasks.base import PublicSet, Task

if TYPE_CHECKING:
    import datasets

_EXPECTED = "expected 'bundled', 'public', the path of a .jsonl or .parquet file, or hub:<dataset id>"
_HUB = "hub:"
_PUBLIC = "public"
_SPLIT = "train"
_LONGEST_REASON = 400


@dataclass(frozen=True)
class SourceRow:
    """A row as it was read.

    Attributes:
        line: 1-based line of a .jsonl file; 1-based row of a Parquet file or hub data set.
        raw: The row as text: the line itself, or JSON of the columns that were read.
        values: Value of each task field and of `references`.
    """

    line: int
    raw: str
    values: dict[str, Any]


@dataclass(frozen=True)
class RejectedRow:
    r"""A row that cannot be used.

    Attributes:
        line: See `SourceRow`.
        kind: What is wrong, in the few words that the card counts by.
        reason: The field, the value seen and what was expected.
        raw: See `SourceRow`; a byte that is not UTF-8 is written as `\xff`.
    """

    line: int
    kind: str
    reason: str
    raw: str

    @classmethod
    def of(cls, row: SourceRow, kind: str, reason: str) -> "RejectedRow":
        """Reject a row that was read; a long reason (a value may be of any length) is cut, the raw row is not."""
        if len(reason) > _LONGEST_REASON:
            reason = reason[:_LONGEST_REASON] + " ..."
        return cls(row.line, kind, reason, row.raw)


@dataclass(frozen=True)
class Source:
    """What was read.

    Attributes:
        name: The source as the card names it.
        file: Path or hub id, for messages and the quarantine.
        unit: What `line` counts.
        digest: SHA-256 of the file's bytes; of a hub data set, SHA-256 of the rows that were read.
        licence: SPDX identifier, `None` where the source does not state one.
        rows: Rows in the order of the source, blank lines left out.
    """

    name: str
    file: str
    unit: Literal["line", "row"]
    digest: str
    licence: str | None
    rows: Sequence[SourceRow | RejectedRow]


def read_source(data: Data, task: Task) -> Source:
    """Read the first `data.max_prompts` rows of a source.

    A text in the column of `references` counts as a list of one.

    Args:
        data: The recipe's data section.
        task: Names the fields that are read; other columns are ignored.

    Raises:
        DQOError: If the source cannot be opened, has no rows or lacks a column, or the task has no public set.
    """
    if data.source == _PUBLIC:
        source = _read_public(data, task)
    elif data.source.startswith(_HUB):
        source = _read_hub(data, _columns(data, task))
    else:
        columns = _columns(data, task)
        path = _file(data, task)
        licence = task.licence if data.source == "bundled" else None
        reader = _read_jsonl if path.suffix == ".jsonl" else _read_parquet
        try:
            source = reader(path, data, columns, licence)
        except OSError as error:
            raise _unreadable(path, error) from None
    if not source.rows:
        raise DQOError(f"data.source {source.file!r}: holds no rows; expected at least two")
    return source


def source_fingerprint(data: Data, task: Task) -> str:
    """Name a source's content without parsing it, for a cache key.

    Args:
        data: The recipe's data section.
        task: The task, for its bundled file.

    Returns:
        `sha256:<hex>` of a file's bytes. Of a hub data set its id, revision, subset and split: only a pinned
        `data.revision` makes the key change with the data.

    Raises:
        DQOError: If the file is missing or of an unknown kind.
    """
    if data.source == _PUBLIC:
        return _hub_name(_on_the_hub(data, _public_set(data, task)))
    if data.source.startswith(_HUB):
        return _hub_name(data)
    path = _file(data, task)
    try:
        with path.open("rb") as stream:
            return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
    except OSError as error:
        raise _unreadable(path, error) from None


def hub_dataset(data: Data, task: Task) -> tuple[str, str | None] | None:
    """Id and revision of the hub data set that a source names; `None` where it names a file.

    Raises:
        DQOError: If it is `public` and the task names no public set.
    """
    if data.source == _PUBLIC:
        data = _on_the_hub(data, _public_set(data, task))
    return (data.source.removeprefix(_HUB), data.revision) if data.source.startswith(_HUB) else None


def _columns(data: Data, task: Task) -> dict[str, str]:
    """Column of each task field."""
    fields = (*task.fields, "references")
    for field, column in data.columns.items():
        if field not in fields:
            raise DQOError(
                f"data.columns: {field!r} (column {column!r}) is not a field of task {task.name!r}; expected one of: "
                f"{', '.join(fields)}"
            )
    return {field: data.columns.get(field, field) for field in fields}


def _file(data: Data, task: Task) -> Path:
    for key, value in (("revision", data.revision), ("subset", data.subset), ("split", data.split)):
        if value is not None:
            raise DQOError(
                f"data.{key}: got {value!r} with data.source {data.source!r}; expected no {key}, only 'public' and "
                "hub: sources have one"
            )
    if data.source == "bundled":
        return task.bundled
    path = Path(data.source).expanduser()
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except OSError as error:  # a folder on the way that may not be searched, a name that is too long
        raise _unreadable(path, error) from None
    if is_folder:
        raise DQOError(f"data.source {data.source!r}: is a directory; {_EXPECTED}")
    if path.suffix not in (".jsonl", ".parquet"):
        raise DQOError(f"data.source {data.source!r}: got a file of kind {path.suffix!r}; {_EXPECTED}")
    if not exists:
        raise DQOError(f"data.source {data.source!r}: no such file; {_EXPECTED}")
    return path


def _unreadable(path: Path, error: OSError) -> DQOError:
    return DQOError(f"data.source {str(path)!r}: cannot be read ({error.strerror or error})")


def _read_jsonl(path: Path, data: Data, columns: dict[str, str], licence: str | None) -> Source:
    content = path.read_bytes()
    # Split as bytes and decoded line by line: a byte that is not UTF-8 costs its row, not the file. Splitting text
    # would also cut at U+2028 and its like, which may stand inside a JSON string.
    lines = enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1)
    filled = ((number, line.strip()) for number, line in lines if line.strip())
    parsed = [_parse_line(number, line) for number, line in islice(filled, data.max_prompts)]
    existing = list(dict.fromkeys(key for row in parsed if isinstance(row, SourceRow) for key in row.values))
    if existing:
        _require_columns(columns, existing, data.source)
    rows = [_select(row, columns) if isinstance(row, SourceRow) else row for row in parsed]
    return Source(data.source, str(path), "line", hashlib.sha256(content).hexdigest(), licence, rows)


def _parse_line(number: int, line: bytes) -> SourceRow | RejectedRow:
    """Parse one line; the values of the result are still named by column."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return RejectedRow(
            number,
            "not UTF-8",
            f"byte {line[error.start]:#04x} at position {error.start + 1} of the line; expected UTF-8",
            line.decode("utf-8", errors="backslashreplace"),
        )
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return RejectedRow(number, "not JSON", f"{error.msg} at position {error.pos + 1}; expected a JSON object", text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested thousands deep
        return RejectedRow(number, "not JSON", f"{str(error)[:80]}; expected a JSON object", text)
    row = SourceRow(number, text, value)
    if not isinstance(value, dict):
        return RejectedRow.of(row, "not an object", f"got {text}; expected a JSON object with the task's fields")
    return row


def _read_parquet(path: Path, data: Data, columns: dict[str, str], licence: str | None) -> Source:
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        try:
            file = pyarrow.parquet.ParquetFile(stream)
            _require_columns(columns, file.schema_arrow.names, data.source)
            cells = (
                {column: batch.column(column)[i] for column in columns.values()}
                for batch in file.iter_batches(columns=list(dict.fromkeys(columns.values())))
                for i in range(batch.num_rows)
            )
            rows = [_parquet_row(number, row, columns) for number, row in _numbered(cells, data)]
        except pyarrow.ArrowException as error:
            raise DQOError(f"data.source {data.source!r}: not a readable Parquet file ({error})") from None
    return Source(data.source, str(path), "row", digest, licence, rows)


def _parquet_row(number: int, cells: dict[str, Any], columns: dict[str, str]) -> SourceRow | RejectedRow:
    values = {}
    for column, cell in cells.items():
        try:
            values[column] = cell.as_py()
        except UnicodeDecodeError as error:  # Parquet writers do not check what they call a string
            raw = error.object.decode("utf-8", errors="backslashreplace")
            reason = f"column {column!r}: byte {error.object[error.start]:#04x} at position {error.start + 1}"
            return RejectedRow(number, "not UTF-8", f"{reason}; expected UTF-8", raw)
    return _select(SourceRow(number, _as_text(values), values), columns)


def _public_set(data: Data, task: Task) -> PublicSet:
    if task.public is None:
        raise DQOError(f"data.source 'public': task {task.name!r} names no public data set; {_EXPECTED}")
    if data.columns:
        raise DQOError(
            f"data.columns: got {data.columns} with data.source 'public', whose columns are known; expected none, or "
            f"data.source 'hub:{task.public.dataset}'"
        )
    return task.public


def _on_the_hub(data: Data, public: PublicSet) -> Data:
    """The same section for the set that `public` stands for; the recipe's own subset and split come first."""
    return data.model_copy(
        update={
            "source": _HUB + public.dataset,
            "subset": data.subset or public.subset,
            "split": data.split or public.split,
        }
    )


def _read_public(data: Data, task: Task) -> Source:
    public = _public_set(data, task)
    hub = _on_the_hub(data, public)
    asked = f"{_PUBLIC!r} ({_hub_name(hub)})"
    dataset = _load(hub, asked)
    for column in public.columns:
        if column not in dataset.column_names:
            raise DQOError(
                f"data.source {asked}: no column {column!r}; the columns are {_listed(dataset.column_names)}; expected "
                f"the form that task {task.name!r} knows: pin data.revision, or name the columns in data.columns with "
                f"data.source {hub.source!r}"
            )
    source = _hub_rows(hub, dataset, public.columns, lambda row: _converted(row, public, task))
    return replace(source, licence=public.licence)


def _converted(row: SourceRow, public: PublicSet, task: Task) -> SourceRow | RejectedRow:
    """Turn a row of the public set into one of the task; what `convert` refuses costs its row."""
    try:
        converted = public.convert(row.values)
        values = {name: converted.get(name) for name in (*task.fields, "references")}
    except Exception as error:
        # A ValueError is how a converter says why; anything else is what an odd row made it stumble over.
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return RejectedRow.of(row, "not convertible", said)
    return SourceRow(row.line, row.raw, values)


def _read_hub(data: Data, columns: dict[str, str]) -> Source:
    dataset = _load(data, repr(_hub_name(data)))
    _require_columns(columns, dataset.column_names, data.source)
    return _hub_rows(data, dataset, list(dict.fromkeys(columns.values())), lambda row: _select(row, columns))


def _load(data: Data, asked: str) -> "datasets.Dataset":
    """Load a data set from the hub or its cache; `asked` names it in an error."""
    import datasets

    try:
        return datasets.load_dataset(
            data.source.removeprefix(_HUB), data.subset, split=data.split or _SPLIT, revision=data.revision
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        what = (
            "the Hugging Face hub cannot be reached, or HF_HUB_OFFLINE is set"
            if isinstance(error, ConnectionError)
            else "the Hugging Face hub does not give this data set"
        )
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DQOError(
            f"data.source {asked}: {what} ({reason}); expected a data set that is reachable or in the hub "
            "cache; offline, take 'bundled' or the path of a local .jsonl or .parquet file as data.source"
        ) from error


def _hub_rows(
    data: Data,
    dataset: "datasets.Dataset",
    columns: Sequence[str],
    select: Callable[[SourceRow], SourceRow | RejectedRow],
) -> Source:
    """Read the columns of a data set; `select` makes fields of them."""
    rows = [
        SourceRow(number, _as_text(values), values)
        for number, values in _numbered(dataset.select_columns(list(columns)), data)
    ]
    digest = hashlib.sha256("\n".join(row.raw for row in rows).encode("utf-8", "surrogatepass")).hexdigest()
    licence = dataset.info.license or None
    return Source(_hub_name(data), data.source, "row", digest, licence, [select(row) for row in rows])


def _hub_name(data: Data) -> str:
    subset = f", subset {data.subset}" if data.subset else ""
    return f"{data.source}@{data.revision or 'main'}{subset}, split {data.split or _SPLIT}"


def _numbered(rows: Iterable[dict[str, Any]], data: Data) -> Iterable[tuple[int, dict[str, Any]]]:
    return enumerate(islice(rows, data.max_prompts), start=1)


def _as_text(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, default=str)


def _require_columns(columns: dict[str, str], existing: Sequence[str], source: str) -> None:
    for field, column in columns.items():
        if column not in existing:
            raise DQOError(
                f"data.source {source!r}: no column {column!r} for the field {field!r}; the columns are "
                f"{_listed(existing)}; name the right one in data.columns, e.g. {{{field}: {existing[0]}}}"
            )


def _select(row: SourceRow, columns: dict[str, str]) -> SourceRow | RejectedRow:
    """Rename columns to fields."""
    for column in columns.values():
        if column not in row.values:
            return RejectedRow.of(
                row, "missing column", f"no column {column!r}; the row has {_listed(list(row.values))}"
            )
    values = {field: row.values[column] for field, column in columns.items()}
    if isinstance(values.get("references"), str):
        values["references"] = [values["references"]]
    return SourceRow(row.line, row.raw, values)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:20]) or "none"
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"
