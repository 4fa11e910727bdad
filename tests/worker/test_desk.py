"""The generator's desk over a real broker and an engine without a model: answers, cancellations, errors, the end."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from shared import ids
from shared.answers import cancel
from shared.errors import ModelNotFound, QueueFull, Unavailable
from shared.queue import Queue
from shared.specs import Chunk, GenerationRequest
from tests.servers import Broker, run_broker
from tests.worker.fake_engine import FakeEngine
from worker import watchdog
from worker.desk import Desk

BASE = ids.new_id(ids.BASE_MODEL)
WAIT_S = 20


@pytest.fixture
def queue(broker: Broker) -> Iterator[Queue]:
    broker.client.flushall()
    queue = Queue(broker.url)
    yield queue
    queue.close()


@contextmanager
def desk_over(engine: FakeEngine, queue: Queue) -> Iterator[Desk]:
    desk = Desk(queue, seats=8, load=lambda _: engine)
    desk.start_publishing()
    try:
        yield desk
    finally:
        desk.close()


def request_for(*, seconds: float = 20.0, **fields: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id=ids.new_id(ids.REQUEST), base_model_id=BASE, prompt="hi", deadline_unix_s=time.time() + seconds,
        **fields,
    )  # fmt: skip


@contextmanager
def answering(desk: Desk, *requests: GenerationRequest) -> Iterator[list[threading.Thread]]:
    """A thread for each request, as Celery has one; they must be over in time."""
    threads = [threading.Thread(target=desk.answer, args=(request.model_dump(mode="json"),)) for request in requests]
    for thread in threads:
        thread.start()
    yield threads
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()


def until(holds: Callable[[], object]) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_answers_come_whole_and_in_order(queue: Queue) -> None:
    """Every request gets its own text, and after its last chunk nothing of it is left at the desk."""
    engine = FakeEngine(max_rows=4, step_s=0.001)
    requests = [request_for(max_tokens=20 + number) for number in range(8)]
    with desk_over(engine, queue) as desk:
        answers = [queue.generate(request) for request in requests]
        with answering(desk, *requests):
            texts = ["".join(chunk.text for chunk in answer) for answer in answers]

        assert texts == ["x" * (20 + number) for number in range(8)]
        assert desk.report().seats_taken == 0
        assert desk.report().outcomes == {"ok": 8}


def test_a_running_answer_is_cancelled_within_two_steps(queue: Queue) -> None:
    """When nobody reads on, the row is free at most two steps after that; an answer beside it goes on."""
    engine = FakeEngine(step_s=0.1)
    left, stays = request_for(max_tokens=1000), request_for(max_tokens=30)
    with desk_over(engine, queue) as desk:
        answer, other = queue.generate(left), queue.generate(stays)
        with answering(desk, left, stays):
            next(answer)
            before = engine.steps
            answer.close()  # type: ignore[attr-defined]  # a generator
            until(lambda: left.request_id in engine.left_at_step)

            assert engine.left_at_step[left.request_id] - before <= 2
            assert "".join(chunk.text for chunk in other) == "x" * 30
        assert desk.report().outcomes == {"cancelled": 1, "ok": 1}


def test_a_waiting_request_is_cancelled_within_two_steps(queue: Queue) -> None:
    """One that has no row yet, and nothing to say, leaves the engine's line as soon."""
    engine = FakeEngine(max_rows=1, step_s=0.1)
    runs, waits = request_for(max_tokens=1000), request_for()
    with desk_over(engine, queue) as desk, answering(desk, runs, waits):
        until(lambda: engine.begun)
        waiting = waits if engine.begun == [runs.request_id] else runs
        until(lambda: engine.state().waiting == 1)
        before = engine.steps
        cancel(queue._client, waiting.request_id)
        until(lambda: waiting.request_id in engine.left_at_step)
        took = engine.left_at_step[waiting.request_id] - before
        cancel(queue._client, engine.begun[0])

    assert took <= 2
    assert waiting.request_id not in engine.begun


