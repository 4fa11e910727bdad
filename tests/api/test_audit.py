"""The audit log as requests write and read it."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select

from api.auth import NOBODY
from api.call import Intent
from api.refusals import Refusals
from shared import audit, keys
from shared.db import read
from shared.errors import Unauthenticated
from shared.tables import AuditEvent
from tests.api.conftest import Api, both_databases
from tests.api.test_auth import bearer

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the gate learned counts for no time, so that a key made in a test is needed at once."""
    monkeypatch.setattr("api.auth._FRESH_S", 0.0)


def events(api: Api) -> list[AuditEvent]:
    """All that is on record, oldest first."""
    with read(api.engine) as tx:
        return list(tx.scalars(select(AuditEvent).order_by(AuditEvent.created_at, AuditEvent.id)))


def actions(api: Api) -> list[tuple[str, str | None, int | None]]:
    return [(event.action, event.object_id, event.status) for event in events(api)]


@both_databases
def test_a_change_names_who_did_what_to_which(api: Api) -> None:
    """The caller's key and tenant, the object, the answer, the request's id and where it came from."""
    job = api.job()
    key = api.key("default", "jobs:write")
    headers = bearer(key) | {"x-request-id": "mine-1"}

    api.http.post(f"{JOBS}/{job['id']}/cancel", headers=headers).raise_for_status()

    last = events(api)[-1]
    assert (last.action, last.object_id, last.status) == ("jobs_cancel", job["id"], 200)
    assert (last.tenant, last.actor) == ("default", key.split("_")[1])
    assert (last.request_id, last.remote_addr) == ("mine-1", "127.0.0.1")


def test_what_is_made_is_named_by_its_new_id(api: Api) -> None:
    """An upload and a job by whoever is on this machine; both by the ids that they were answered with."""
    job = api.job()

    assert actions(api) == [("files_create", job["training_file"], 200), ("jobs_create", job["id"], 200)]
    assert {event.actor for event in events(api)} == {audit.LOCAL}


def test_deletions_are_on_record(api: Api) -> None:
    """Of a file, an adapter and a model, by the names that were given."""
    file = api.upload()
    for name in ("one", "two"):
        api.publish(name)

    for path in (f"/v1/files/{file['id']}", "/v1/adapters/one", "/v1/models/two"):
        api.http.delete(path).raise_for_status()

    assert actions(api)[-3:] == [
        ("files_delete", file["id"], 200),
        ("adapters_delete", "one", 200),
        ("models_delete", "two", 200),
    ]


def test_what_changes_nothing_is_not_on_record(api: Api) -> None:
    """Reading, generating, a job without its file, and a request that was answered before."""
    file_id = api.upload()["id"]
    body = {"model": "tiny", "training_file": file_id}
    first = api.http.post(JOBS, json=body, headers={"Idempotency-Key": "k"})
    before = actions(api)

    again = api.http.post(JOBS, json=body, headers={"Idempotency-Key": "k"})
    api.http.get(JOBS)
    api.chat()
    refused = api.http.post(JOBS, json={"model": "tiny", "training_file": "file-x"})

    assert (again.content, refused.status_code) == (first.content, 400)
    assert actions(api) == before


