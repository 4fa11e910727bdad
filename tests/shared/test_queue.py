"""The queue over a real broker: doorbells, requests, chunk streams, and a broker that is away."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker

from shared import ids
from shared.answers import ANSWERS_EXPIRE_S, PREFIX
from shared.errors import GenerationTimeout, InvalidRequest, QueueFull, Unavailable
from shared.queue import (
    GENERATE_TASK,
    MAX_DOORBELLS,
    MAX_WAITING,
    TRAIN_TASK,
    Queue,
    celery_app,
    generate_queue,
    received_request,
)
from shared.specs import Chunk, ChunkError, GenerationRequest, Message, Usage
from tests.servers import Broker, free_port, run_broker

LAST = Chunk(finish_reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=1), fingerprint="abc")
TRAIN_KEY = f"{PREFIX}train"


@pytest.fixture
def queue(broker: Broker) -> Iterator[Queue]:
    """A queue on an emptied broker."""
    broker.client.flushall()
    queue = Queue(broker.url)
    yield queue
    queue.close()


def request_for(base: str = "base-1", *, seconds: float = 20.0, **fields: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id=ids.new_id(ids.REQUEST),
        base_model_id=base,
        messages=[Message(role="user", content="hi")],
        deadline_unix_s=time.time() + seconds,
        **fields,
    )


def messages_in(broker: Broker, queue_name: str) -> list[dict[str, Any]]:
    """The messages that wait in a queue, newest first."""
    return [json.loads(raw) for raw in broker.client.lrange(PREFIX + queue_name, 0, -1)]


def test_ring_is_one_json_message(queue: Queue, broker: Broker) -> None:
    """A doorbell is a JSON message without a job id, in the queue that trainers read."""
    assert queue.ring_trainers()

    (message,) = messages_in(broker, "train")
    assert message["content-type"] == "application/json"
    assert message["headers"]["task"] == TRAIN_TASK


def test_doorbells_do_not_pile_up(queue: Queue, broker: Broker) -> None:
    """With no trainer about, rings stop adding messages."""
    broker.client.rpush(TRAIN_KEY, *["x"] * MAX_DOORBELLS)

    assert queue.ring_trainers()
    assert broker.client.llen(TRAIN_KEY) == MAX_DOORBELLS


def test_every_key_has_our_prefix(queue: Queue, broker: Broker) -> None:
    """Nothing is written outside lorad:*, so that a broker user can be limited to it."""
    queue.ring_trainers()
    request = request_for()
    answer = queue.generate(request)
    queue.writer(request.request_id).write(Chunk(text="a"))
    next(answer)
    answer.close()  # type: ignore[attr-defined]  # a generator

    keys = broker.client.keys("*")
    assert keys
    assert [key for key in keys if not key.startswith(PREFIX.encode())] == []  # type: ignore[union-attr]  # not async


def test_chunks_arrive_in_order(queue: Queue) -> None:
    """What a generator writes is what the API reads, up to the last chunk, whenever it is written."""
    request = request_for()
    answer, writer = queue.generate(request), queue.writer(request.request_id)
    writer.write(Chunk())
    assert next(answer) == Chunk()

    sent = [Chunk(text="a"), Chunk(text="ü\n\x00"), LAST]
    thread = threading.Thread(target=lambda: [writer.write(chunk) for chunk in sent])
    thread.start()

    assert list(answer) == sent
    thread.join()


def test_requests_do_not_mix(queue: Queue) -> None:
    """Two requests at once each get their own chunks."""
    requests = [request_for(), request_for()]
    answers = [queue.generate(request) for request in requests]
    for number, request in enumerate(requests):
        writer = queue.writer(request.request_id)
        writer.write(Chunk(text=str(number)))
        writer.write(LAST)

    assert [next(answer).text for answer in answers] == ["0", "1"]


def test_an_error_is_the_last_chunk(queue: Queue) -> None:
    """A failed generation ends the answer with its error."""
    request = request_for()
    answer = queue.generate(request)
    failure = Chunk(error=ChunkError(code="adapter_corrupt", message="no", param="model"))
    queue.writer(request.request_id).write(failure)

    assert list(answer) == [failure]


def test_a_read_answer_leaves_nothing(queue: Queue, broker: Broker) -> None:
    """After the last chunk the stream is gone, and nobody was told to cancel."""
    request = request_for()
    answer, writer = queue.generate(request), queue.writer(request.request_id)
    writer.write(LAST)
    list(answer)

    assert not writer.is_cancelled()
    assert broker.client.keys(f"*{request.request_id}*") == []


def test_an_unread_answer_expires(queue: Queue, broker: Broker) -> None:
    """Chunks that nobody reads do not stay for ever."""
    request = request_for()
    queue.writer(request.request_id).write(Chunk(text="a"))

    assert 0 < broker.client.ttl(f"{PREFIX}chunks:{request.request_id}") <= ANSWERS_EXPIRE_S


def test_closing_early_cancels(queue: Queue) -> None:
    """A client that goes away in the middle stops the generator; before that nothing does."""
    request = request_for()
    answer, writer = queue.generate(request), queue.writer(request.request_id)
    writer.write(Chunk(text="a"))
    next(answer)
    before = writer.is_cancelled()
    answer.close()  # type: ignore[attr-defined]  # a generator

    assert (before, writer.is_cancelled()) == (False, True)


def test_deadline_ends_the_wait(queue: Queue) -> None:
    """An answer that does not come in time is a timeout, and the generator is told to stop."""
    request = request_for(seconds=0.3)
    answer = queue.generate(request)
    started = time.monotonic()

    with pytest.raises(GenerationTimeout):
        next(answer)
    assert time.monotonic() - started < 3
    assert queue.writer(request.request_id).is_cancelled()


def test_requests_are_bounded(queue: Queue, broker: Broker) -> None:
    """A base model whose generators do not keep up refuses more, others go on."""
    broker.client.rpush(PREFIX + generate_queue("base-full"), *["x"] * MAX_WAITING)

    with pytest.raises(QueueFull):
        queue.generate(request_for("base-full"))
    queue.generate(request_for("base-free"))


def test_request_survives_the_wire(queue: Queue, broker: Broker) -> None:
    """The payload on the broker validates again to the very request."""
    request = request_for(temperature=0.5, stop=["x"], max_tokens=7, seed=3)
    queue.generate(request)

    (message,) = messages_in(broker, generate_queue("base-1"))
    (payload,), _, _ = json.loads(base64.b64decode(message["body"]))
    assert message["headers"]["task"] == GENERATE_TASK
    assert received_request(payload) == request


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 99},
        {"extra": 1},
        {"request_id": "../../etc"},
        {"max_tokens": "8"},
        {"prompt": "both"},
        {"messages": None},
        {"stop": ["x"] * 5},
    ],
)
def test_forged_requests_are_refused(change: dict[str, Any]) -> None:
    """Whatever somebody writes on the broker is validated like a user's input."""
    payload = request_for().model_dump(mode="json")
    assert received_request(payload)

    with pytest.raises(InvalidRequest):
        received_request(payload | change)


