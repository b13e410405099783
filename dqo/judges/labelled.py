"""Labelled pairs: responses of which it is known which one is better, to hold a judge against."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqo.errors import DQOError
from dqo.judges import Pair
from dqo.recipe import Judge

SHIPPED = Path(__file__).with_name("labelled_pairs.jsonl")
KINDS = ("plain", "longer", "tie", "injection")
_FIELDS = {"id", "prompt", "a", "b", "label", "kind", "twin_of"}
_MIRRORED = {"A": "B", "B": "A", "tie": "tie"}


@dataclass(frozen=True)
class LabelledPair:
    """A pair with its label.

    Attributes:
        id: Name within its file.
        prompt: The request.
        a: Response A.
        b: Response B.
        label: `A`, `B` or `tie`.
        kind: `plain`; `longer`: the worse response is the longer one; `tie`; `injection`: the worse response tells the
            judge what to say.
        twin_of: Id of the pair that this one repeats with the responses swapped.
    """

    id: str
    prompt: str
    a: str
    b: str
    label: str
    kind: str = "plain"
    twin_of: str | None = None

    @property
    def pair(self) -> Pair:
        """What a judge is asked."""
        return Pair({"prompt": [{"role": "user", "content": self.prompt}]}, self.a, self.b)

    @property
    def longer(self) -> str | None:
        """The response that is longer by a fifth or more, in characters; None where neither is."""
        short, long = sorted((len(self.a), len(self.b)))
        if long < 1.2 * short:
            return None
        return "A" if len(self.a) == long else "B"


@dataclass(frozen=True)
class LabelledSet:
    """A file of labelled pairs.

    Attributes:
        name: The file's name, or `shipped`.
        digest: First 12 hex digits of the SHA-256 of the file.
        pairs: Its pairs.
    """

    name: str
    digest: str
    pairs: list[LabelledPair]


def read_labelled(path: Path | None = None) -> LabelledSet:
    """Read labelled pairs from a .jsonl file, by default the shipped ones.

    Raises:
        DQOError: With every error at once: file, line, field, value and what was expected.
    """
    source = path or SHIPPED
    try:
        text = source.read_text(encoding="utf-8")
    except OSError as error:
        raise DQOError(f"{source}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DQOError(f"{source}: not UTF-8 (byte {error.start}: {error.object[error.start]:#04x})") from None
    pairs: dict[str, LabelledPair] = {}
    problems = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            problems.append(f"line {number}: not JSON ({error})")
            continue
        if problem := _problem(row, pairs):
            problems.append(f"line {number}: {problem}")
        else:
            pairs[row["id"]] = LabelledPair(**row)
    if not pairs and not problems:
        problems.append("holds no pair; expected one JSON object a line")
    if problems:
        raise DQOError("\n  ".join([f"{source}: {len(problems)} error{'s' * (len(problems) > 1)}", *problems]))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return LabelledSet("shipped" if path is None else source.name, digest, list(pairs.values()))


def labelled_of(settings: Judge) -> LabelledSet:
    """Read the pairs that a recipe's judge is audited on: its own, or the shipped ones.

    Raises:
        DQOError: As `read_labelled`.
    """
    return read_labelled(None if settings.labelled is None else Path(settings.labelled).expanduser())


def _problem(row: Any, earlier: dict[str, LabelledPair]) -> str | None:
    """Why a row is no labelled pair; None when it is one."""
    if not isinstance(row, dict):
        return f"expected an object, got {type(row).__name__}"
    if unknown := sorted(set(row) - _FIELDS):
        return f"unknown field {unknown[0]!r}; expected some of {', '.join(sorted(_FIELDS))}"
    for field in ("id", "prompt", "a", "b", "label"):
        value = row.get(field)
        # An empty response is one that a model may give.
        if not isinstance(value, str) or not (value.strip() or field in ("a", "b")):
            return f"{field}: got {value!r}; expected text"
    if row["label"] not in _MIRRORED:
        return f"label: got {row['label']!r}; expected A, B or tie"
    kind = row.get("kind", "plain")
    if kind not in KINDS:
        return f"kind: got {kind!r}; expected one of {', '.join(KINDS)}"
    if kind in ("longer", "injection") and row["label"] == "tie":
        return f"label: got 'tie'; expected A or B, since a pair of kind {kind!r} has a worse response"
    if row["id"] in earlier:
        return f"id: {row['id']!r} stands twice"
    return _twin_problem(row, earlier)


def _twin_problem(row: dict[str, Any], earlier: dict[str, LabelledPair]) -> str | None:
    name = row.get("twin_of")
    if name is None:
        return None
    twin = earlier.get(name) if isinstance(name, str) else None
    if twin is None:
        return f"twin_of: got {name!r}; expected the id of an earlier pair"
    if (row["prompt"], row["a"], row["b"]) != (twin.prompt, twin.b, twin.a):
        return f"twin_of: {name!r} has other texts; expected the same prompt and the responses swapped"
    if row["label"] != _MIRRORED[twin.label]:
        expected = _MIRRORED[twin.label]
        return f"label: got {row['label']!r}; expected {expected!r}, since its twin {name!r} has {twin.label!r}"
    return None
