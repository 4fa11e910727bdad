"""Training data as JSON Lines: what a line may hold, and what is wrong with the lines that hold something else.

Three formats; a file keeps to the one of its first line, and a line has exactly these keys:
  messages           {"messages": [{"role": "system" | "user" | "assistant", "content": str, "weight"?: 0 | 1}, ...]}
  prompt_completion  {"prompt": str, "completion": str}
  text               {"text": str}
UTF-8 with or without a byte order mark, LF or CRLF; lines of nothing but white space are skipped.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

from shared import limits
from shared.errors import InvalidTrainingFile
from shared.specs import Message

Kind = Literal["messages", "prompt_completion", "text"]
MAX_PROBLEMS: Final = 50
"""How many problems a report lists; it counts all of them."""


@dataclass(frozen=True)
class Turn:
    """One message, and whether a reply is to be learnt (`weight` 1, the default)."""

    message: Message
    is_learnt: bool


@dataclass(frozen=True)
class Conversation:
    line: int
    turns: tuple[Turn, ...]
    kind: Literal["messages"] = "messages"


@dataclass(frozen=True)
class Pair:
    line: int
    prompt: str
    completion: str
    kind: Literal["prompt_completion"] = "prompt_completion"


@dataclass(frozen=True)
class Text:
    line: int
    text: str
    kind: Literal["text"] = "text"


Sample = Conversation | Pair | Text


@dataclass(frozen=True)
class Problem:
    """What is wrong in `line` (from 1; 0 is the file as a whole), at `path` inside the line's object."""

    line: int
    path: str
    code: str
    message: str

    def __str__(self) -> str:
        place = f"line {self.line}" if self.line else "file"
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


@dataclass(frozen=True)
class FileReport:
    """What a whole file holds. `format` is None and `num_samples` 0 where no line could be read."""

    format: Kind | None
    num_samples: int
    num_problems: int
    problems: list[Problem]

    @property
    def is_valid(self) -> bool:
        return self.num_problems == 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_file(path: Path) -> FileReport:
    """Reads the whole file and reports; raises for no content, however bad."""
    found: list[Problem] = []
    num_samples = num_problems = 0
    kind: Kind | None = None
    for item in _scan(path):
        if isinstance(item, Problem):
            num_problems += 1
            if len(found) < MAX_PROBLEMS:
                found.append(item)
        else:
            num_samples += 1
            kind = kind or item.kind
    return FileReport(format=kind, num_samples=num_samples, num_problems=num_problems, problems=found)


def read_samples(path: Path) -> Iterator[Sample]:
    """The file's samples, one at a time; raises InvalidTrainingFile that names the line at the first problem."""
    for item in _scan(path):
        if isinstance(item, Problem):
            raise InvalidTrainingFile(str(item), param="training_file")
        yield item


def _scan(path: Path) -> Iterator[Sample | Problem]:
    kind: Kind | None = None
    is_empty = True
    with path.open("rb") as file:
        for line, raw in _lines(file):
            is_empty = False
            for item in [raw] if isinstance(raw, Problem) else _parse(line, raw):
                if isinstance(item, Problem):
                    yield item
                    continue
                kind = kind or item.kind
                if item.kind == kind:
                    yield item
                else:
                    message = f"this is a {item.kind} line in a {kind} file; one file has one format"
                    yield Problem(line, "", "mixed_formats", message)
    if is_empty:
        yield Problem(0, "", "empty_file", "there is no line to train on")


def _lines(file: BinaryIO) -> Iterator[tuple[int, str | Problem]]:
    """Numbered lines that hold something, decoded; stops at what makes the rest of the file unreadable."""
    start = file.read(3)
    if start.startswith(b"\x1f\x8b"):
        yield 0, Problem(0, "", "compressed", "the file is compressed with gzip; upload plain JSON Lines")
        return
    file.seek(3 if start == b"\xef\xbb\xbf" else 0)
    line = size_bytes = 0
    while raw := file.readline(limits.DATASET_LINE_BYTES + 2):  # the limit is on the text without CR LF
        line += 1
        size_bytes += len(raw)
        if line > limits.DATASET_LINES:
            yield line, Problem(line, "", "too_many_lines", f"a file has at most {limits.DATASET_LINES:,} lines")
            return
        if size_bytes > limits.DATASET_BYTES:
            yield line, Problem(line, "", "file_too_large", f"a file has at most {limits.DATASET_BYTES:,} bytes")
            return
        text = raw.rstrip(b"\r\n")
        if len(text) > limits.DATASET_LINE_BYTES:
            yield line, Problem(line, "", "line_too_long", f"a line has at most {limits.DATASET_LINE_BYTES:,} bytes")
            while not raw.endswith(b"\n") and (raw := file.readline(limits.DATASET_LINE_BYTES)):
                size_bytes += len(raw)
        elif text.strip():
            yield line, _decode(line, text)


