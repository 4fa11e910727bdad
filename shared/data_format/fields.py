"""The values of one line's object, and all that is wrong with them."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from shared.data_format.samples import Problem

BOOKKEEPING: Final = frozenset(
    {
        *("id", "idx", "index", "uid", "uuid", "hash", "prompt_id", "question_id"),
        *("conversation_id", "conversation_hash", "source", "dataset", "split", "category", "topic", "tags"),
        *("lang", "language", "license", "url", "title", "created_at", "meta", "metadata", "model", "score"),
    }
)
"""Keys that data sets carry along and that change nothing about what a line teaches."""


class Fields:
    """Collects what is found in one line: values that pass, problems of those that do not, keys that are skipped."""

    def __init__(self, line: int) -> None:
        self.line = line
        self.problems: list[Problem] = []
        self.ignored: set[str] = set()

    def refuse(self, path: str, code: str, message: str) -> None:
        self.problems.append(Problem(self.line, path, code, message))

    def check_keys(
        self,
        value: Mapping[str, Any],
        known: Iterable[str],
        *,
        path: str = "",
        also_ignored: frozenset[str] = frozenset(),
    ) -> None:
        """Refuses the keys of an object that are not `known`; at the line's top those of BOOKKEEPING are skipped."""
        known = tuple(known)
        skipped = frozenset() if path else BOOKKEEPING | also_ignored
        unknown = [key for key in value if key not in known]
        self.ignored.update(key for key in unknown if key in skipped)
        allowed = ", ".join(known[:-1]) + " and " + known[-1] if len(known) > 1 else known[0]
        more = "" if path else "; keys such as id and source are skipped"
        for key in unknown:
            if key not in skipped:
                where = f"{path}.{printable(key)}" if path else printable(key)
                self.refuse(where, "unknown_key", f"unknown key; allowed are {allowed}{more}")

    def text(self, path: str, value: object, *, may_be_empty: bool = False, may_be_missing: bool = False) -> str:
        """The value if it is a good string; "" otherwise, and the problem is noted."""
        if value is None:
            if not may_be_missing:
                self.refuse(path, "missing", "must be given")
        elif not isinstance(value, str):
            self.refuse(path, "wrong_type", f"must be a string, not {type(value).__name__}")
        elif not value and not may_be_empty:
            self.refuse(path, "empty", "must not be empty")
        elif not _is_encodable(value):
            self.refuse(path, "invalid_unicode", "holds half of a surrogate pair, which is not a character")
        else:
            return value
        return ""


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(key: str) -> str:
    """`key` as it can stand in a message: short, and without what a terminal or a database would choke on."""
    return "".join(c if c.isprintable() else "?" for c in key[:80])