@both_databases
def test_there_is_no_change_without_its_event(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the event cannot be written nothing happens, since both are one transaction."""
    job = api.job()

    def fail(*_: Any) -> None:
        raise RuntimeError("no room for an event")

    monkeypatch.setattr("api.call.audit.record", fail)

    assert api.http.post(f"{JOBS}/{job['id']}/cancel").status_code == 500
    assert api.row(job["id"]).cancel_requested_at is None
    assert api.row(job["id"]).state == "queued"


@both_databases
def test_refusals_are_on_record(api: Api) -> None:
    """Who had no right key, the wrong scope, or wanted to change what is not theirs; not who only looked for it."""
    key = api.key("default", "jobs:write", "jobs:read")
    key_id = key.split("_")[1]
    gone = f"ftjob-{'0' * 32}"

    api.http.get(JOBS)
    api.http.get(JOBS, headers=bearer(f"lorad_{key_id}_{'0' * 64}"))
    api.http.post("/v1/chat/completions", headers=bearer("nonsense"), json={})
    api.http.get("/v1/files/file-1", headers=bearer(key))
    api.http.post(f"{JOBS}/{gone}/cancel", headers=bearer(key))
    api.http.get(f"{JOBS}/{gone}", headers=bearer(key))

    assert [(one.actor, one.tenant, one.action, one.object_id, one.status) for one in events(api)] == [
        ("unknown", None, "jobs_list", None, 401),
        (f"claimed:{key_id}", None, "jobs_list", None, 401),
        ("unknown", None, "completions_chat", None, 401),
        (key_id, "default", "files_retrieve", "file-1", 403),
        (key_id, "default", "jobs_cancel", gone, 404),
    ]


def test_a_flood_of_refusals_does_not_fill_the_table(api: Api) -> None:
    """Two a minute are written, the others are counted and reported with the next one."""
    from flask import Flask, g

    clock = [0.0]
    refusals = Refusals(api.engine, per_minute=2, clock=lambda: clock[0])

    def refuse() -> None:
        with Flask("x").test_request_context():
            g.request_id = "r"
            refusals.note(Unauthenticated(), NOBODY, Intent("jobs_list"), is_change=False)

    for _ in range(100):
        refuse()
    assert (len(events(api)), refusals.num_dropped) == (2, 98)
    clock[0] = 30.0
    refuse()

    assert (len(events(api)), refusals.num_dropped) == (3, 0)


@both_databases
def test_names_that_cannot_be_stored_do_no_harm(api: Api) -> None:
    """A NUL or a very long name in a refused request is cut, not answered with an error of ours."""
    api.key()

    answers = [api.http.get(f"/v1/files/{name}").status_code for name in ("a%00b", "x" * 3000, "%F0%9F%92%A9%ff")]

    assert answers == [401, 401, 401]
    assert [event.object_id for event in events(api)] == ["ab", "x" * audit.MAX_CHARS, "\U0001f4a9\ufffd"]


def test_no_content_and_no_secret_is_on_record(api: Api) -> None:
    """Neither what was sent nor the key it was sent with."""
    key = api.key("default", *keys.SCOPES)
    api.http.headers["Authorization"] = f"Bearer {key}"
    api.job(metadata={"note": "canary-in-a-body"})
    api.http.get(f"{JOBS}?api_key=canary-in-a-query", headers=bearer(f"{key[:-4]}0000"))

    written = json.dumps([{c.key: getattr(one, c.key) for c in AuditEvent.__table__.columns} for one in events(api)])

    assert "canary" not in written
    assert key.split("_")[1] in written
    assert key.split("_")[2][:8] not in written


@both_databases
def test_an_administrator_reads_their_tenant_s_events(api: Api) -> None:
    """Newest first, a page at a time, by action or by object; nothing of another tenant, nor of nobody's."""
    jobs = [api.job()["id"] for _ in range(3)]
    headers = bearer(api.key("default", "admin"))
    api.http.get(JOBS)  # refused, and nobody's

    def page(**query: Any) -> dict[str, Any]:
        return dict(api.http.get("/v1/audit", params=query, headers=headers).raise_for_status().json())

    assert [one["object_id"] for one in page(action="jobs_create")["data"]] == jobs[::-1]
    assert [one["action"] for one in page(object_id=jobs[0])["data"]] == ["jobs_create"]
    first = page(limit=4)
    rest = page(limit=4, after=first["last_id"])
    assert [first["has_more"], rest["has_more"]] == [True, False]
    assert len({one["id"] for one in first["data"] + rest["data"]}) == 6
    assert {one["actor"] for one in first["data"]} == {"local"}
    others = api.http.get("/v1/audit", headers=bearer(api.key("other", "admin"))).json()
    assert others["data"] == []


def test_only_administrators_read_it(api: Api) -> None:
    """All other scopes together are not enough; a cursor that is none is 400."""
    key, admin = api.key(), api.key("default", "admin")
    ask: Callable[..., Any] = api.http.get

    assert ask("/v1/audit", headers=bearer(key)).status_code == 403
    assert ask("/v1/audit", headers=bearer(admin)).status_code == 200
    assert ask("/v1/audit?after=audit-1", headers=bearer(admin)).status_code == 400