def test_a_request_cancelled_in_the_broker_never_begins(queue: Queue) -> None:
    """Nobody listens any more when it is received: no engine sees it."""
    engine = FakeEngine()
    request = request_for(seconds=0.2)
    answer = queue.generate(request)
    with pytest.raises(Exception, match="deadline"):
        next(answer)
    late = request.model_copy(update={"deadline_unix_s": time.time() + 20})
    with desk_over(engine, queue) as desk, answering(desk, late):
        pass

    assert engine.begun == []


def test_a_message_that_comes_twice_is_answered_once(queue: Queue) -> None:
    """Also by two generators at the same moment: one of them has the claim."""
    engine, other = FakeEngine(step_s=0.001), FakeEngine(step_s=0.001)
    request = request_for()
    answer = queue.generate(request)
    with desk_over(engine, queue) as desk, desk_over(other, queue) as desk_2:
        with answering(desk, request, request), answering(desk_2, request, request):
            chunks = list(answer)

        assert "".join(chunk.text for chunk in chunks) == "xxx"
        assert len(engine.begun) + len(other.begun) == 1


def test_messages_that_are_too_late_or_forged_are_dropped(queue: Queue) -> None:
    """A request past its deadline and a payload that is none of ours reach no engine and raise nothing."""
    engine = FakeEngine()
    with desk_over(engine, queue) as desk:
        desk.answer(request_for(seconds=-1).model_dump(mode="json"))
        desk.answer({"request_id": "../../etc"})
        desk.answer(7)

        assert (engine.begun, desk.report().outcomes) == ([], {})


@pytest.mark.parametrize(
    ("failure", "code"),
    [(ModelNotFound("no such model"), "model_not_found"), (ZeroDivisionError("our bug"), "internal_error")],
)
def test_an_engine_that_refuses_is_an_error_chunk(queue: Queue, failure: Exception, code: str) -> None:
    """A domain error is shown as it is, any other as ours, without its inside."""
    engine = FakeEngine(failing=failure)
    request = request_for()
    answer = queue.generate(request)
    with desk_over(engine, queue) as desk, answering(desk, request):
        (chunk,) = list(answer)

    assert chunk.error is not None
    assert chunk.error.code == code
    assert "our bug" not in chunk.error.message


def test_a_broker_that_goes_away_ends_what_is_affected() -> None:
    """Open answers end and free their rows, nothing raises, and with the broker back the next one is answered."""
    engine = FakeEngine(step_s=0.01)
    with run_broker() as first:
        queue = Queue(first.url)
        port = int(first.url.rsplit(":", 1)[1].split("/")[0])
        with desk_over(engine, queue) as desk:
            lost = request_for(max_tokens=100_000)
            with answering(desk, lost):
                until(lambda: engine.begun)
                first.client.shutdown(nosave=True)
            until(lambda: lost.request_id in engine.left_at_step)
            not_taken = request_for()
            with answering(desk, not_taken):
                pass
            with run_broker(port=port):
                again = request_for()
                answer = queue.generate(again)
                with answering(desk, again):
                    text = "".join(chunk.text for chunk in answer)

            assert text == "xxx"
            assert engine.begun == [lost.request_id, again.request_id]
            assert desk.report().outcomes == {"lost": 1, "ok": 1}
        queue.close()


def test_a_stuck_engine_is_noticed_and_its_answers_end(queue: Queue) -> None:
    """The watchdog sees a turn that takes too long, and whoever waits is told to try again."""
    engine = FakeEngine(stuck=True)
    request = request_for()
    hung: list[float] = []
    with desk_over(engine, queue) as desk:
        answer = queue.generate(request)
        with answering(desk, request):
            until(lambda: engine.state().waiting)
            thread = watchdog.watch(lambda: desk.overdue_s(floor_s=5.0), floor_s=0.1, on_hung=hung.append)
            thread.join(WAIT_S)
            desk.end_all("The generator got stuck; try again.", timeout_s=2.0)
            (chunk,) = list(answer)

    assert hung == [3600.0]
    assert chunk.error is not None
    assert chunk.error.code == "unavailable"


def test_an_engine_that_turns_is_left_alone(queue: Queue) -> None:
    """A turn shorter than the limit is none of the watchdog's business."""
    with desk_over(FakeEngine(stuck=True), queue) as desk:
        desk.engine(BASE)

        assert desk.overdue_s(floor_s=4000.0) is None
        assert desk.overdue_s(floor_s=3000.0) == 3600.0


