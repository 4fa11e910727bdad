"""What training would see, asked for before it: token reports and dry runs, with a trainer of twenty lines."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest

from api import inspection
from shared import queue
from shared.answers import PREFIX
from shared.queue import INSPECT_QUEUE, Queue, received_inspection
from shared.specs import ChunkError, Foreseen, Inspection, InspectionRequest
from tests.api.conftest import CONTEXT, Api
from tests.servers import Broker

JOBS = "/v1/fine_tuning/jobs"
TRAINING = {"num_samples": 20, "num_used": 20, "num_tokens": 100, "num_label_tokens": 60, "histogram": [[8, 20]]}
FORESEEN = Foreseen(
    training=TRAINING, validation=None, steps_per_epoch=20, total_steps=100, num_tokens_per_epoch=100,
    num_label_tokens_per_epoch=60, num_tokens=500, num_label_tokens=300, trainable_parameters=64, memory_bytes=12345,
)  # fmt: skip


@dataclass
class FakeTrainer:
    """Takes inspections off the broker and gives each the pieces of `reply`."""

    broker: Broker
    queue: Queue
    reply: Callable[[InspectionRequest], list[Inspection]] = lambda _: [Inspection(), Inspection(found=FORESEEN)]
    requests: list[InspectionRequest] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self._stop.is_set():
            taken: Any = self.broker.client.brpop([PREFIX + INSPECT_QUEUE], timeout=0.05)
            if taken:
                (payload,), _, _ = json.loads(base64.b64decode(json.loads(taken[1])["body"]))
                request = received_inspection(payload)
                self.requests.append(request)
                for piece in self.reply(request):
                    self.queue.inspection_writer(request.request_id).write(piece)

    def stop(self) -> None:
        self._stop.set()


@pytest.fixture
def trainer(api: Api, broker: Broker) -> Iterator[FakeTrainer]:
    broker.client.delete(PREFIX + INSPECT_QUEUE)
    fake = FakeTrainer(broker, api.services.queue)
    thread = threading.Thread(target=fake.run, daemon=True)
    thread.start()
    yield fake
    fake.stop()
    thread.join(5)


@pytest.fixture
def no_trainer(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """None runs, and the API is impatient."""
    broker.client.delete(PREFIX + INSPECT_QUEUE)
    monkeypatch.setattr(queue, "TAKEN_S", 1)


def failing(code: str, message: str, param: str | None) -> Callable[[InspectionRequest], list[Inspection]]:
    return lambda _: [Inspection(), Inspection(error=ChunkError(code=code, message=message, param=param))]


def error_of(answer: httpx2.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


def report_of(api: Api, file_id: str, **query: str) -> httpx2.Response:
    return api.http.get(f"/v1/files/{file_id}/report", params=query)


def test_a_report_without_a_model_asks_nobody(api: Api, no_trainer: None) -> None:
    """The check of the lines needs no trainer and is what it was; there are no tokens in it."""
    report = report_of(api, api.upload()["id"]).raise_for_status().json()

    assert (report["object"], report["report"]["num_samples"], report["tokens"]) == ("file.report", 20, None)


def test_a_report_with_a_model_has_its_tokens(api: Api, trainer: FakeTrainer) -> None:
    """With a base model named, the report holds what training on it would see, beside the check of the lines."""
    file = api.upload()
    report = report_of(api, file["id"], model="tiny").raise_for_status().json()

    assert report["report"]["num_samples"] == 20
    assert report["tokens"] == {"model": "tiny", "max_seq_len": CONTEXT, "train_on": "completion", "data": TRAINING}
    (request,) = trainer.requests
    assert (request.tenant, request.base_model_id, request.training_file_id) == ("default", api.base.id, file["id"])


def test_the_query_decides_what_is_read(api: Api, trainer: FakeTrainer) -> None:
    """max_seq_len and train_on reach the trainer, which tokenises by them."""
    report_of(api, api.upload()["id"], model="tiny", max_seq_len="16", train_on="all").raise_for_status()

    (request,) = trainer.requests
    assert (request.spec.max_seq_len, request.spec.train_on) == (16, "all")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"model": "none"}, "model"),
        ({"model": "tiny", "max_seq_len": str(CONTEXT + 1)}, "max_seq_len"),
        ({"model": "tiny", "max_seq_len": "1"}, "max_seq_len"),
        ({"model": "tiny", "train_on": "nothing"}, "train_on"),
    ],
)
def test_a_wrong_query_is_named(api: Api, no_trainer: None, query: dict[str, str], param: str) -> None:
    """A query that cannot be meant is a 400 that names its parameter, without asking a trainer."""
    answer = report_of(api, api.upload()["id"], **query)

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_bad_file_is_reported_by_its_lines_alone(api: Api, no_trainer: None) -> None:
    """A file with bad lines keeps its report when a model is named; there is nothing that could be tokenised."""
    report = report_of(api, api.upload(b"nonsense\n")["id"], model="tiny").raise_for_status().json()

    assert (report["status"], report["report"]["num_problems"], report["tokens"]) == ("error", 1, None)


def test_a_foreign_file_is_not_reported(api: Api, trainer: FakeTrainer) -> None:
    """Another tenant's file is a 404, and its name never reaches a trainer."""
    mine, other = ({"Authorization": f"Bearer {api.key(tenant)}"} for tenant in ("acme", "other"))
    path = f"/v1/files/{api.upload(**mine)['id']}/report?model=tiny"

    assert api.http.get(path, headers=other).status_code == 404
    assert trainer.requests == []
    assert api.http.get(path, headers=mine).status_code == 200


