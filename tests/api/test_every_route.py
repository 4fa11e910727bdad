"""The door of every route there is: a new one is held to this without being named here."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, get_args

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import Engine, event
from werkzeug.test import TestResponse

from api.app import create_app
from api.auth import Scope
from api.endpoint import Endpoint
from shared import keys
from shared.config import Settings
from shared.db import write
from shared.tables import ApiKey
from tests.api.conftest import Api
from tests.api.test_auth import bearer

PUBLIC = {"/healthz", "/readyz"}
ABSENT = {
    "job_id": f"ftjob-{'0' * 32}",
    "file_id": f"file-{'0' * 32}",
    "model": "absent",
    "name": "absent",
    "version": "1",
    "filename": "adapter_config.json",
}


@pytest.fixture
def app(api: Api, settings: Settings) -> Iterator[Flask]:
    """The application over the fixture's rows; nobody guesses too often for it."""
    app = create_app(replace(settings, failed_logins_per_minute=0))
    yield app
    app.extensions["lorad"][1].engine.dispose()


def endpoints(app: Flask) -> list[Endpoint]:
    """Behind every rule; what is no Endpoint has declared nothing."""
    views = [app.view_functions[rule.endpoint] for rule in app.url_map.iter_rules()]
    assert all(isinstance(view, Endpoint) for view in views)
    return [view for view in views if isinstance(view, Endpoint)]


def guarded(app: Flask) -> list[Endpoint]:
    return [one for one in endpoints(app) if one.scope != "public"]


def path_of(one: Endpoint, values: dict[str, str] = ABSENT) -> str:
    return re.sub(r"<(?:path:)?([a-z_]+)>", lambda found: values[found[1]], one.path)


def call(client: FlaskClient, one: Endpoint, path: str, key: str | None, method: str | None = None) -> TestResponse:
    return client.open(path, method=method or one.method, headers=bearer(key) if key else {}, buffered=True)


def error_of(answer: TestResponse) -> dict[str, Any]:
    """The standard body's inside; fails for any other body."""
    assert answer.mimetype == "application/json"
    body = json.loads(answer.data)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


def test_every_route_declares_who_may_use_it(app: Flask) -> None:
    """A scope that there is, and none but the two probes is open to all."""
    found = endpoints(app)

    assert len(found) > 20
    assert {one.scope for one in found} <= set(get_args(Scope))
    assert {one.path for one in found if one.scope == "public"} == PUBLIC


def wrong_headers(api: Api) -> dict[str, dict[str, str]]:
    """Ways to have no right: each is the headers, and a query, of a request."""
    good, revoked, expired = (api.key("default", *keys.SCOPES) for _ in range(3))
    ids = [key.split("_")[1] for key in (good, revoked, expired)]
    with write(api.engine) as tx:
        keys.revoke(tx, ids[1])
        row = tx.get_one(ApiKey, ids[2])
        row.expires_at = row.created_at
    return {
        "no key": {},
        "another scheme": {"Authorization": f"Basic {good}"},
        "no scheme": {"Authorization": good},
        "another header": {"X-Api-Key": good},
        "in the query": {"query": f"api_key={good}"},
        "a cookie": {"Cookie": f"api_key={good}"},
        "wrong secret": bearer(f"lorad_{ids[0]}_{'0' * 64}"),
        "revoked": bearer(revoked),
        "expired": bearer(expired),
    }


def test_no_route_is_served_without_a_right_key(app: Flask, api: Api) -> None:
    """401 and the standard body, whatever is wrong with the key; by HEAD as well."""
    client = app.test_client()
    for reason, headers in wrong_headers(api).items():
        query = headers.pop("query", "")
        for one in guarded(app):
            answer = client.open(path_of(one), method=one.method, headers=headers, query_string=query)
            assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key"), (reason, one.name)
            assert answer.headers["WWW-Authenticate"] == 'Bearer realm="lorad"'
            if one.method == "GET":
                head = client.head(path_of(one), headers=headers, query_string=query)
                assert (head.status_code, head.data) == (401, b""), (reason, one.name)