def _decode(line: int, text: bytes) -> str | Problem:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        return Problem(line, "", "invalid_utf8", f"byte {error.start + 1} is not UTF-8")


def _parse(line: int, text: str) -> list[Sample | Problem]:
    """The one sample of a line, or everything that is wrong with it."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        return [Problem(line, "", "invalid_json", f"not JSON: {error.msg} at column {error.colno}")]
    except ValueError as error:
        return [Problem(line, "", "invalid_json", f"not JSON: {error}")]
    except RecursionError:
        return [Problem(line, "", "invalid_json", "nested too deep")]
    if not isinstance(value, dict):
        return [Problem(line, "", "not_an_object", "a line must be a JSON object")]
    for key, read in _READERS.items():
        if key in value:
            return read(line, value)
    keys = ", ".join(f"'{_printable(k)}'" for k in list(value)[:10]) or "none"
    wanted = "'messages', 'prompt' and 'completion', or 'text'"
    return [Problem(line, "", "unknown_format", f"keys must be {wanted}; there are {keys}")]


def _read_conversation(line: int, value: dict[str, Any]) -> list[Sample | Problem]:
    problems = _unknown_keys(line, value, "messages")
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        return [*problems, Problem(line, "messages", "wrong_type", "must be a list of at least one message")]
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        read = _read_turn(line, f"messages[{i}]", message)
        problems += [item for item in read if isinstance(item, Problem)]
        turns += [item for item in read if isinstance(item, Turn)]
    if not problems and not any(t.is_learnt and t.message.role == "assistant" for t in turns):
        problems.append(Problem(line, "messages", "nothing_to_learn", "there is no assistant message to learn"))
    return [*problems] if problems else [Conversation(line, tuple(turns))]


def _read_turn(line: int, path: str, value: object) -> list[Turn | Problem]:
    if not isinstance(value, dict):
        return [Problem(line, path, "wrong_type", "must be an object with role and content")]
    problems = _unknown_keys(line, value, "role", "content", "weight", path=path)
    role, weight = value.get("role"), value.get("weight", 1)
    if role not in ("system", "user", "assistant"):
        given = f"'{_printable(role)}'" if isinstance(role, str) else type(role).__name__
        message = f"must be system, user or assistant, not {given}"
        problems.append(Problem(line, f"{path}.role", "unknown_role", message))
    if isinstance(weight, bool) or weight not in (0, 1):
        problems.append(Problem(line, f"{path}.weight", "invalid_weight", "must be 0 or 1"))
    elif "weight" in value and role != "assistant":
        problems.append(Problem(line, f"{path}.weight", "invalid_weight", "only assistant messages have a weight"))
    problems += _check_text(line, f"{path}.content", value.get("content"), may_be_empty=role != "assistant")
    if problems:
        return [*problems]
    return [Turn(Message(role=role, content=value["content"]), is_learnt=weight == 1)]  # type: ignore[arg-type]  # checked above


def _read_pair(line: int, value: dict[str, Any]) -> list[Sample | Problem]:
    problems = _unknown_keys(line, value, "prompt", "completion")
    problems += _check_text(line, "prompt", value.get("prompt"), may_be_empty=True)
    problems += _check_text(line, "completion", value.get("completion"))
    return [*problems] if problems else [Pair(line, value["prompt"], value["completion"])]


def _read_text(line: int, value: dict[str, Any]) -> list[Sample | Problem]:
    problems = _unknown_keys(line, value, "text") + _check_text(line, "text", value["text"])
    return [*problems] if problems else [Text(line, value["text"])]


_READERS: Final = {
    "messages": _read_conversation,
    "prompt": _read_pair,
    "completion": _read_pair,
    "text": _read_text,
}


def _check_text(line: int, path: str, value: object, *, may_be_empty: bool = False) -> list[Problem]:
    if value is None:
        return [Problem(line, path, "missing", "must be given")]
    if not isinstance(value, str):
        return [Problem(line, path, "wrong_type", f"must be a string, not {type(value).__name__}")]
    if not value and not may_be_empty:
        return [Problem(line, path, "empty", "must not be empty")]
    if any("\ud800" <= c <= "\udfff" for c in value):
        return [Problem(line, path, "invalid_unicode", "holds half of a surrogate pair, which is not a character")]
    return []


def _unknown_keys(line: int, value: dict[str, Any], *known: str, path: str = "") -> list[Problem]:
    where = f"{path}." if path else ""
    allowed = " and ".join(repr(k) for k in known)
    return [
        Problem(line, where + _printable(key), "unknown_key", f"unknown key; allowed are {allowed}")
        for key in value
        if key not in known
    ]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key '{_printable(key)}' is there twice")
            seen.add(key)
    return value


def _printable(key: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in key[:80])


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