def test_a_dry_run_estimates_and_creates_nothing(api: Api, trainer: FakeTrainer) -> None:
    """The answer has what a job would have, resolved; no job is there after it and the doorbell did not ring."""
    file = api.upload()
    body = {"model": "tiny", "training_file": file["id"], "seed": 3, "training": {"max_seq_len": 32}, "dry_run": True}
    estimate = api.http.post(JOBS, json=body).raise_for_status().json()

    assert (estimate["object"], estimate["model"], estimate["seed"]) == ("fine_tuning.job.estimate", "tiny", 3)
    assert (estimate["training"]["max_seq_len"], estimate["hyperparameters"]["batch_size"]) == (32, 1)
    assert (estimate["total_steps"], estimate["num_tokens"], estimate["num_label_tokens"]) == (100, 500, 300)
    assert (estimate["memory_bytes"], estimate["trainable_parameters"]) == (12345, 64)
    assert estimate["data"] == {"training": TRAINING, "validation": None}
    assert (estimate["tokens_per_second"], estimate["seconds"]) == (None, None)
    assert api.http.get(JOBS).json()["data"] == []
    assert trainer.requests[0].spec.seed == 3


def test_without_dry_run_a_job_needs_no_trainer(api: Api, no_trainer: None) -> None:
    """A real job is accepted while all trainers are away: nothing is tokenised before it is kept."""
    assert api.job(dry_run=False)["status"] == "queued"


def test_a_dry_run_equals_the_job(api: Api, trainer: FakeTrainer) -> None:
    """What is estimated is what would be submitted: same body, same resolved values."""
    file = api.upload()
    body = {"model": "tiny", "training_file": file["id"], "seed": 3, "lora": {"r": 4}}
    estimate = api.http.post(JOBS, json=body | {"dry_run": True}).raise_for_status().json()
    job = api.http.post(JOBS, json=body).raise_for_status().json()

    shared_keys = ("hyperparameters", "lora", "training", "seed", "model", "training_file", "validation_file")
    assert {key: estimate[key] for key in shared_keys} == {key: job[key] for key in shared_keys}


def test_seconds_come_from_jobs_that_ran_here(api: Api, trainer: FakeTrainer) -> None:
    """Once a job on this base has succeeded, its speed turns tokens into seconds."""
    api.job()
    claim = api.claim()
    api.report(claim, 1)  # 10 tokens per second
    api.succeed(claim)

    estimate = api.submit(dry_run=True).raise_for_status().json()

    assert (estimate["tokens_per_second"], estimate["seconds"]) == (10.0, 50.0)


def test_a_dry_run_checks_the_body_like_a_job(api: Api, trainer: FakeTrainer) -> None:
    """What a job would be refused for, a dry run is refused for, before any trainer is asked."""
    answer = api.submit(dry_run=True, lora={"target_modules": ["none"]})

    assert error_of(answer) == (400, "unknown_target", "lora.target_modules")
    assert trainer.requests == []


def test_nothing_to_learn_is_a_bad_file(api: Api, trainer: FakeTrainer) -> None:
    """Where no sample has a label, a dry run says so as a 400 over the training file."""
    trainer.reply = failing("invalid_training_file", "there is nothing to learn", "training_file")
    answer = api.submit(dry_run=True)

    assert error_of(answer) == (400, "invalid_training_file", "training_file")
    assert "nothing to learn" in answer.json()["error"]["message"]


def test_a_validation_file_is_inspected_too(api: Api, trainer: FakeTrainer) -> None:
    """Its id reaches the trainer and its report the answer."""
    trainer.reply = lambda _: [Inspection(found=FORESEEN.model_copy(update={"validation": {"num_samples": 1}}))]
    valid = api.upload()
    estimate = api.submit(dry_run=True, validation_file=valid["id"]).raise_for_status().json()

    assert estimate["data"]["validation"] == {"num_samples": 1}
    assert trainer.requests[0].validation_file_id == valid["id"]


@pytest.mark.parametrize("what", ["report", "dry run"])
def test_no_trainer_is_a_503_that_says_so(api: Api, no_trainer: None, what: str) -> None:
    """Whoever asks while no trainer runs learns just that, soon."""
    file = api.upload()
    answer = (
        report_of(api, file["id"], model="tiny")
        if what == "report"
        else api.submit(training_file=file["id"], dry_run=True)
    )

    assert error_of(answer) == (503, "unavailable", None)
    assert "no trainer" in answer.json()["error"]["message"]


def test_a_slow_trainer_is_a_504(api: Api, trainer: FakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set that takes longer than anyone waits ends in a timeout, not in a hanging request."""
    monkeypatch.setattr(inspection, "INSPECT_S", 1.0)
    trainer.reply = lambda _: [Inspection()]
    answer = api.submit(dry_run=True)

    assert error_of(answer) == (504, "deadline_exceeded", None)


def test_waiting_takes_no_more_threads_than_there_are_seats(api: Api, trainer: FakeTrainer) -> None:
    """With every seat taken a dry run is refused at once instead of taking a thread that answers others."""
    while api.services.waiters.take():
        pass
    answer = api.submit(dry_run=True)

    assert error_of(answer) == (429, "queue_full", None)
    assert trainer.requests == []