@pytest.mark.parametrize("payload", [None, 7, "x", [], {}])
def test_payloads_of_another_shape_are_refused(payload: object) -> None:
    """Not even the type of a message is trusted."""
    with pytest.raises(InvalidRequest):
        received_request(payload)


def test_garbage_on_the_stream_ends_the_answer(queue: Queue, broker: Broker) -> None:
    """Chunks that are not ours are an error, not a crash in the API's encoder."""
    request = request_for()
    answer = queue.generate(request)
    broker.client.xadd(f"{PREFIX}chunks:{request.request_id}", {"chunk": '{"text": 5}'})

    with pytest.raises(Unavailable):
        next(answer)


def within(seconds: float, action: Callable[[], object]) -> object:
    """What the action returned, which must not take longer."""
    started = time.monotonic()
    result = action()
    assert time.monotonic() - started < seconds
    return result


@pytest.mark.parametrize("how", ["refuses", "hangs"])
def test_broker_away_is_noticed_in_time(how: str) -> None:
    """With the broker down or hung every call answers within a few seconds, and says so."""
    with run_broker() as own:
        queue = Queue(own.url)
        assert queue.ring_trainers()
        writer = queue.writer(ids.new_id(ids.REQUEST))
        if how == "hangs":
            own.hang()
        else:
            own.client.shutdown(nosave=True)

        assert within(5, queue.ring_trainers) is False
        assert within(5, queue.ping) is False
        with pytest.raises(Unavailable):
            within(5, lambda: queue.generate(request_for()))
        with pytest.raises(Unavailable):
            within(5, lambda: writer.write(LAST))
        with pytest.raises(Unavailable):
            within(5, writer.is_cancelled)
        if how == "hangs":
            own.wake()
        queue.close()


