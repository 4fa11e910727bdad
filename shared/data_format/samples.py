"""What a good line becomes, and what a bad one is told."""

from dataclasses import dataclass
from typing import Literal

from shared.specs import Message

Kind = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"]


@dataclass(frozen=True)
class Turn:
    """One message, and whether a reply is to be learnt (`weight` 1, the default)."""

    message: Message
    is_learnt: bool


@dataclass(frozen=True)
class Pair:
    """A raw prompt, which may hold special tokens, and the completion to learn after it."""

    line: int
    prompt: str
    completion: str
    kind: Literal["prompt_completion"] = "prompt_completion"


@dataclass(frozen=True)
class Conversation:
    """Turns for a chat template; at least one reply is to be learnt."""

    line: int
    turns: tuple[Turn, ...]
    kind: Literal["messages", "sharegpt", "alpaca"] = "messages"
    without_template: Pair | None = None
    """The same as raw text, for a base model without a chat template; None where the format has no such form."""


@dataclass(frozen=True)
class Text:
    """Raw text, all of which is learnt."""

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