def test_leaving_ends_what_is_open(queue: Queue) -> None:
    """A generator that shuts down is nobody's first choice, and after its grace open answers end with an error."""
    engine = FakeEngine(step_s=0.01)
    request = request_for(max_tokens=100_000)
    with desk_over(engine, queue) as desk:
        answer = queue.generate(request)
        with answering(desk, request):
            until(lambda: engine.begun)
            leaving = threading.Thread(target=desk.leave, kwargs={"after_s": 0.2})
            leaving.start()
            chunks = list(answer)
            leaving.join()

        assert chunks[-1].error is not None
        assert desk.report().seats == 0


def test_the_report_says_what_an_engine_holds(queue: Queue) -> None:
    """Published, it reads back the same: rows, cache, adapters; withdrawn, it is gone."""
    version = ids.new_id(ids.ADAPTER_VERSION)
    desk = Desk(queue, seats=8, load=lambda _: FakeEngine(resident=(version,)))
    desk.engine(BASE)
    desk.start_publishing()
    (seen,) = queue.generators.alive(max_age_s=0)
    desk.close()

    assert seen.generator_id == desk.generator_id
    assert [(engine.base_model_id, engine.resident, engine.kv_tokens_total) for engine in seen.engines] == [
        (BASE, [version], 100)
    ]
    assert queue.generators.alive(max_age_s=0) == []


def test_a_full_queue_says_when_to_come_back(broker: Broker, queue: Queue) -> None:
    """The estimate is the queue's length by the measured rate; a constant where nobody has measured."""
    small = Queue(broker.url, max_waiting=20)
    for _ in range(20):
        queue.generate(request_for())
    with pytest.raises(QueueFull) as unknown:
        small.generate(request_for())
    with desk_over(FakeEngine(), queue) as desk:
        desk.engine(BASE)
        desk._rate(BASE).add(100)  # ten a second
        queue.generators.publish(desk.report())
        small.generators.alive(max_age_s=0)
        with pytest.raises(QueueFull) as measured:
            small.generate(request_for())
    small.close()

    assert (unknown.value.retry_after_s, measured.value.retry_after_s) == (5, 3)


def test_a_request_that_never_ends_gives_its_thread_back(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that forgets a request costs its seat until a grace after the deadline, not for ever."""
    monkeypatch.setattr("worker.desk.GRACE_S", 0.1)
    engine = FakeEngine(stuck=True)
    with desk_over(engine, queue) as desk:
        with answering(desk, request_for(seconds=0.5)):
            pass

        assert desk.report().outcomes == {"lost": 1}


def test_an_unused_writer_and_the_outbox_write_the_same(queue: Queue) -> None:
    """A reader cannot tell a chunk of the outbox from one of a plain writer."""
    request = request_for()
    answer = queue.generate(request)
    outbox = queue.outbox()
    with outbox.open(request.request_id) as delivery:
        queue.writer(request.request_id).write(Chunk(text="a"))
        delivery.put(Chunk(text="b"))
        delivery.put_error("unavailable", "no")
        assert delivery.wait(WAIT_S) == Unavailable.code
    outbox.close()

    assert [chunk.text for chunk in answer] == ["a", "b", ""]


def test_engines_are_closed_with_the_desk(queue: Queue) -> None:
    """A thread that computed while the process ends would abort it. Closed twice is once, as when the desk leaves."""
    engine = FakeEngine()
    with desk_over(engine, queue) as desk:
        desk.engine(BASE)
        desk.leave(after_s=0)

    assert not engine._thread.is_alive()


def test_an_engine_that_does_not_close_is_not_waited_for_for_ever(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that hangs on a device costs some seconds, and the log says so."""
    monkeypatch.setattr("worker.desk.CLOSE_S", 0.1)
    engine, let_go = FakeEngine(), threading.Event()
    closed = engine.close
    monkeypatch.setattr(engine, "close", lambda: (let_go.wait(WAIT_S), closed()))
    with desk_over(engine, queue) as desk:
        desk.engine(BASE)
    let_go.set()

    assert "not closed within" in caplog.text
