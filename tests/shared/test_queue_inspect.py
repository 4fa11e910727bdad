"""Inspections over a real broker: a trainer's answer, trainers that are away or busy, deadlines, forged messages."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker

from shared import ids, queue
from shared.answers import PREFIX
from shared.errors import DeadlineExceeded, InvalidRequest, QueueFull, Unavailable
from shared.queue import INSPECT_QUEUE, INSPECT_TASK, MAX_INSPECTIONS, Queue, celery_app, received_inspection
from shared.specs import ChunkError, Foreseen, Inspection, InspectionRequest, TrainSpec
from tests.servers import Broker, run_broker

INSPECT_KEY = PREFIX + INSPECT_QUEUE
FOUND = Inspection(
    found=Foreseen(
        training={"num_samples": 3, "histogram": [[8, 3]]}, validation=None, steps_per_epoch=1, total_steps=3,
        num_tokens_per_epoch=10, num_label_tokens_per_epoch=4, num_tokens=30, num_label_tokens=12,
        trainable_parameters=64, memory_bytes=1000,
    )
)  # fmt: skip


@pytest.fixture
def broker_queue(broker: Broker) -> Iterator[Queue]:
    """A queue on an emptied broker."""
    broker.client.flushall()
    made = Queue(broker.url)
    yield made
    made.close()


def request_for(*, seconds: float = 20.0) -> InspectionRequest:
    return InspectionRequest(
        request_id=ids.new_id(ids.REQUEST),
        tenant="acme",
        base_model_id=ids.new_id(ids.BASE_MODEL),
        training_file_id=ids.new_id(ids.FILE),
        spec=TrainSpec(max_seq_len=64),
        deadline_unix_s=time.time() + seconds,
    )


@contextmanager
def trainer(broker_queue: Queue, *pieces: Inspection) -> Iterator[Callable[[InspectionRequest], None]]:
    """Inside, call it with a request: a thread writes these pieces as its answer."""
    threads: list[threading.Thread] = []

    def answer(request: InspectionRequest) -> None:
        writer = broker_queue.inspection_writer(request.request_id)
        threads.append(threading.Thread(target=lambda: [writer.write(piece) for piece in pieces]))
        threads[-1].start()

    yield answer
    for thread in threads:
        thread.join()


def test_the_last_piece_is_the_answer(broker_queue: Queue, broker: Broker) -> None:
    """Whatever a trainer found comes back whole, and nothing of it stays on the broker."""
    request = request_for()
    with trainer(broker_queue, Inspection(), FOUND) as answer:
        answer(request)
        assert broker_queue.inspect(request) == FOUND

    assert broker.client.keys(f"*{request.request_id}*") == []


def test_an_error_is_an_answer(broker_queue: Queue) -> None:
    """What a trainer says against the files arrives with its code and field."""
    request = request_for()
    failure = Inspection(error=ChunkError(code="invalid_training_file", message="no", param="training_file"))
    with trainer(broker_queue, Inspection(), failure) as answer:
        answer(request)
        assert broker_queue.inspect(request) == failure


def test_no_trainer_is_noticed_long_before_the_deadline(broker_queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody begins, the caller is told that no trainer is there, and the request is cancelled."""
    monkeypatch.setattr(queue, "TAKEN_S", 1)
    request = request_for(seconds=60)
    started = time.monotonic()

    with pytest.raises(Unavailable, match="no trainer"):
        broker_queue.inspect(request)
    assert 0.9 < time.monotonic() - started < 5
    assert broker_queue.inspection_writer(request.request_id).is_cancelled()


def test_a_begun_inspection_may_take_longer(broker_queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that said it began is waited for beyond the time for beginning, up to the deadline and no further."""
    monkeypatch.setattr(queue, "TAKEN_S", 1)
    request = request_for(seconds=2)
    started = time.monotonic()

    with trainer(broker_queue, Inspection()) as answer:
        answer(request)
        with pytest.raises(DeadlineExceeded, match="in time"):
            broker_queue.inspect(request)
    assert 1.9 < time.monotonic() - started < 5
    assert broker_queue.inspection_writer(request.request_id).is_cancelled()


def test_requests_without_a_trainer_do_not_stay(
    broker_queue: Queue, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that nobody took go by themselves, so that they never fill the queue for good."""
    monkeypatch.setattr(queue, "TAKEN_S", 1)
    with pytest.raises(Unavailable):
        broker_queue.inspect(request_for())

    until = time.monotonic() + 5
    while broker.client.exists(INSPECT_KEY):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_inspections_are_bounded(broker_queue: Queue, broker: Broker) -> None:
    """More than trainers keep up with are refused at once."""
    broker.client.rpush(INSPECT_KEY, *["x"] * MAX_INSPECTIONS)

    with pytest.raises(QueueFull):
        broker_queue.inspect(request_for())


def test_the_request_survives_the_wire(broker_queue: Queue, broker: Broker) -> None:
    """The payload on the broker validates again to the very request."""
    request = request_for(seconds=0.5)
    with pytest.raises(Unavailable):
        broker_queue.inspect(request)

    raw = broker.client.lindex(INSPECT_KEY, 0)
    assert isinstance(raw, bytes)
    message = json.loads(raw)
    (payload,), _, _ = json.loads(base64.b64decode(message["body"]))
    assert message["headers"]["task"] == INSPECT_TASK
    assert message["headers"]["expires"] is not None
    assert received_inspection(payload) == request


@pytest.mark.parametrize(
    "change", [{"extra": 1}, {"request_id": "../../etc"}, {"spec": {"max_seq_len": 1}}, {"training_file_id": None}]
)
def test_forged_requests_are_refused(change: dict[str, Any]) -> None:
    """Whatever somebody writes on the broker is validated like a user's input."""
    payload = request_for().model_dump(mode="json")
    assert received_inspection(payload)

    with pytest.raises(InvalidRequest):
        received_inspection(payload | change)


def test_a_broker_that_is_away_is_noticed_in_time() -> None:
    """With the broker down an inspection says so within seconds."""
    with run_broker() as own:
        away = Queue(own.url)
    started = time.monotonic()

    with pytest.raises(Unavailable, match="broker"):
        away.inspect(request_for())
    assert time.monotonic() - started < 5
    away.close()


@pytest.fixture
def worker_app(broker: Broker) -> Iterator[Celery]:
    """A Celery application as a worker program makes it."""
    app = celery_app(broker.url)
    yield app
    app.close()


@pytest.mark.filterwarnings("ignore::celery.exceptions.SecurityWarning")  # the tests may run as root
def test_a_worker_answers_an_inspection(broker_queue: Queue, worker_app: Celery) -> None:
    """A real Celery worker with the threads pool takes the message and its answer comes back."""

    @worker_app.task(name=INSPECT_TASK)  # type: ignore[untyped-decorator]  # Celery has no types
    def inspect(payload: dict[str, Any]) -> None:
        writer = broker_queue.inspection_writer(received_inspection(payload).request_id)
        writer.write(Inspection())
        writer.write(FOUND)

    with start_worker(worker_app, pool="threads", perform_ping_check=False, queues=[INSPECT_QUEUE]):
        assert broker_queue.inspect(request_for()) == FOUND
