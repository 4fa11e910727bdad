"""What every bad input is owed: an error of a stable code in JSON, and a service that is as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
from sqlalchemy import func, select

from shared.db import read
from shared.tables import Table
from tests.api.conftest import Api

JOBS = "/v1/fine_tuning/jobs"
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
NOTED = {"audit_events"}
"""Tables that may grow when something is refused."""
INSIDES = ("Traceback", 'File "', ".py", "sqlalchemy", "sqlite3")


@dataclass(frozen=True)
class Bad:
    """One bad request and its answer. `number` is the row of the catalogue in test_bad_inputs.py; a `body` is JSON,
    `content` is bytes as they are; `param` is compared where it is given."""

    number: int
    what: str
    status: int
    code: str
    param: str | None = None
    method: str = "POST"
    path: str = JOBS
    body: Any = None
    content: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.number:02}-{self.what}"

    def send(self, api: Api) -> httpx2.Response:
        if self.body is not None:
            return api.http.request(self.method, self.path, json=self.body, headers=self.headers)
        return api.http.request(self.method, self.path, content=self.content, headers=JSON | self.headers)


def chosen(cases: list[Bad]) -> dict[str, Any]:
    """Arguments of pytest.mark.parametrize, so that a test's id begins with the number."""
    return {"argnames": "bad", "argvalues": cases, "ids": [str(case) for case in cases]}


def assert_refused(api: Api, bad: Bad) -> None:
    """The answer is `bad`'s, tells nothing of our insides, and nothing is left of the request but the service."""
    with unchanged(api):
        answer = bad.send(api)
    assert_told(answer, bad.status, bad.code, bad.param)


def assert_told(answer: httpx2.Response, status: int, code: str, param: str | None = None) -> None:
    """The answer is an error body with this code."""
    told = answer.json()
    assert set(told) == {"error"}
    assert set(told["error"]) == {"message", "type", "param", "code"}
    assert (answer.status_code, told["error"]["code"]) == (status, code), answer.text
    assert param is None or told["error"]["param"] == param, answer.text
    assert [word for word in INSIDES if word in answer.text] == []


@contextmanager
def unchanged(api: Api) -> Iterator[None]:
    """No row and no file more or less after the block than before it, and the service answers."""
    before = _contents(api)
    yield
    assert _contents(api) == before
    assert api.http.get("/healthz").status_code == 200


def _contents(api: Api) -> dict[str, object]:
    """How many rows each table has, and which files the store."""
    with read(api.engine) as tx:
        rows: dict[str, object] = {
            table.name: tx.scalar(select(func.count()).select_from(table))
            for table in Table.metadata.sorted_tables
            if table.name not in NOTED
        }
    return rows | {"files": sorted(str(path) for path in api.layout.root.rglob("*") if path.is_file())}
