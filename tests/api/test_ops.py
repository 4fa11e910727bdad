"""Health, readiness, metrics, request ids, and what a crash of ours looks like from outside."""

import logging
from dataclasses import replace

import pytest

from api.app import create_app
from shared.config import Settings
from tests.api.conftest import Api
from tests.servers import free_port


def test_health_needs_nothing(settings: Settings, tmp_path: object) -> None:
    """It answers before there is a schema, from any host, and shows no version."""
    app = create_app(replace(settings, database_url=f"sqlite:///{settings.data_dir}/empty.db"))
    answer = app.test_client().get("/healthz", headers={"Host": "10.1.2.3"})

    assert (answer.status_code, answer.get_json()) == (200, {"status": "ok"})


def test_ready_says_whether_the_schema_is_there(settings: Settings, api: Api) -> None:
    """With the schema 200; without it 503 and to be tried again."""
    assert api.http.get("/readyz").json() == {"status": "ready", "database": True, "broker": True}
    app = create_app(replace(settings, database_url=f"sqlite:///{settings.data_dir}/empty.db"))

    answer = app.test_client().get("/readyz")
    assert (answer.status_code, answer.get_json()["error"]["code"]) == (503, "unavailable")


def test_ready_without_a_broker(settings: Settings) -> None:
    """Jobs can be submitted without it, so this is ready, and says what is missing."""
    app = create_app(replace(settings, broker_url=f"redis://127.0.0.1:{free_port()}/0"))

    assert app.test_client().get("/readyz").get_json()["broker"] is False


def test_metrics_count_by_route(api: Api) -> None:
    """The label is the route's template, so that ids do not make a series each."""
    for n in range(3):
        api.http.get(f"/v1/files/file-{n}")
    api.http.get("/some/nonsense")
    text = api.http.get("/metrics").text

    assert 'lorad_http_requests_total{method="GET",route="/v1/files/<file_id>",status="404"} 3.0' in text
    assert 'route="(no route)",status="404"} 1.0' in text
    assert "nonsense" not in text


@pytest.mark.parametrize("given", ["abc-1.2_3", "A" * 64])
def test_a_good_request_id_is_kept(api: Api, given: str) -> None:
    """A caller can follow its own id through our log, on errors too."""
    for path in ("/healthz", "/nowhere"):
        assert api.http.get(path, headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "A" * 65, "<script>", "a;b"])
def test_a_bad_request_id_is_replaced(api: Api, given: str) -> None:
    """What could confuse a log is not written to one."""
    seen = api.http.get("/healthz", headers={"x-request-id": given}).headers["x-request-id"]

    assert seen != given
    assert seen.startswith("req-")


def test_our_own_mistake_is_a_500_without_its_inside(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has the trace under the request's id; the client has the id and no more."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("secret inside")

    monkeypatch.setattr("api.files.files.list_page", fail)
    with caplog.at_level(logging.ERROR, logger="lorad.api"):
        answer = api.http.get("/v1/files")

    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in caplog.text
    assert "secret inside" in caplog.text


def test_answers_are_not_stored_by_caches(api: Api) -> None:
    """JSON about a tenant's objects stays out of shared caches, and is not sniffed for markup."""
    headers = api.http.get("/v1/models").headers

    assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")