def test_broker_never_there_is_noticed_in_time() -> None:
    """A first ring into the void is refused at once, not retried for ever."""
    queue = Queue(f"redis://127.0.0.1:{free_port()}/0")

    assert within(5, queue.ring_trainers) is False
    queue.close()


def test_a_restarted_broker_is_found_again() -> None:
    """The same queue object works on when the broker is back."""
    port = free_port()
    with run_broker(port=port) as first:
        queue = Queue(first.url)
        assert queue.ring_trainers()
    assert not queue.ring_trainers()
    with run_broker(port=port):
        assert queue.ring_trainers()
        assert queue.ping()
    queue.close()


def test_broker_lost_in_the_middle_of_an_answer() -> None:
    """A reader whose broker goes away is told so instead of waiting for its deadline."""
    with run_broker() as own:
        queue = Queue(own.url)
        request = request_for()
        answer = queue.generate(request)
        queue.writer(request.request_id).write(Chunk(text="a"))
        next(answer)
    with pytest.raises(Unavailable):
        within(5, lambda: next(answer))
    queue.close()


def test_unix_socket_works_as_tcp_does() -> None:
    """The embedded broker's socket carries rings and answers."""
    with run_broker(unix_socket=True) as own:
        queue = Queue(own.url)
        request = request_for()
        answer = queue.generate(request)
        queue.writer(request.request_id).write(LAST)

        assert queue.ring_trainers()
        assert list(answer) == [LAST]
        queue.close()


def test_settings_are_those_of_the_design() -> None:
    """JSON only, early acknowledgement, no result backend, no prefetch, publisher without retry."""
    conf = celery_app("redis://localhost:1/0").conf

    assert (conf.accept_content, conf.task_serializer) == (["json"], "json")
    assert (conf.task_acks_late, conf.task_ignore_result, conf.result_backend) == (False, True, None)
    assert (conf.worker_prefetch_multiplier, conf.worker_disable_prefetch) == (1, True)
    assert (conf.worker_pool, conf.task_publish_retry) == ("threads", False)
    assert conf.worker_enable_remote_control is False
    assert conf.broker_transport_options["global_keyprefix"] == "lorad:"


@pytest.fixture
def worker_app(broker: Broker) -> Iterator[Celery]:
    """A Celery application as a worker program makes it."""
    app = celery_app(broker.url)
    yield app
    app.close()


@pytest.mark.filterwarnings("ignore::celery.exceptions.SecurityWarning")  # the tests may run as root
def test_a_worker_answers_a_request(queue: Queue, worker_app: Celery) -> None:
    """A real Celery worker with the threads pool takes the message and its chunks come back."""

    @worker_app.task(name=GENERATE_TASK)  # type: ignore[untyped-decorator]  # Celery has no types
    def generate(payload: dict[str, Any]) -> None:
        writer = queue.writer(received_request(payload).request_id)
        writer.write(Chunk(text=threading.current_thread().name))
        writer.write(LAST)

    queue_name = generate_queue("base-worker")
    with start_worker(worker_app, pool="threads", perform_ping_check=False, queues=[queue_name]):
        chunks = list(queue.generate(request_for("base-worker")))

    assert len(chunks) == 2
    assert chunks[-1] == LAST
    assert chunks[0].text != threading.current_thread().name
