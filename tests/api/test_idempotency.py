"""POSTs that come twice create once; what is not a repetition is not taken for one."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2
import openai
import pytest
from flask import Flask
from sqlalchemy import func, select, update
from werkzeug.serving import make_server

from api.app import create_app
from api.auth import KEYLESS
from api.call import Call, Intent
from api.idempotency import Attempt
from api.schemas.wire import Deleted
from shared import idempotency
from shared.config import Settings
from shared.db import read, write
from shared.errors import IdempotencyMismatch
from shared.tables import File, IdempotencyKey, Job
from tests.api.conftest import SAMPLES, Api, both_databases
from tests.api.test_inspection import FakeTrainer, trainer
from tests.shared.test_jobs_claim import at_once

JOBS = "/v1/fine_tuning/jobs"
KEY = {"Idempotency-Key": "k-1"}
__all__ = ["trainer"]  # a fixture


def ask(api: Api, file_id: str, headers: dict[str, str] = KEY, **fields: Any) -> httpx2.Response:
    """Ask for a job over this file."""
    return api.http.post(JOBS, json={"model": "tiny", "training_file": file_id} | fields, headers=headers)


def send(
    api: Api, headers: dict[str, str] = KEY, *, content: bytes = SAMPLES, name: str = "data.jsonl"
) -> httpx2.Response:
    """Upload a data set."""
    return api.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": (name, content)}, headers=headers)


def retry(count: int | str) -> dict[str, str]:
    return {"X-Stainless-Retry-Count": str(count)}


def count(api: Api, table: type[Job | File | IdempotencyKey]) -> int:
    with read(api.engine) as tx:
        return tx.scalar(select(func.count()).select_from(table)) or 0


def stored(api: Api) -> tuple[int, int]:
    """How many uploads are kept on disk, and how many lie in staging."""
    return len(list((api.layout.root / "files").iterdir())), len(list(api.layout.tmp.iterdir()))


def is_replay(first: httpx2.Response, second: httpx2.Response) -> bool:
    """True if the second answer is the first again, and says so, which the first did not."""
    assert first.status_code == second.status_code == 200
    assert "idempotent-replayed" not in first.headers
    same = (first.content, first.headers["content-type"]) == (second.content, second.headers["content-type"])
    return same and second.headers.get("idempotent-replayed") == "true"


def refusal(answer: httpx2.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


@dataclass
class Lossy:
    """The same service, where the first answers to POSTs get lost on the way, after all was committed."""

    app: Flask
    losses: int
    posts: list[str] = field(default_factory=list)
    url: str = ""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        answer = list(self.app(environ, start_response))
        if environ["REQUEST_METHOD"] == "POST":
            self.posts.append(environ["HTTP_X_STAINLESS_RETRY_COUNT"])
            if len(self.posts) <= self.losses:
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return answer


@contextmanager
def lossy(settings: Settings, losses: int) -> Iterator[Lossy]:
    app = create_app(settings)
    service = Lossy(app, losses)
    server = make_server("127.0.0.1", 0, service, threaded=True)
    service.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield service
    server.shutdown()
    server.server_close()
    thread.join(5)
    app.extensions["lorad"][1].queue.close()
    app.extensions["lorad"][1].engine.dispose()


@both_databases
def test_a_job_asked_for_twice_is_one(api: Api) -> None:
    """The same body with the same key is the first answer again; with another key it is another job."""
    file_id = api.upload()["id"]
    first = ask(api, file_id, suffix="math", metadata={"who": "é"})

    assert is_replay(first, ask(api, file_id, suffix="math", metadata={"who": "é"}))
    assert count(api, Job) == 1
    assert ask(api, file_id, {"Idempotency-Key": "k-2"}, suffix="math").json()["id"] != first.json()["id"]
    assert count(api, Job) == 2


@both_databases
def test_a_file_sent_twice_is_one(api: Api) -> None:
    """The repeated bytes are received and dropped; with another key they are another file."""
    first = send(api)

    assert is_replay(first, send(api))
    assert (count(api, File), stored(api)) == (1, (1, 0))
    assert send(api, {"Idempotency-Key": "k-2"}).json()["id"] != first.json()["id"]
    assert (count(api, File), stored(api)) == (2, (2, 0))


def test_without_a_key_twice_is_two(api: Api) -> None:
    """Nothing is taken for a repetition that does not say so."""
    file_id = api.upload()["id"]

    assert ask(api, file_id, {}).json()["id"] != ask(api, file_id, {}).json()["id"]
    assert (count(api, Job), count(api, IdempotencyKey)) == (2, 0)


def test_the_body_counts_and_not_its_spelling(api: Api) -> None:
    """Blanks and the order of keys make no difference to a JSON body."""
    body = {"model": "tiny", "training_file": api.upload()["id"], "metadata": {"a": "1", "b": "2"}}
    turned = dict(reversed(body.items())) | {"metadata": {"b": "2", "a": "1"}}
    headers = KEY | {"Content-Type": "application/json"}
    first = api.http.post(JOBS, content=json.dumps(body), headers=headers)

    assert is_replay(first, api.http.post(JOBS, content=json.dumps(turned, indent=3), headers=headers))


@pytest.mark.parametrize("change", [{"seed": 2}, {"training": {"max_steps": 6}}, {"suffix": "other"}])
def test_another_job_with_the_key_is_refused(api: Api, change: dict[str, Any]) -> None:
    """Any other value is another request; the first answer stays."""
    file_id = api.upload()["id"]
    asked: dict[str, Any] = {"seed": 1, "training": {"max_steps": 5}, "suffix": "math"}
    first = ask(api, file_id, **asked)

    refused = ask(api, file_id, **(asked | change))
    assert refusal(refused) == (422, "idempotency_mismatch", None)
    assert refused.headers["x-should-retry"] == "false"
    assert is_replay(first, ask(api, file_id, **asked))
    assert count(api, Job) == 1


@pytest.mark.parametrize("change", [{"content": SAMPLES + SAMPLES}, {"name": "other.jsonl"}])
def test_another_file_with_the_key_is_refused(api: Api, change: dict[str, Any]) -> None:
    """Other bytes, or another name, are another request, judged when all has arrived; nothing of it is left."""
    send(api)

    assert refusal(send(api, **change)) == (422, "idempotency_mismatch", None)
    assert (count(api, File), stored(api)) == (1, (1, 0))


def test_a_key_is_for_one_route(api: Api) -> None:
    """The key of an upload is no key for a job, nor for another route that is asked for the very same."""
    file_id = send(api).json()["id"]
    assert refusal(ask(api, file_id)) == (422, "idempotency_mismatch", None)

    call = Call(KEYLESS, api.services, Intent("files_create"))
    made = Attempt("POST /a", "k-2", None).once(call, {"x": 1}, lambda _: Deleted(id="1", object="file"))
    assert made == Deleted(id="1", object="file")
    with pytest.raises(IdempotencyMismatch):
        Attempt("POST /b", "k-2", None).once(call, {"x": 1}, lambda _: Deleted(id="2", object="file"))


@pytest.mark.parametrize("header", ["Idempotency-Key", "X-Idempotency-Key"])
@pytest.mark.parametrize("key", ["", "k" * 256, "a b", "k\u00e9"])
def test_what_cannot_be_a_key_is_refused(api: Api, header: str, key: str) -> None:
    """Empty, too long, or more than visible ASCII: 400, on uploads as on jobs, and nothing is created."""
    bad: Any = [(header.encode(), key.encode("latin-1"))]  # bytes, which need not be ASCII

    answers = [ask(api, "file-x", bad), send(api, bad)]
    assert [refusal(answer) for answer in answers] == [(400, "invalid_value", header)] * 2
    assert (count(api, File), stored(api)) == (0, (0, 0))


@pytest.mark.parametrize("key", ["k", "k" * 255, '"a,b;c=!~"'])
def test_what_can_be_a_key_is_one(api: Api, key: str) -> None:
    """The bounds themselves are allowed, and either header will do for the same key."""
    first = send(api, {"Idempotency-Key": key})

    assert is_replay(first, send(api, {"X-Idempotency-Key": key}))
    assert is_replay(first, send(api, {"Idempotency-Key": key, "X-Idempotency-Key": key}))
    both = send(api, {"Idempotency-Key": key, "X-Idempotency-Key": "other"})
    assert refusal(both) == (400, "invalid_value", "Idempotency-Key")


def test_errors_are_not_kept(api: Api) -> None:
    """A refused request leaves its key free, for itself and for any other."""
    file_id = api.upload()["id"]
    assert refusal(ask(api, "file-none"))[0] == 400
    assert refusal(ask(api, file_id, model="none"))[0] == 400
    assert count(api, IdempotencyKey) == 0

    assert is_replay(ask(api, file_id), ask(api, file_id))


def test_a_full_queue_is_not_kept(settings: Settings, api: Api) -> None:
    """An answer to try again later is not what the later try gets."""
    file_id = api.upload()["id"]
    with lossy(replace(settings, max_queued_jobs=1), 0) as service:
        post = {"json": {"model": "tiny", "training_file": file_id}}
        waiting = ask(api, file_id, {}).json()["id"]
        full = httpx2.post(f"{service.url}/fine_tuning/jobs", headers=KEY | retry(0), trust_env=False, **post)
        assert refusal(full)[:2] == (429, "queue_full")
        api.http.post(f"{JOBS}/{waiting}/cancel").raise_for_status()

        again = httpx2.post(f"{service.url}/fine_tuning/jobs", headers=KEY | retry(1), trust_env=False, **post)
    assert again.status_code == 200
    assert "idempotent-replayed" not in again.headers


def test_the_answer_is_of_then(api: Api) -> None:
    """A replay needs nothing to be as it was: not the job, not its file. A new request does."""
    file_id = api.upload()["id"]
    first = ask(api, file_id)
    api.http.post(f"{JOBS}/{first.json()['id']}/cancel").raise_for_status()
    api.http.delete(f"/v1/files/{file_id}").raise_for_status()

    assert is_replay(first, ask(api, file_id))
    assert refusal(ask(api, file_id, {"Idempotency-Key": "k-2"})) == (400, "not_found", "training_file")


def test_actions_and_dry_runs_take_no_key(api: Api, trainer: FakeTrainer) -> None:
    """What creates nothing keeps nothing, so the key is still free for the job."""
    file_id = api.upload()["id"]
    assert [ask(api, file_id, dry_run=True).json()["object"] for _ in range(2)] == ["fine_tuning.job.estimate"] * 2
    assert len(trainer.requests) == 2

    job = ask(api, file_id)
    assert job.json()["object"] == "fine_tuning.job"
    for action, status in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        answer = api.http.post(f"{JOBS}/{job.json()['id']}/{action}", headers=KEY)
        assert (answer.json()["status"], answer.headers.get("idempotent-replayed")) == (status, None)
    assert count(api, IdempotencyKey) == 1


def test_a_replay_is_for_those_who_may(api: Api) -> None:
    """No key, no scope, or another tenant: the kept answer is not told. Another API key of the tenant gets it."""
    first_key = api.key("acme")
    first = send(api, bearer(first_key))

    assert refusal(send(api, KEY))[0] == 401
    assert refusal(send(api, bearer(api.key("acme", "files:read"))))[:2] == (403, "insufficient_scope")
    assert is_replay(first, send(api, bearer(api.key("acme"))))
    other = send(api, bearer(api.key("umbrella")), content=SAMPLES * 2)
    assert other.status_code == 200
    assert other.json()["id"] != first.json()["id"]


def bearer(key: str, headers: dict[str, str] = KEY) -> dict[str, str]:
    return headers | {"Authorization": f"Bearer {key}"}


@both_databases
def test_many_at_once_are_one_job(api: Api) -> None:
    """Twenty requests with one key, all together: one job, and every answer names it."""
    file_id = api.upload()["id"]
    answers: Any = at_once(*[lambda: ask(api, file_id)] * 20)

    ids = {answer.json()["id"] for answer in answers if answer.status_code == 200}
    assert {answer.status_code for answer in answers} <= {200, 409}
    assert len(ids) == count(api, Job) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers if answer.status_code == 200) == 1


@both_databases
def test_uploads_at_once_are_one_file(api: Api) -> None:
    """Each is received whole, one is kept."""
    answers: Any = at_once(*[lambda: send(api)] * 8)

    assert {answer.status_code for answer in answers} <= {200, 409}
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 200}) == 1
    assert (count(api, File), stored(api)) == (1, (1, 0))


@pytest.mark.parametrize("settings", ["postgres"], indirect=True)
def test_in_flight_is_to_be_tried_again(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another transaction holds the key: 409, and the SDKs are told to retry; then it is answered."""
    monkeypatch.setattr(idempotency, "IN_FLIGHT_WAIT_MS", 100)
    file_id = api.upload()["id"]
    with write(api.engine) as tx:
        idempotency.take(tx, idempotency.Request(tenant="default", key="k-1", request_sha256="x"))
        busy = ask(api, file_id)
        tx.rollback()

    assert refusal(busy) == (409, "idempotency_in_flight", None)
    assert (busy.headers["x-should-retry"], busy.headers["retry-after"]) == ("true", "1")
    assert ask(api, file_id).status_code == 200


