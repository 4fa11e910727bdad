"""Who is let in: this machine until a key exists, then keys, their scopes and their tenants."""

import pytest

from api.auth import Gate
from shared import keys
from shared.db import write
from tests.api.conftest import Api

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the gate learned counts for no time, so that a test need not wait; one test looks at the time itself."""
    monkeypatch.setattr("api.auth._FRESH_S", 0.0)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8321", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "[::2]:80"],
)
def test_a_foreign_host_is_refused_without_keys(api: Api, host: str) -> None:
    """A name rebound to this machine by a foreign DNS server does not open the door."""
    answer = api.http.get(JOBS, headers={"Host": host})

    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1:8321", "[::1]", "[::1]:8321"])
def test_our_own_names_are_served_without_keys(api: Api, host: str) -> None:
    """Whatever the port."""
    assert api.http.get(JOBS, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://127.0.0.1.evil.example",
        "file://",
        "",
        "http://[::",
        "http://localhost:1@evil.example",
    ],
)
def test_a_foreign_page_is_refused_without_keys(api: Api, origin: str) -> None:
    """A page of another site may not speak through its reader's browser, not even with a body-less POST."""
    answer = api.http.post(f"{JOBS}/{api.job()['id']}/cancel", headers={"Origin": origin})

    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert api.http.get(JOBS, headers={"Origin": "http://localhost:3000"}).status_code == 200


def test_another_machine_is_refused_without_keys(api: Api) -> None:
    """Bound to an open address by mistake, the service still serves nobody else."""
    from api.app import create_app
    from shared.config import Settings

    settings = Settings(data_dir=api.layout.root, database_url=str(api.engine.url), broker_url=api.generator.broker.url)
    app = create_app(settings)
    answer = app.test_client().get(JOBS, environ_base={"REMOTE_ADDR": "192.0.2.7"}, headers={"Host": "localhost"})

    assert (answer.status_code, answer.get_json()["error"]["code"]) == (401, "invalid_api_key")
    app.extensions["lorad"][1].engine.dispose()


def test_the_first_key_closes_every_door(api: Api) -> None:
    """From then on even this machine needs one, and the SDK's error says so."""
    assert api.http.get(JOBS).status_code == 200
    key = api.key()
    answer = api.http.get(JOBS)

    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer realm="lorad"')
    assert api.http.get(JOBS, headers=bearer(key)).status_code == 200
    assert api.http.get("/healthz").status_code == api.http.get("/readyz").status_code == 200


def test_a_key_lets_other_hosts_in(api: Api) -> None:
    """With a key, the Host and Origin do not matter."""
    key = api.key()

    assert (
        api.http.get(JOBS, headers=bearer(key) | {"Host": "lorad.example", "Origin": "https://a.b"}).status_code == 200
    )


@pytest.mark.parametrize("header", ["", "Bearer", "Basic bG9yYWQ6eA==", "Bearer x", "Bearer lorad_1_2", "{key}"])
def test_what_is_no_key_is_401(api: Api, header: str) -> None:
    """A wrong scheme, and the bare key without one, are no better than none."""
    key = api.key()
    answer = api.http.get(JOBS, headers={"Authorization": header.format(key=key)})

    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_a_key_in_the_url_is_not_taken(api: Api) -> None:
    """URLs end up in logs."""
    assert api.http.get(f"{JOBS}?api_key={api.key()}").status_code == 401


def test_a_wrong_secret_and_a_revoked_key_are_401(api: Api) -> None:
    """Neither says which of the two it was."""
    key = api.key()
    wrong = key[:-1] + ("0" if key[-1] != "0" else "1")
    with write(api.engine) as tx:
        keys.revoke(tx, keys.list_all(tx)[0].id)

    answers = [api.http.get(JOBS, headers=bearer(one)).json() for one in (key, wrong)]
    assert answers[0] == answers[1]
    assert answers[0]["error"]["code"] == "invalid_api_key"


def test_a_scope_that_is_missing_is_403_and_named(api: Api) -> None:
    """A key for reading reads, and does not write."""
    headers = bearer(api.key("default", "jobs:read"))

    assert api.http.get(JOBS, headers=headers).status_code == 200
    for refused in (
        api.http.post(JOBS, json={}, headers=headers),
        api.http.get("/v1/files", headers=headers),
        api.http.get("/metrics", headers=headers),
    ):
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
    assert api.http.get("/openapi.json", headers=headers).status_code == 200


def test_another_tenant_s_objects_are_missing(api: Api) -> None:
    """Status and body are those of an id that never was; the id itself apart."""
    job, file = api.job(suffix="math"), api.upload()
    api.succeed(api.claim())
    headers = bearer(api.key("other"))
    nothing = "0" * 32

    for path, absent in (
        (f"{JOBS}/{job['id']}", f"{JOBS}/ftjob-{nothing}"),
        (f"{JOBS}/{job['id']}/events", f"{JOBS}/ftjob-{nothing}/events"),
        (f"{JOBS}/{job['id']}/events?stream=true", f"{JOBS}/ftjob-{nothing}/events?stream=true"),
        (f"/v1/files/{file['id']}", f"/v1/files/file-{nothing}"),
        (f"/v1/files/{file['id']}/content", f"/v1/files/file-{nothing}/content"),
        ("/v1/models/math", "/v1/models/none"),
        ("/v1/adapters/math/versions/1/files/adapter_config.json", "/v1/adapters/none/versions/1/files/x"),
    ):
        theirs, none = (api.http.get(one, headers=headers) for one in (path, absent))
        assert theirs.status_code == none.status_code == 404
        assert theirs.json()["error"]["code"] == none.json()["error"]["code"]
    assert api.http.post(f"{JOBS}/{job['id']}/cancel", headers=headers).status_code == 404
    assert [m["id"] for m in api.http.get("/v1/models", headers=headers).json()["data"]] == ["tiny"]


def test_another_tenant_s_file_cannot_be_trained_on(api: Api) -> None:
    """A body's reference is bound to the tenant like a URL's, and so is a cursor."""
    file = api.upload()
    headers = bearer(api.key("other"))
    body = {"model": "tiny", "training_file": file["id"]}

    assert api.http.post(JOBS, json=body, headers=headers).json()["error"]["param"] == "training_file"
    assert api.http.get(f"/v1/files?after={file['id']}", headers=headers).status_code == 400


def test_what_the_gate_knows_is_forgotten_within_five_seconds(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """A revoked key works on while it is remembered, which is shorter than promised, and then no more."""
    monkeypatch.setattr("api.auth._FRESH_S", 4.0)
    clock = [1000.0]
    monkeypatch.setattr("api.auth.time.monotonic", lambda: clock[0])
    gate, key = Gate(api.engine), api.key()

    def admitted() -> bool:
        from flask import Flask, request

        from shared.errors import Unauthenticated

        with Flask("x").test_request_context(headers=bearer(key)):
            try:
                return gate.admit(request, "jobs:read").tenant == "default"
            except Unauthenticated:
                return False

    assert admitted()
    with write(api.engine) as tx:
        keys.revoke(tx, keys.list_all(tx)[0].id)
    assert admitted()
    clock[0] += 4.9
    assert not admitted()
