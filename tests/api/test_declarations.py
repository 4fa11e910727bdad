"""What every endpoint owes: a scope, a docstring, an entry in the documents; and what the package never imports."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from api import docs, openapi
from api.app import ENDPOINTS, create_app
from api.auth import Scope
from api.endpoint import Endpoint
from shared import errors, keys
from shared.config import Settings
from tests.api.conftest import Api

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def document() -> Any:
    return json.loads(openapi.document(ENDPOINTS))


def test_every_route_is_an_endpoint_with_a_scope(settings: Settings) -> None:
    """No route gets in beside the declarations, and only health and readiness are public."""
    app = create_app(settings)
    views = [app.view_functions[rule.endpoint] for rule in app.url_map.iter_rules()]

    assert views
    assert all(isinstance(view, Endpoint) and view.scope in get_args(Scope) for view in views)
    assert {view.path for view in views if isinstance(view, Endpoint) and view.scope == "public"} == {
        "/healthz",
        "/readyz",
    }


def test_every_route_but_two_refuses_a_stranger(api: Api) -> None:
    """With a key in the database, each route asked without one answers 401 before anything else."""
    api.key()

    for one in ENDPOINTS:
        path = re.sub("<[^>]*>", "x", one.path)
        answer = api.http.request(one.method, path)
        assert (answer.status_code == 401) == (one.scope != "public"), one.path


def test_reading_and_writing_have_their_scopes() -> None:
    """A GET never needs a write scope and nothing else makes do with a read scope."""
    for one in ENDPOINTS:
        if one.scope in keys.SCOPES and ":" in one.scope:
            assert one.scope.endswith(":read") == (one.method == "GET"), one.path


def test_every_endpoint_says_what_it_does() -> None:
    """The docstring is the documentation."""
    assert [one.name for one in ENDPOINTS if not one.summary.endswith(".")] == []


def test_the_document_has_every_endpoint_once(document: Any) -> None:
    """Operation ids are unique, and paths and methods are those of the declarations."""
    operations = [op for path in document["paths"].values() for op in path.values()]

    assert sorted(op["operationId"] for op in operations) == sorted(one.name for one in ENDPOINTS)
    assert len({op["operationId"] for op in operations}) == len(ENDPOINTS)


def test_the_document_has_no_loose_ends(document: Any) -> None:
    """Every $ref leads to a schema, and every parameter of a path is declared."""
    text = json.dumps(document)
    refs = set(re.findall(r'"#/components/schemas/([^"]+)"', text))

    assert refs
    assert refs <= set(document["components"]["schemas"])
    for path, methods in document["paths"].items():
        for operation in methods.values():
            declared = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
            assert declared == set(re.findall(r"{(\w+)}", path))


def test_the_document_shows_limits(document: Any) -> None:
    """Bounds are in the schemas, so that a client can check before it asks."""
    (limit,) = [p for p in document["paths"]["/v1/fine_tuning/jobs"]["get"]["parameters"] if p["name"] == "limit"]

    assert (limit["schema"]["minimum"], limit["schema"]["maximum"]) == (1, 100)
    assert document["components"]["schemas"]["JobRequest"]["additionalProperties"] is False


def test_docs_api_md_is_as_made() -> None:
    """The committed reference is what the code gives: run `python -m api.docs`."""
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == docs.markdown(ENDPOINTS)


def test_the_page_loads_nothing(api: Api) -> None:
    """No script, no style sheet and no image from anywhere, and a policy that forbids them."""
    page = api.http.get("/docs")

    assert page.status_code == 200
    assert "POST /v1/fine_tuning/jobs" in page.text
    assert not re.search(r"<(script|link|img|iframe)|url\(|@import", page.text)
    assert page.headers["content-security-policy"].startswith("default-src 'none'")


def test_served_document_equals_the_made_one(api: Api, document: Any) -> None:
    """/openapi.json is the same document."""
    assert api.http.get("/openapi.json").json() == document


def test_every_user_error_has_an_answer_of_its_own() -> None:
    """Only errors that no request can cause are answered with 500."""
    from api.errors import answer_for

    ours = {errors.OwnershipLost, errors.TrainingFailed, errors.StartupError}
    kinds = {kind for kind in errors.LoradError.__subclasses__() if kind.__module__ == "shared.errors"}

    assert {kind for kind in kinds if answer_for(kind()).status == 500} == ours


def test_no_torch_behind_the_api() -> None:
    """The application with all it imports does without torch, transformers and safetensors."""
    code = (
        "import sys, api.app; "
        "print(sorted({'torch', 'transformers', 'safetensors', 'worker', 'peft'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert printed.strip() == "[]"
