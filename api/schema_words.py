"""JSON schemas in a few words, for people."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel


class FieldWords(NamedTuple):
    """One key of an object. `default` is 'required', a value in backticks, or empty where it is not a plain value."""

    name: str
    kind: str
    default: str


def fields(model: type[BaseModel]) -> Iterator[FieldWords]:
    """The keys of a model in their order."""
    schema = model.model_json_schema(mode="validation")
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in schema.get("required", ()) else _default(field)
        yield FieldWords(name, _kind(field), default)


def _default(field: dict[str, Any]) -> str:
    value = field.get("default", {})
    return "" if isinstance(value, dict) else f"`{json.dumps(value)}`"


def _kind(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(branch) for branch in schema["anyOf"]))
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(dict.fromkeys(f"`{json.dumps(value)}`" for value in schema["enum"]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}{_between(schema, 'minItems', 'maxItems', ' items')}"
    numbers = _between(schema, "minimum", "maximum")
    return f"{schema.get('type', 'any')}{numbers}{_between(schema, 'minLength', 'maxLength', ' characters')}"


def _between(schema: dict[str, Any], least: str, most: str, unit: str = "") -> str:
    """'1..8', 'at least 1', 'above 0, at most 1', or nothing."""
    low, high = schema.get(least), schema.get(most)
    if low is not None and high is not None:
        return f" {low:,}..{high:,}{unit}"
    parts = [f"at least {low:,}"] if low is not None else []
    parts += [f"above {schema['exclusiveMinimum']:,}"] if least == "minimum" and "exclusiveMinimum" in schema else []
    parts += [f"at most {high:,}"] if high is not None else []
    return f" {', '.join(parts)}{unit}" if parts else ""