def test_a_retry_is_told_by_its_count(api: Api) -> None:
    """Without a key the SDKs' count decides: a later try is a repetition, the same count another request."""
    file_id = api.upload()["id"]
    first = ask(api, file_id, retry(0))
    assert is_replay(first, ask(api, file_id, retry(1)))
    assert is_replay(first, ask(api, file_id, retry(2)))
    second = ask(api, file_id, retry(0))

    assert second.json()["id"] != first.json()["id"]
    assert is_replay(second, ask(api, file_id, retry(1)))
    assert count(api, Job) == 2


def test_a_retry_is_told_for_a_quarter_of_an_hour(api: Api) -> None:
    """After that a count says nothing any more; a key still does."""
    file_id = api.upload()["id"]
    counted, with_key = ask(api, file_id, retry(0)), ask(api, file_id)
    with write(api.engine) as tx:
        tx.execute(update(IdempotencyKey).values(created_at=IdempotencyKey.created_at - 16 * 60 * 1000))

    assert ask(api, file_id, retry(1)).json()["id"] != counted.json()["id"]
    assert is_replay(with_key, ask(api, file_id))


def test_a_retry_of_an_upload_is_told_too(api: Api) -> None:
    """It is the same bytes under the same name; whatever else is sent with a count is a file of its own."""
    first = send(api, retry(0))

    assert is_replay(first, send(api, retry(1)))
    assert send(api, retry(1), name="other.jsonl").json()["id"] != first.json()["id"]
    assert send(api, retry(1), content=SAMPLES * 2).json()["id"] != first.json()["id"]
    assert (count(api, File), stored(api)) == (3, (3, 0))


