"""Bad input: the right status, a stable code, the field's name, and nothing left behind."""

import json
import socket
from typing import Any

import pytest
from sqlalchemy import func, select

from shared import limits
from shared.db import read
from shared.tables import File, Job
from tests.api.conftest import SAMPLES, Api, both_databases

JOBS = "/v1/fine_tuning/jobs"
JSON = {"Content-Type": "application/json"}


def refused(api: Api, raw: bytes, path: str = JOBS, **headers: str) -> tuple[int, str | None, str | None]:
    """Status, code and param of the answer to a raw body."""
    answer = api.http.post(path, content=raw, headers=JSON | headers)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"], error["param"]


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"model=tiny", "invalid_json"),
        (b"\xff\xfe{}", "invalid_json"),
        (b'{"model": "\xff"}', "invalid_json"),
        (b'{"model": "\\ud800"}', "invalid_json"),
        (b'{"training": {"learning_rate": NaN}}', "invalid_json"),
        (b'{"training": {"learning_rate": Infinity}}', "invalid_json"),
        (b'{"training": {"learning_rate": 1e999}}', "invalid_json"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b"[" * 100_000 + b"]" * 100_000, "invalid_json"),
        (b"[" * 40 + b"]" * 40, "invalid_json"),
        (b'{"lora": {"r": 8, "r": 9999}}', "invalid_json"),
        (b"[]", "invalid_value"),
        (b'"tiny"', "invalid_value"),
        (b"null", "invalid_value"),
    ],
)
def test_what_is_not_a_json_object_is_400(api: Api, raw: bytes, code: str) -> None:
    """JSON that two parsers could read differently, or that is none, is refused with one code."""
    assert refused(api, raw)[:2] == (400, code)


def test_depth_32_is_accepted_33_not() -> None:
    """The limit is exact."""
    from api import strict_json
    from shared.errors import InvalidRequest

    def nested(depth: int) -> bytes:
        return b"[" * depth + b"1" + b"]" * depth

    assert strict_json.parse(nested(limits.JSON_DEPTH))
    with pytest.raises(InvalidRequest, match="deeper than 32"):
        strict_json.parse(nested(limits.JSON_DEPTH + 1))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tenant_id": "x"}, "tenant_id"),
        ({"state": "succeeded"}, "state"),
        ({"dry_run": 1}, "dry_run"),
        ({"lora": {"rank": 8}}, "lora.rank"),
        ({"lora": {"r": 0}}, "lora.r"),
        ({"lora": {"r": 257}}, "lora.r"),
        ({"lora": {"r": 8.5}}, "lora.r"),
        ({"lora": {"r": True}}, "lora.r"),
        ({"lora": {"r": "8"}}, "lora.r"),
        ({"lora": {"alpha": 0}}, "lora.alpha"),
        ({"lora": {"dropout": 0.95}}, "lora.dropout"),
        ({"lora": {"target_modules": "(a+)+$"}}, "lora.target_modules"),
        ({"lora": {"target_modules": []}}, "lora.target_modules"),
        ({"lora": {"target_modules": ["q_proj", "../x"]}}, "lora.target_modules.1"),
        ({"lora": {"target_modules": ["c_attn"]}}, "lora.target_modules"),
        ({"training": {"lr": 1}}, "training.lr"),
        ({"training": {"learning_rate": 0}}, "training.learning_rate"),
        ({"training": {"learning_rate": 2}}, "training.learning_rate"),
        ({"training": {"max_seq_len": 129}}, "training.max_seq_len"),
        ({"training": {"max_steps": 0}}, "training.max_steps"),
        ({"training": {"init_from": "math@1"}}, "training.init_from"),
        ({"hyperparameters": {"n_epochs": 10**9}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"learning_rate_multiplier": 1e6}}, "hyperparameters.learning_rate_multiplier"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"epochs": 3}}}},
            "method.supervised.hyperparameters.epochs",
        ),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"integrations": [{"type": "wandb"}]}, "integrations"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"priority": 101}, "priority"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"metadata": {"k": "a\0b"}}, "metadata.k"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"model": "../x"}, "model"),
        ({"model": "absent"}, "model"),
        ({"training_file": "file-1"}, "training_file"),
        ({"training_file": "../../etc/passwd"}, "training_file"),
        ({"validation_file": "file-" + "0" * 32}, "validation_file"),
    ],
)
def test_a_bad_job_parameter_is_400_and_named(api: Api, fields: dict[str, Any], param: str) -> None:
    """The dotted path of the field at fault is in `param`, and no job is made."""
    answer = api.submit(**fields)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    with read(api.engine) as tx:
        assert tx.scalar(select(func.count()).select_from(Job)) == 0


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "..",
        ".",
        "",
        "a/b",
        "abc\n",
        "a\0b",
        "x" * 65,
        "CON",
        "Math",
        "ünï",
        "a..b",
        "\u202ea",
        "tiny",
    ],
)
def test_a_bad_adapter_name_is_400(api: Api, name: str) -> None:
    """A suffix is an adapter's name, letter for letter, and not that of a base model."""
    answer = api.submit(suffix=name)

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "suffix")


