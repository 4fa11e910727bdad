"""A database that does not answer: the API says so, and that it is to be tried again."""

from contextlib import ExitStack

import pytest

from shared import db
from shared.db import read
from tests.api.conftest import Api


def test_a_database_whose_connections_all_hang_is_503(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is one that does not answer the requests before, until none of the pool's connections is left."""
    monkeypatch.setattr(api.services.engine.pool, "_timeout", 0.2)
    with ExitStack() as hanging:
        for _ in range(15):
            hanging.enter_context(api.services.engine.connect())
        answer = api.http.get("/v1/files")

    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert api.http.get("/v1/files").status_code == 200


def test_an_unreachable_database_is_503(api: Api) -> None:
    """A database that is away is said to be away, and is to be tried again."""
    api.engine.dispose()
    with read(api.engine) as tx:
        tx.connection().exec_driver_sql("ALTER TABLE files RENAME TO files_away")
        tx.commit()
    answer = api.http.get("/v1/files")

    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "files" not in answer.json()["error"]["message"]


def test_a_transaction_that_the_database_gave_up_is_503(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Postgres ends one that says nothing for too long, which is no OperationalError: it is to be tried again too."""

    def give_up(*_: object, **__: object) -> None:
        raise db.InternalError("SELECT 1", {}, Exception("terminating connection due to idle-in-transaction timeout"))

    monkeypatch.setattr("shared.store.files.list_page", give_up)
    answer = api.http.get("/v1/files")

    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
