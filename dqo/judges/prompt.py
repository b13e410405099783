"""What a language model is asked: prompt files, and the fences around what others wrote.

A prompt is a YAML file with a version and a digest that goes into every result. Requests and responses come between
tags that end in a nonce, a digest over the texts themselves: a response cannot hold the tag that closes it, because the
tag depends on the response. Whatever looks like such a tag, or like a control token of a chat template, is escaped.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import SandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dqo.errors import DQOError

_FOLDER = Path(__file__).with_name("prompts")
_NEEDED = {"pairwise": {"question", "response_a", "response_b"}, "pointwise": {"question", "response"}}
_CHOICES = ("A", "B", "tie")
_ENVIRONMENT = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False, autoescape=False)

# Tags of ours with any ending, and what chat templates take for the end of a turn. The list cannot be complete: a
# server that reads control tokens in the text of a message is the weak place, and each family has its own.
_LOOKALIKE = re.compile(
    r"<(?=\s*/?\s*(?:question|response)\b)"
    r"|<(?=\|[^|<>\n]{1,40}\|>)"  # <|im_end|>, <|eot_id|>
    r"|<(?=\uff5c[^\uff5c<>\n]{1,40}\uff5c>)"  # DeepSeek writes it with a wide bar
    r"|<(?=/?s>|/?(?:start|end)_of_turn>|(?:bos|eos|pad)>|</?SYS>>)"
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS)\])",
    re.IGNORECASE,
)


def escaped(text: str) -> str:
    """Escape what looks like a fence or a control token (`<` and `[` as HTML entities), nothing else."""
    whole = text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be sent
    return _LOOKALIKE.sub(lambda match: "&lt;" if match[0] == "<" else "&#91;", whole)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    version: Annotated[int, Field(ge=1)]
    mode: Literal["pairwise", "pointwise"]
    anchors: dict[int, Annotated[str, Field(min_length=1)]] | None = None
    system: str
    user: str
    reminder: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _is_whole(self) -> "_File":
        steps = sorted(self.anchors or ())
        if (self.mode == "pointwise") != bool(steps):
            raise ValueError("anchors describe the steps of mode 'pointwise', and of no other")
        if steps and (len(steps) < 2 or steps != list(range(steps[0], steps[-1] + 1))):
            raise ValueError(f"anchors: got {steps}; expected two or more whole numbers without a gap")
        used: dict[str, set[str]] = {}
        for field in ("system", "user", "reminder"):
            try:
                used[field] = meta.find_undeclared_variables(_ENVIRONMENT.parse(getattr(self, field)))
            except TemplateError as error:
                raise ValueError(f"{field}: is no template ({error})") from None
        needed = _NEEDED[self.mode]
        if missing := sorted(needed - used["user"]):
            raise ValueError(f"user: does not use {', '.join(missing)}, so that the judge would not see it")
        allowed = needed | {"nonce"} | ({"rubric"} if steps else set())
        if unknown := sorted(set().union(*used.values()) - allowed):
            raise ValueError(f"unknown names {', '.join(unknown)}; expected some of {', '.join(sorted(allowed))}")
        return self


@dataclass(frozen=True)
class Prompt:
    """A prompt file.

    Attributes:
        name: What the file calls itself.
        version: Number that its author counts up.
        digest: First 12 hex digits of the SHA-256 of the file.
        mode: Whether it asks for a comparison or a score.
        anchors: Scores and what they mean; empty in mode `pairwise`.
    """

    name: str
    version: int
    digest: str
    mode: Literal["pairwise", "pointwise"]
    anchors: Mapping[int, str]
    _system: str
    _user: str
    _reminder: str

    @property
    def field(self) -> str:
        """What the judge's answer calls the result."""
        return "verdict" if self.mode == "pairwise" else "score"

    @property
    def choices(self) -> tuple[str, ...] | tuple[int, ...]:
        """The results that are allowed."""
        return _CHOICES if self.mode == "pairwise" else tuple(sorted(self.anchors))

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema of an answer: reasons first, so that the result follows from them."""
        kind = "string" if self.mode == "pairwise" else "integer"
        return {
            "type": "object",
            "properties": {"reasons": {"type": "string"}, self.field: {"type": kind, "enum": list(self.choices)}},
            "required": ["reasons", self.field],
            "additionalProperties": False,
        }

    def messages(self, question: str, *responses: str, again: bool = False) -> list[dict[str, str]]:
        """Return the chat messages that ask for a judgement.

        Args:
            question: What was asked, see `dqo.judges.request_of`.
            responses: The responses in the order they are shown: two in mode `pairwise`, else one.
            again: Whether an answer could not be read and is asked for a second time.
        """
        tags = ["response-a", "response-b"] if self.mode == "pairwise" else ["response"]
        blocks = dict(zip(["question", *tags], [escaped(text) for text in (question, *responses)], strict=True))
        nonce = _nonce(self.digest, list(blocks.values()))
        values = {tag.replace("-", "_"): _fence(tag, nonce, text) for tag, text in blocks.items()} | {"nonce": nonce}
        if self.anchors:
            values["rubric"] = "\n".join(f"{step}: {self.anchors[step]}" for step in sorted(self.anchors))
        user = self._user + ("\n" + self._reminder if again else "")
        rendered = [("system", self._system), ("user", user)]
        return [
            {"role": role, "content": _ENVIRONMENT.from_string(text).render(values).strip()}
            for role, text in rendered
            if text.strip()
        ]


def _fence(tag: str, nonce: str, text: str) -> str:
    return f"<{tag}-{nonce}>\n{text}\n</{tag}-{nonce}>"


def _nonce(digest: str, texts: list[str]) -> str:
    """16 hex digits that stand in none of the texts, the same for the same texts, so that answers can be kept."""
    count = 0
    while True:
        source = "\0".join([digest, str(count), *(f"{len(text)}:{text}" for text in texts)])
        nonce = hashlib.sha256(source.encode()).hexdigest()[:16]
        if not any(nonce in text for text in texts):
            return nonce
        count += 1


def load_prompt(name: str) -> Prompt:
    """Read a prompt that the package ships by its name, or a .yaml file by its path.

    Raises:
        DQOError: If there is none, or it is no such file: file, field and what was expected.
    """
    shipped = sorted(path.stem for path in _FOLDER.glob("*.yaml"))
    path = _FOLDER / f"{name}.yaml" if name in shipped else Path(name)
    if name not in shipped and path.suffix != ".yaml":
        raise DQOError(f"judge.prompt: got {name!r}; expected {', '.join(shipped)}, or the path of a .yaml file")
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        file = _File.model_validate(content)
    except OSError as error:
        raise DQOError(f"judge.prompt {name!r}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        problems = [
            ": ".join([*(str(part) for part in item["loc"]), item["msg"].removeprefix("Value error, ")])
            for item in error.errors()
        ]
        raise DQOError("\n  ".join([f"judge.prompt {name!r}: is no prompt of a judge", *problems])) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8
        raise DQOError(f"judge.prompt {name!r}: is no YAML file in UTF-8 ({error})") from None
    return Prompt(
        file.name,
        file.version,
        hashlib.sha256(text.encode()).hexdigest()[:12],
        file.mode,
        file.anchors or {},
        file.system,
        file.user,
        file.reminder,
    )
