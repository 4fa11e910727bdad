"""JSON as RFC 8259 means it, and no more: no duplicate keys, no NaN, no numbers that overflow, bounded depth."""

import json
import math
from typing import NoReturn

from shared import limits
from shared.errors import InvalidRequest

_MAX_INT_DIGITS = 20


def parse(raw: bytes) -> object:
    """The value that `raw` holds; raises InvalidRequest (code invalid_json) that says what is wrong and where."""
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise _invalid(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _invalid(f"nested deeper than {limits.JSON_DEPTH}") from None
    _check(value)
    return value


def _check(value: object) -> None:
    """Walk the value without recursion: bounded depth, and no text that UTF-8 cannot hold (a lone surrogate)."""
    level: list[object] = [value]
    for _ in range(limits.JSON_DEPTH + 1):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and not item.isascii():
                _check_text(item)
        if not below:
            return
        level = below
    raise _invalid(f"nested deeper than {limits.JSON_DEPTH}")


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _invalid("a lone surrogate is not a character") from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InvalidRequest(
            f"The JSON body has the key {twice!r} twice.", param=_printable(twice), code="invalid_json"
        )
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MAX_INT_DIGITS:
        raise _invalid(f"a whole number of {len(digits)} digits is too large")
    return int(digits)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _invalid(f"the number {text[:20]} is too large")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise _invalid(f"{name} is not JSON")


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _invalid(reason: str) -> InvalidRequest:
    return InvalidRequest(f"The request body is not valid JSON: {reason}.", code="invalid_json")