def test_all_problems_are_told_at_once(api: Api) -> None:
    """One answer lists every field at fault; `param` is the first."""
    error = api.submit(lora={"r": 0, "alpha": -1}, nonsense=1).json()["error"]

    assert error["param"] == "lora.r"
    assert all(name in error["message"] for name in ("'lora.r'", "'lora.alpha'", "'nonsense'", "(given: -1)"))


def test_the_model_s_context_is_in_the_message(api: Api) -> None:
    """A length above the model's says what the model has."""
    message = api.submit(training={"max_seq_len": 4096}).json()["error"]["message"]

    assert "128" in message
    assert "'tiny'" in message


def test_a_required_key_that_is_missing_is_named(api: Api) -> None:
    """`missing_required_parameter` is a code of its own."""
    assert refused(api, b'{"training_file": "file-1"}') == (400, "missing_required_parameter", "model")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_another_content_type_is_415(api: Api, content_type: str) -> None:
    """A body that a page of another site could send without asking is not read."""
    assert refused(api, b'{"model": "tiny"}', **{"Content-Type": content_type})[:2] == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("path", "most"),
    [(JOBS, limits.JSON_BODY_BYTES), ("/v1/chat/completions", limits.INFERENCE_BODY_BYTES)],
)
def test_a_body_above_the_limit_is_413(api: Api, path: str, most: int) -> None:
    """One byte too many is refused and the client reads why; at the limit the body is read."""

    def padded(size: int) -> bytes:
        return b'{"x": "' + b"a" * (size - 9) + b'"}'

    assert refused(api, padded(most + 1), path)[:2] == (413, "payload_too_large")
    assert refused(api, padded(most), path)[0] == 400


def test_an_endless_chunked_body_is_413(api: Api) -> None:
    """Without a length, reading stops at the limit and the answer comes all the same."""

    def endless() -> Any:
        for _ in range(40):
            yield b"a" * 65536

    answer = api.http.post(JOBS, content=endless(), headers=JSON)

    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("path", "param"),
    [
        (f"{JOBS}?limit=1000000", "limit"),
        (f"{JOBS}?limit=0", "limit"),
        (f"{JOBS}?limit=-1", "limit"),
        (f"{JOBS}?limit=1_0", "limit"),
        (f"{JOBS}?limit=1.0", "limit"),
        (f"{JOBS}?limit=1&limit=2", "limit"),
        (f"{JOBS}?after=ftjob-1", "after"),
        (f"{JOBS}?after=%00", "after"),
        (f"{JOBS}?page=2", "page"),
        (f"{JOBS}?metadata=red", "metadata"),
        (f"{JOBS}?metadata=null&metadata[a]=b", "metadata"),
        (f"{JOBS}/ftjob-{'0' * 32}?wait=31", "wait"),
        (f"{JOBS}/ftjob-{'0' * 32}/events?stream=yes", "stream"),
        ("/v1/files?order=up", "order"),
        ("/v1/models?limit=1", "limit"),
        ("/healthz?x=1", "x"),
    ],
)
def test_a_bad_query_parameter_is_400_and_named(api: Api, path: str, param: str) -> None:
    """Unknown, repeated and malformed query parameters are errors, not ignored."""
    answer = api.http.get(path)

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    "path",
    [
        f"{JOBS}/1",
        f"{JOBS}/1%20OR%201=1",
        f"{JOBS}/FTJOB-{'0' * 32}",
        f"{JOBS}/{{{'0' * 32}}}",
        f"{JOBS}/ftjob-{'0' * 32}",
        f"/v1/files/file-{'0' * 32}",
        "/v1/files/..%2f..%2fetc%2fpasswd",
        "/v1/files/file-1/content",
        "/v1/models/..%2f..%2fetc",
        "/v1/models/%252e%252e",
        "/v1/models/a%00b",
        "/v1/models/math@",
        "/v1/models/math@1@2",
        "/v1/adapters/..%5C..%5Cx",
        "/v1/adapters/a;%2F..%2Fb",
        "/v1/adapters/math/versions/01",
        "/v1/adapters/math/versions/%D9%A1",
        "/v1/adapters/math@1/versions/1",
        "/v1/adapters/math/versions/1/files/manifest.json",
        "/v1/adapters/math/versions/1/files/..%2F..%2Florad.db",
        "/v1/adapters/math/versions/1/files/%00",
        "/nowhere",
        "/v1/files/",
        "/static/x",
    ],
)
def test_what_is_not_there_is_404(api: Api, path: str) -> None:
    """A name that names nothing, however it is spelt, is 404 in JSON, and opens nothing."""
    api.publish("math")
    answer = api.http.get(path)

    assert answer.status_code == 404
    assert answer.json()["error"]["code"] in ("not_found", "model_not_found")


