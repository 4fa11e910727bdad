"""Outside values into pydantic models; every problem of one input in one InvalidRequest that names its dotted path."""

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from werkzeug.datastructures import MultiDict

from shared.errors import InvalidRequest

M = TypeVar("M", bound=BaseModel)

_CODES = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}
_WORDS = {"extra_forbidden": "is not a parameter", "missing": "is required"}
_SHOWN = 8


def validated(model: type[M], value: object) -> M:
    """`value` as a `model`; raises InvalidRequest whose `param` is the first path at fault."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _as_request_error(error, value) from None


def read_query(model: type[M], arguments: MultiDict[str, str]) -> M:
    """Query parameters as a `model`; `name[key]=text` fills the dict `name` (OpenAPI's deepObject style)."""
    given: dict[str, object] = {}
    for name, values in arguments.lists():
        if len(values) > 1:
            raise InvalidRequest(f"'{name}' is given {len(values)} times.", param=name)
        if "\0" in name + values[0]:
            raise InvalidRequest(f"{name!r} must not hold the character U+0000.", param=name.replace("\0", ""))
        outer, inner = _split(name)
        if inner is None and outer not in given:
            given[outer] = values[0]
            continue
        pairs = given.setdefault(outer, {})
        if inner is None or not isinstance(pairs, dict):
            raise InvalidRequest(f"'{outer}' is given both as a value and with keys.", param=outer)
        pairs[inner] = values[0]
    return validated(model, given)


def _split(name: str) -> tuple[str, str | None]:
    outer, bracket, inner = name.partition("[")
    return (outer, inner[:-1]) if bracket and inner.endswith("]") else (name, None)


def _as_request_error(error: ValidationError, value: object) -> InvalidRequest:
    """Group pydantic's findings by path: the branches of a union each complain about the same value, and the branch
    that got furthest is the one that was meant."""
    found: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_path(detail, value), []).append(detail)
    findings = {path: why for path, why in found.items() if not any(other.startswith(f"{path}.") for other in found)}
    sentences = [_sentence(path, details) for path, details in findings.items()]
    hidden = len(sentences) - _SHOWN
    message = "; ".join(sentences[:_SHOWN]) + (f"; and {hidden} more" if hidden > 0 else "") + "."
    path, details = next(iter(findings.items()))
    return InvalidRequest(message, param=path or None, code=_CODES.get(details[0]["type"]))


def _path(detail: ErrorDetails, value: object) -> str:
    """The part of pydantic's location that exists in the input; the names of union branches do not."""
    steps: list[str] = []
    for step in detail["loc"]:
        inside = _inside(value)
        if step in inside:
            value = inside[step]
            steps.append(str(step))
    if detail["type"] == "missing":
        steps.append(str(detail["loc"][-1]))
    return ".".join(steps)


def _inside(value: object) -> Mapping[object, object]:
    """What a value holds, by key or by position."""
    if isinstance(value, list):
        return dict(enumerate(value))
    return value if isinstance(value, Mapping) else {}


def _sentence(path: str, details: list[ErrorDetails]) -> str:
    first = details[0]
    where = f"'{path}'" if path else "the body"
    if first["type"] in _WORDS:
        return f"{where} {_WORDS[first['type']]}"
    rules = " or ".join(dict.fromkeys(_rule(detail) for detail in details))
    return f"{where} {rules} (given: {_shown(first['input'])})"


def _rule(detail: ErrorDetails) -> str:
    text = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return text[:1].lower() + text[1:]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