@pytest.mark.parametrize("nonsense", ["", "-1", "one", "1" * 30, "\u0661"])
def test_a_count_that_is_none_is_passed_over(api: Api, nonsense: str) -> None:
    """The header is the SDKs' own; whatever else stands there makes no repetition."""
    headers: Any = [(b"X-Stainless-Retry-Count", nonsense.encode())]  # bytes, which need not be ASCII
    answers = [send(api, headers) for _ in range(2)]

    assert len({answer.json()["id"] for answer in answers}) == 2


def test_the_key_wins_over_the_count(api: Api) -> None:
    """With a key, the count is of no account: other keys are other jobs, and one key is one job from count 0 on."""
    file_id = api.upload()["id"]
    first = ask(api, file_id, KEY | retry(0))

    assert is_replay(first, ask(api, file_id, KEY | retry(0)))
    assert ask(api, file_id, {"Idempotency-Key": "k-2"} | retry(1)).json()["id"] != first.json()["id"]


def test_a_retry_is_of_one_api_key(api: Api) -> None:
    """What another API key asked for is no earlier try of ours, though it is of our tenant."""
    ours, theirs = api.key("acme"), api.key("acme")
    first = send(api, bearer(ours, retry(0)))

    assert send(api, bearer(theirs, retry(1))).json()["id"] != first.json()["id"]
    assert is_replay(first, send(api, bearer(ours, retry(1))))