def test_no_route_is_served_without_its_scope(app: Flask, api: Api) -> None:
    """A key with all other scopes is 403; with that one alone, whatever comes is about the request."""
    client = app.test_client()
    for one in guarded(app):
        if one.scope == "any":
            continue
        others = api.key("default", *(scope for scope in keys.SCOPES if scope != one.scope))
        only = api.key("default", one.scope)

        refused = call(client, one, path_of(one), others)

        assert (refused.status_code, error_of(refused)["code"]) == (403, "insufficient_scope"), one.name
        assert call(client, one, path_of(one), only).status_code not in (401, 403), one.name


def test_any_key_opens_what_asks_for_any(app: Flask, api: Api) -> None:
    """One scope of no matter which kind is enough there."""
    client = app.test_client()
    found = [one for one in guarded(app) if one.scope == "any"]

    assert found
    assert {call(client, one, path_of(one), api.key("default", "generate")).status_code for one in found} == {200}


@pytest.fixture
def theirs(api: Api) -> dict[str, str]:
    """Objects of the tenant 'default', as paths name them: a job that made an adapter, and its file."""
    job = api.job(suffix="theirs")
    api.succeed(api.claim())
    return ABSENT | {"job_id": job["id"], "file_id": job["training_file"], "model": "theirs", "name": "theirs"}


QUERIES = {
    "jobs_retrieve": ["wait=1"],
    "jobs_events": ["stream=true", "limit=1"],
    "files_report": ["model=tiny"],
}


@contextmanager
def statements(engine: Engine) -> Iterator[list[str]]:
    """The SQL of the block."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(engine, "before_cursor_execute", note)


def test_another_tenant_s_objects_are_as_if_they_were_not(
    app: Flask, api: Api, theirs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every route that names an object: the status, the body (the name apart) and the SQL of an absent one."""
    monkeypatch.setattr("api.auth._FRESH_S", 3600.0)  # so that no SQL is the gate's
    client, stranger = app.test_client(), api.key("stranger", *keys.SCOPES)
    engine = app.extensions["lorad"][1].engine
    client.get("/v1/files", headers=bearer(stranger))  # from now on the gate knows the key
    found = [one for one in guarded(app) if "<" in one.path]

    assert len(found) > 10
    for one in found:
        for query in ("", *QUERIES.get(one.name, ())):
            with statements(engine) as foreign_sql:
                foreign = call(client, one, f"{path_of(one, theirs)}?{query}", stranger)
            with statements(engine) as absent_sql:
                absent = call(client, one, f"{path_of(one)}?{query}", stranger)
            assert foreign.status_code == absent.status_code == 404, one.name
            assert _nameless(foreign, theirs) == _nameless(absent, ABSENT), one.name
            assert foreign_sql == absent_sql, one.name


def _nameless(answer: TestResponse, names: dict[str, str]) -> str:
    error_of(answer)
    text = answer.get_data(as_text=True)
    for name in ("job_id", "file_id", "model"):
        text = text.replace(names[name], "X")
    return text


def test_their_owner_finds_them(app: Flask, api: Api, theirs: dict[str, str]) -> None:
    """The same reading requests with a key of the owner are answered, so the 404 above is about whose they are."""
    client, owner = app.test_client(), api.key("default", *keys.SCOPES)

    for one in guarded(app):
        if "<" in one.path and one.method == "GET":
            assert call(client, one, path_of(one, theirs), owner).status_code == 200, one.name


@pytest.mark.parametrize("path", ["/v1/files", "/v1/fine_tuning/jobs"])
def test_a_cursor_of_another_tenant_is_none(app: Flask, api: Api, theirs: dict[str, str], path: str) -> None:
    """A list does not tell either whether an id exists elsewhere."""
    kind = "file_id" if path == "/v1/files" else "job_id"
    client, stranger = app.test_client(), api.key("stranger", *keys.SCOPES)

    answers = [
        client.get(path, query_string={"after": ids[kind]}, headers=bearer(stranger)) for ids in (theirs, ABSENT)
    ]

    assert [answer.status_code for answer in answers] == [400, 400]
    assert _nameless(answers[0], theirs) == _nameless(answers[1], ABSENT)
