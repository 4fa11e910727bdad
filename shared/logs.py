"""How programs log: one line an event on standard error, without secrets and without forged lines.

Secrets are kept out where they are known; this is the second wall, for the texts of libraries and of errors. What is
taken out: what a program was given as a secret, passwords in URLs and connection strings, API keys, Authorization.
"""

import logging
import re
import sys
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Final

FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
HIDDEN: Final = "***"
SHORTEST_SECRET: Final = 6
"""Shorter ones are ordinary words, whose every mention would vanish; in the places named below they are hidden too."""

_PATTERNS: Final = (
    (re.compile(r"(://[^\s/:@]*:)[^\s/]*@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(lorad_[0-9a-zA-Z]{1,32}_)[0-9a-zA-Z]{8,}"), rf"\1{HIDDEN}"),
    (re.compile(r"\bhf_[0-9a-zA-Z]{16,}"), HIDDEN),
    (re.compile(r"(\bbearer\s+)[^\s'\",]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(\bauthorization['\"]?\s*[:=]\s*['\"]?(?:[a-z]+\s+)?)[^\s'\",]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(\bpassword['\"]?\s*[:=]\s*['\"]?)[^\s'\"&,)]+", re.IGNORECASE), rf"\1{HIDDEN}"),
)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

Redact = Callable[[str], str]


def redactor(secrets: Iterable[str] = ()) -> Redact:
    """A function that takes these secrets, and what looks like one, out of a text."""
    known = sorted({secret for secret in secrets if len(secret) >= SHORTEST_SECRET}, key=len, reverse=True)

    def redact(text: str) -> str:
        for secret in known:
            text = text.replace(secret, HIDDEN)
        for pattern, instead in _PATTERNS:
            text = pattern.sub(instead, text)
        return text

    return redact


class OneLine(logging.Formatter):
    """Writes a message with its control characters escaped, so that none can look like a line of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _CONTROL.sub(lambda found: repr(found[0])[1:-1], record.message)
        return super().formatMessage(record)


class Redacting(logging.Formatter):
    """Another formatter's lines, traceback and all, without secrets."""

    def __init__(self, inner: logging.Formatter, redact: Redact) -> None:
        super().__init__()
        self._inner = inner
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        return self._redact(self._inner.format(record))


def set_up(*, level: int = logging.INFO, secrets: Iterable[str] = ()) -> None:
    """Log to standard error from `level` on, uncaught errors included; what handlers there are redact from now on."""
    redact = redactor(secrets)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine(FORMAT))
    logging.basicConfig(level=level, handlers=[handler])
    for logger in (logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))):
        for existing in logger.handlers:
            if not isinstance(existing.formatter, Redacting):
                existing.setFormatter(Redacting(existing.formatter or OneLine(FORMAT), redact))
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger("lorad").critical("the program ends with an error", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(uncaught: threading.ExceptHookArgs) -> None:
    if uncaught.exc_type is not SystemExit and uncaught.exc_value is not None:
        name = uncaught.thread.name if uncaught.thread else "?"
        trace = (uncaught.exc_type, uncaught.exc_value, uncaught.exc_traceback)
        logging.getLogger("lorad").critical("thread %s ends with an error", name, exc_info=trace)