@pytest.mark.parametrize(
    ("settings", "key"), [("sqlite", None), ("sqlite", "sdk-1"), ("postgres", None)], indirect=["settings"]
)
def test_the_sdk_creates_once_though_answers_get_lost(api: Api, settings: Settings, key: str | None) -> None:
    """The stock client sends again what it got no answer to: one file and one job come of it, with or without a key."""
    headers = {"Idempotency-Key": key} if key else {}
    with lossy(settings, losses=2) as service:
        client = openai.OpenAI(base_url=service.url, api_key="none", max_retries=2, _strict_response_validation=True)
        job = client.fine_tuning.jobs.create(model="tiny", training_file=api.upload()["id"], extra_headers=headers)
        assert service.posts == ["0", "1", "2"]

        service.posts.clear()
        headers = {"Idempotency-Key": f"{key}-file"} if key else {}
        file = client.files.create(file=("mine.jsonl", SAMPLES), purpose="fine-tune", extra_headers=headers)
        assert service.posts == ["0", "1", "2"]

    assert [row.id for row in api.sdk().fine_tuning.jobs.list()] == [job.id]
    assert [row.id for row in api.sdk().files.list() if row.filename == "mine.jsonl"] == [file.id]


def test_without_the_count_a_lost_answer_is_a_second_job(api: Api, settings: Settings) -> None:
    """What saves the stock client is the header: without it the same losses make three jobs."""
    nothing_told = {"X-Stainless-Retry-Count": ""}
    with lossy(settings, losses=2) as service:
        client = openai.OpenAI(base_url=service.url, api_key="none", max_retries=2)
        client.fine_tuning.jobs.create(model="tiny", training_file=api.upload()["id"], extra_headers=nothing_told)

    assert count(api, Job) == 3
