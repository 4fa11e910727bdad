"""The OpenAPI 3.1 document, made from the same declarations that answer requests."""

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from openapi_pydantic import OpenAPI
from openapi_pydantic.util import PydanticSchema, construct_open_api_with_schema_class

from api import sse
from api.endpoint import Endpoint
from api.idempotency import KEY_HEADERS, KEY_PATTERN
from api.schemas.wire import ErrorBody

_NOT_MODIFIED = 304
_PATH_PARAMETER = re.compile(r"<(?:path:)?([a-z_]+)>")


def document(endpoints: Iterable[Endpoint]) -> str:
    """The document as JSON."""
    paths: dict[str, dict[str, Any]] = {}
    for one in endpoints:
        paths.setdefault(_PATH_PARAMETER.sub(r"{\1}", one.path), {})[one.method.lower()] = _operation(one)
    skeleton = OpenAPI.model_validate(
        {
            "openapi": "3.1.1",
            "info": {"title": "lorad", "version": _version(), "description": "LoRA training and serving."},
            "paths": paths,
            "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        }
    )
    whole = construct_open_api_with_schema_class(skeleton)
    return str(whole.model_dump_json(by_alias=True, exclude_none=True, indent=1))


def path_parameters(one: Endpoint) -> list[str]:
    return _PATH_PARAMETER.findall(one.path)


def _version() -> str:
    """lorad's version; a working tree that was never installed has none."""
    try:
        return version("lorad")
    except PackageNotFoundError:
        return "0"


def _operation(one: Endpoint) -> dict[str, Any]:
    scope = {"public": "No key is needed.", "any": "Any key will do."}.get(one.scope, f"Scope: {one.scope}.")
    return {
        "operationId": one.name,
        "tags": [one.resource],
        "summary": one.summary,
        "description": scope,
        "parameters": _parameters(one),
        "security": [] if one.scope == "public" else [{"key": []}],
        "responses": _responses(one),
    } | _request_body(one)


def _parameters(one: Endpoint) -> list[dict[str, Any]]:
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in path_parameters(one)
    ]
    schema = one.query.model_json_schema()
    required = schema.get("required", ())
    in_query = [
        {"name": name, "in": "query", "required": name in required, "schema": field}
        | ({"style": "deepObject", "explode": True} if _is_object(field) else {})
        for name, field in schema.get("properties", {}).items()
    ]
    in_header = [
        {"name": name, "in": "header", "required": False, "schema": {"type": "string", "pattern": f"^{KEY_PATTERN}$"}}
        for name in KEY_HEADERS[: one.creates_once]
    ]
    return in_path + in_query + in_header


def _is_object(field: dict[str, Any]) -> bool:
    return any(branch.get("type") == "object" for branch in field.get("anyOf", [field]))


def _request_body(one: Endpoint) -> dict[str, Any]:
    if one.form:
        parts = {name: {"type": "string", "description": text} for name, text in one.form.items()}
        schema: Any = {"type": "object", "properties": parts, "required": list(parts)}
        return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
    if one.body is None:
        return {}
    content = {"application/json": {"schema": PydanticSchema(schema_class=one.body)}}
    return {"requestBody": {"required": True, "content": content}}


def _responses(one: Endpoint) -> dict[str, Any]:
    content: dict[str, Any] = {kind: _medium(kind) for kind in one.media}
    if schemas := [PydanticSchema(schema_class=model) for model in one.answers]:
        content["application/json"] = {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}
    error = {"application/json": {"schema": PydanticSchema(schema_class=ErrorBody)}}
    good: dict[str, Any] = {
        str(status): {"description": ""} | ({} if status == _NOT_MODIFIED else {"content": content})
        for status in one.statuses
    }
    return good | {"default": {"description": "An error.", "content": error}}


def _medium(kind: str) -> dict[str, Any]:
    """A whole answer of this type is an object or text; OpenAPI 3.1 has no words for the events of a stream."""
    if kind == sse.CONTENT_TYPE:
        return {}
    return {"schema": {"type": "object" if kind == "application/json" else "string"}}
