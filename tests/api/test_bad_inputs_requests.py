"""Bad requests, rows 1 to 29 of the catalogue in test_bad_inputs.py: what is no good JSON, and no good job."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared import limits
from shared.config import Settings
from tests.api.conftest import CONTEXT, Api, serve
from tests.api.refused import JOBS, Bad, assert_refused, assert_told, chosen, unchanged
from tests.servers import Broker

NOBODY = "ftjob-" + "0" * 32
FILE = "file-" + "0" * 32


@pytest.fixture(scope="module")
def api(broker: Broker, sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One service for all cases, since each leaves it as it was."""
    place = tmp_path_factory.mktemp("requests")
    database_url = f"sqlite:///{shutil.copyfile(sqlite_template, place / 'lorad.db')}"
    settings = Settings(data_dir=place / "data", database_url=database_url, broker_url=broker.url)
    with serve(settings, broker) as running:
        running.publish("math")
        yield running


def raw(number: int, what: str, content: bytes, code: str = "invalid_json") -> Bad:
    """A body that is refused before anybody asks what it means."""
    return Bad(number, what, 400, code, content=content)


def job(number: int, what: str, param: str, code: str = "invalid_value", **fields: Any) -> Bad:
    """A job whose field `param` is wrong."""
    return Bad(number, what, 400, code, param, body={"model": "tiny", "training_file": FILE} | fields)


def rate(number: int, what: str, value: str) -> Bad:
    return raw(number, what, b'{"training": {"learning_rate": %s}}' % value.encode())


PADDED = b'{"x": "' + b"a" * (limits.JSON_BODY_BYTES - 8) + b'"}'

MALFORMED = [
    raw(1, "empty body", b""),
    raw(2, "form", b"model=tiny"),
    raw(2, "half an object", b'{"model": "tiny"'),
    raw(2, "UTF-16", '{"model": "tiny"}'.encode("utf-16")),
    raw(2, "invalid UTF-8", b'{"model": "\xff"}'),
    raw(2, "a list", b"[]", "invalid_value"),
    Bad(3, "text", 415, "unsupported_media_type", content=b"{}", headers={"Content-Type": "text/plain"}),
    Bad(3, "no type", 415, "unsupported_media_type", content=b"{}", headers={"Content-Type": ""}),
    Bad(4, "a byte too many", 413, "payload_too_large", content=PADDED),
    raw(6, "lists in lists", b"[" * 100_000 + b"]" * 100_000),
    raw(6, "objects in objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    rate(7, "NaN", "NaN"),
    rate(7, "Infinity", "Infinity"),
    rate(7, "1e999", "1e999"),
    raw(8, "a key twice", b'{"lora": {"r": 8, "r": 9999}}'),
    raw(9, "5000 digits", b'{"seed": ' + b"9" * 5000 + b"}"),
]

WRONG_JOBS = [
    job(10, "true for a number", "lora.r", lora={"r": True}),
    job(10, "1 for a flag", "dry_run", dry_run=1),
    job(11, "text for a number", "lora.r", lora={"r": "8"}),
    *(job(12, name, name, "unknown_parameter", **{name: "x"}) for name in ("tenant_id", "state", "output_dir")),
    *(job(13, f"r {r}", "lora.r", lora={"r": r}) for r in (0, -1, 257, 8.5)),
    *(job(14, f"rate {x}", "training.learning_rate", training={"learning_rate": x}) for x in (0, -1, 2)),
    job(15, "a billion epochs", "hyperparameters.n_epochs", hyperparameters={"n_epochs": 10**9}),
    job(12, "inside an object", "lora.rank", "unknown_parameter", lora={"rank": 8}),
]


@pytest.mark.parametrize(**chosen(MALFORMED))
def test_malformed(api: Api, bad: Bad) -> None:
    """What two parsers could read differently, what is too large and what is no JSON never becomes a job."""
    assert_refused(api, bad)


@pytest.mark.parametrize(**chosen(WRONG_JOBS))
def test_wrong_jobs(api: Api, bad: Bad) -> None:
    """A field at fault is named by its path; nothing is converted, nothing unknown passed over."""
    assert_refused(api, bad)


def test_row_16_the_model_s_limit_is_told(api: Api) -> None:
    """A sequence longer than the model's context is refused with that context."""
    fields = {"model": "tiny", "training_file": api.upload()["id"], "training": {"max_seq_len": CONTEXT + 1}}
    with unchanged(api):
        answer = api.http.post(JOBS, json=fields)

    assert_told(answer, 400, "invalid_value", "training.max_seq_len")
    assert str(CONTEXT) in answer.json()["error"]["message"]


NAMES = {
    17: ["../../etc/passwd"],
    18: ["..%2f..%2fetc", "%252e%252e", "..\\..\\x", "a;/../b"],
    19: ["abc\n", "a\0b", "x" * 65, "", ".", "..", "CON", "a..b", "🙂", "\u202ea", "u\u0308ni", "-a", "Math", "a b"],
    20: ["tiny"],
}


@pytest.mark.parametrize(
    ("number", "name"),
    [(number, name) for number, names in NAMES.items() for name in names],
    ids=lambda value: f"{value:02}" if isinstance(value, int) else value.encode("unicode_escape").decode(),
)
def test_bad_names(api: Api, number: int, name: str) -> None:
    """A name is an adapter's letter for letter, or it is refused. A base model's is taken; another job's is not:
    that makes the next version."""
    training_file = api.upload()["id"]
    with unchanged(api):
        answer = api.http.post(JOBS, json={"model": "tiny", "training_file": training_file, "suffix": name})

    assert_told(answer, 400, "invalid_value", "suffix")


def get(number: int, path: str, code: str = "not_found") -> Bad:
    return Bad(number, path, 404, code, method="GET", path=path)


NOWHERE = [
    get(18, "/v1/adapters/..%2f..%2fetc%2fpasswd"),
    get(18, "/v1/models/..%2f..%2fetc%2fpasswd", "model_not_found"),
    get(18, "/v1/models/%252e%252e", "model_not_found"),
    get(18, "/v1/adapters/..%5C..%5Cx"),
    get(18, "/v1/adapters/a;%2F..%2Fb"),
    get(18, "/v1/adapters/math/versions/1/files/..%2F..%2Florad.db"),
    get(18, "/v1/files/..%2f..%2fetc%2fpasswd/content"),
    *(get(21, f"{JOBS}/{one}") for one in (f"{{{NOBODY}}}", NOBODY.upper(), "1", "1%20OR%201=1", NOBODY, "%00")),
    *(get(21, f"/v1/files/{one}") for one in ("1", "FILE-" + "0" * 32, FILE, "%EF%BB%BF" + FILE, FILE + "%0A")),
]


@pytest.mark.parametrize(**chosen(NOWHERE))
def test_what_names_nothing_is_404(api: Api, bad: Bad) -> None:
    """However it is spelt, what is not there is 404 in JSON, and nothing outside the store is opened."""
    assert_refused(api, bad)


FOREIGN = [
    Bad(26, "host", 403, "host_not_allowed", method="GET", headers={"Host": "evil.example"}),
    Bad(27, "origin", 403, "origin_not_allowed", content=b"{}", headers={"Origin": "https://evil.example"}),
]


@pytest.mark.parametrize(**chosen(FOREIGN))
def test_foreign_pages_are_not_served_without_keys(api: Api, bad: Bad) -> None:
    """A page of another site gets nothing from a service that asks nobody for a key."""
    assert_refused(api, bad)