@both_databases
def test_a_nul_goes_nowhere_near_the_database(api: Api) -> None:
    """PostgreSQL refuses the character with an error of its own; nobody gets that far, by path, query or body."""
    named = api.http.get(f"{JOBS}?after=%00"), api.http.get(f"{JOBS}?metadata[k]=%00"), api.submit(model="a\0b")
    chat = api.http.post("/v1/chat/completions", json={"model": "\0", "messages": [{"role": "user", "content": "x"}]})

    assert [(a.status_code, a.json()["error"]["param"]) for a in (*named, chat)] == [
        (400, "after"),
        (400, "metadata[k]"),
        (400, "model"),
        (400, "model"),
    ]
    for path in ("/v1/models/a%00b", "/v1/adapters/a%00b", "/v1/files/%00", f"{JOBS}/%00", f"{JOBS}/%00/events"):
        assert api.http.get(path).status_code == 404


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "TRACE", "OPTIONS"])
def test_a_method_that_is_not_allowed_is_405_in_json(api: Api, method: str) -> None:
    """What is allowed is in the Allow header."""
    answer = api.http.request(method, JOBS)

    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert "GET" in answer.headers["allow"]


@pytest.mark.parametrize("raw", [b"", b"{}"])
def test_actions_need_no_body(api: Api, raw: bytes) -> None:
    """cancel takes no body, whatever content type the client announces, or an empty object."""
    answer = api.http.post(f"{JOBS}/{api.job()['id']}/cancel", content=raw, headers=JSON)

    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")


def test_actions_refuse_unknown_keys(api: Api) -> None:
    """A body that an action would ignore is an error, and the action is not done."""
    job_id = api.job()["id"]

    assert refused(api, b'{"force": true}', f"{JOBS}/{job_id}/cancel") == (400, "unknown_parameter", "force")
    assert api.row(job_id).state == "queued"


@pytest.mark.parametrize(
    ("form", "filename", "param"),
    [
        ({"purpose": "assistants"}, "data.jsonl", "purpose"),
        ({}, "data.jsonl", "purpose"),
        ({"purpose": "fine-tune", "expires_after[seconds]": "3600"}, "data.jsonl", "expires_after[seconds]"),
        ({"purpose": "fine-tune"}, "a\0b", "file"),
    ],
)
def test_a_bad_upload_leaves_nothing(api: Api, form: dict[str, str], filename: str, param: str) -> None:
    """Neither a row nor bytes remain of an upload that was refused."""
    boundary = "b"
    parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in form.items()]
    parts += [f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n\r\n']
    body = "".join(parts).encode() + SAMPLES + f"\r\n--{boundary}--\r\n".encode()
    answer = api.http.post(
        "/v1/files", content=body, headers={"Content-Type": f"multipart/form-data; boundary={boundary}"}
    )

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert list(api.layout.tmp.iterdir()) == []
    with read(api.engine) as tx:
        assert tx.scalar(select(func.count()).select_from(File)) == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b",
        b"--b\r\n",
        b"--b--\r\n",
        b"no parts",
        b"--b\r\nX: y\r\n\r\n",
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nhalf',
    ],
)
def test_a_broken_form_is_400(api: Api, body: bytes) -> None:
    """A form that ends too early or holds no file is refused, and nothing stays in tmp."""
    answer = api.http.post("/v1/files", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"})

    assert answer.status_code == 400
    assert list(api.layout.tmp.iterdir()) == []


def test_a_client_that_sends_all_before_it_listens_hears_the_refusal(api: Api) -> None:
    """Sixteen megabytes are refused by their length, and yet read off: else the connection is reset over the answer."""
    host, port = api.url.removeprefix("http://").split(":")
    size = 16 << 20
    head = f"POST {JOBS} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=15) as connection:
        connection.sendall(head.encode() + b"a" * size)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))

    assert answer.startswith(b"HTTP/1.1 413")


def test_an_upload_that_announces_too_much_is_413_unread(api: Api) -> None:
    """The length alone is enough to refuse; the client need not send 600 MiB to hear it."""
    host, port = api.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: {host}\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        f"Content-Length: {600 << 20}\r\nConnection: close\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=15) as connection:
        connection.sendall(head.encode())
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))

    assert answer.startswith(b"HTTP/1.1 413")
    assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]["code"] == "payload_too_large"
