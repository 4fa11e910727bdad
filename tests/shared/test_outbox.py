"""The outbox: order and completeness whatever is joined, one round trip per step, cancellations, forged ones."""

import itertools
import threading
import time
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import ids
from shared.answers import CANCELS, AnswerReader, cancel
from shared.outbox import CANCELLED, LOST, Outbox, joined
from shared.queue import Queue
from shared.specs import Chunk, GeneratedToken, Usage
from tests.servers import Broker

WAIT_S = 20
USAGE = Usage(prompt_tokens=1, completion_tokens=1)


@pytest.fixture
def queue(broker: Broker) -> Iterator[Queue]:
    broker.client.flushall()
    queue = Queue(broker.url)
    yield queue
    queue.close()


@pytest.fixture
def outbox(queue: Queue) -> Iterator[Outbox]:
    outbox = queue.outbox()
    yield outbox
    outbox.close()


def read(queue: Queue, request_id: str) -> list[Chunk]:
    """The chunks on the broker up to the last one."""
    chunks: list[Chunk] = []
    with AnswerReader(queue._client, request_id, Chunk) as answer:
        while not chunks or not chunks[-1].is_last:
            chunk = answer.next(until_unix_s=time.time() + WAIT_S)
            assert chunk is not None
            chunks.append(chunk)
    return chunks


def told(chunks: list[Chunk]) -> dict[int, tuple[str, list[str], str | None]]:
    """By choice its text, the tokens of its logprobs, and how it ended."""
    by_choice: dict[int, tuple[str, list[str], str | None]] = {}
    for chunk in chunks:
        text, tokens, end = by_choice.get(chunk.index, ("", [], None))
        assert end is None
        tokens = tokens + [token.token for token in chunk.logprobs or []]
        by_choice[chunk.index] = text + chunk.text, tokens, chunk.finish_reason
    return by_choice


@st.composite
def answers(draw: st.DrawFn) -> list[Chunk]:
    """The chunks of one answer of up to three choices, in any order that is right."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    order = draw(st.permutations([index for index, length in enumerate(lengths) for _ in range(length)]))
    left, chunks = list(lengths), []
    for number, index in enumerate(order):
        left[index] -= 1
        logprobs = draw(st.none() | st.just([GeneratedToken(token=f"t{number}", bytes=[1], logprob=-1.0)]))
        chunks.append(
            Chunk(
                index=index,
                text=draw(st.sampled_from(["", "a", "b", "ü"])),
                logprobs=logprobs,
                finish_reason=None if left[index] else "stop",
                usage=USAGE if number == len(order) - 1 else None,
            )
        )
    return chunks


@settings(deadline=None, max_examples=80)
@given(st.lists(answers(), min_size=1, max_size=3), st.randoms())
def test_joining_loses_nothing(each: list[list[Chunk]], shuffle: Random) -> None:
    """However the chunks of several answers come together, each choice says the same and ends once, the last last."""
    deliveries = [Outbox.__new__(Outbox) for _ in each]
    batch: list[tuple[Outbox, Chunk]] = []
    left = [iter(chunks) for chunks in each]
    while left:
        number = shuffle.randrange(len(left))
        chunk = next(left[number], None)
        if chunk is None:
            del left[number], deliveries[number]
            continue
        batch.append((deliveries[number], chunk))
    out = joined(batch)  # type: ignore[arg-type]  # it tells answers apart, and looks no further

    for delivery in {id(delivery): delivery for delivery, _ in batch}.values():
        before = [chunk for one, chunk in batch if one is delivery]
        after = [chunk for one, chunk in out if one is delivery]  # type: ignore[comparison-overlap]
        assert told(after) == told(before)
        assert [chunk.is_last for chunk in after] == [False] * (len(after) - 1) + [True]
        assert len(after) <= len(before)


def test_texts_that_wait_become_one(outbox: Outbox, queue: Queue) -> None:
    """Tokens that came while the broker was slow are one chunk; those of different choices are not mixed."""
    a, b = ids.new_id(ids.REQUEST), ids.new_id(ids.REQUEST)
    with outbox.open(a) as one, outbox.open(b) as other:
        pieces = joined(
            [
                (one, Chunk(text="a")),
                (other, Chunk(text="x")),
                (one, Chunk(text="b")),
                (one, Chunk(text="c", index=1)),
                (one, Chunk(text="d")),
            ]
        )

    assert [(delivery is one, chunk.index, chunk.text) for delivery, chunk in pieces] == [
        (True, 0, "ab"),
        (False, 0, "x"),
        (True, 1, "c"),
        (True, 0, "d"),
    ]


def test_a_step_is_one_command(outbox: Outbox, queue: Queue, broker: Broker) -> None:
    """The chunks of forty answers that wait together cross in one command, not in forty."""
    requests = [ids.new_id(ids.REQUEST) for _ in range(40)]
    deliveries = [outbox.open(request_id) for request_id in requests]
    deliveries[0].put(Chunk(text="the script is known now"))
    deliveries[0].put_error("unavailable", "no")
    deliveries[0].wait(WAIT_S)
    broker.client.config_resetstat()
    for delivery in deliveries[1:]:
        delivery.put(Chunk(usage=USAGE, finish_reason="stop"))
    for delivery in deliveries[1:]:
        assert delivery.wait(WAIT_S) == "ok"
        delivery.__exit__(None, None, None)
    calls = broker.client.info("commandstats")["cmdstat_evalsha"]["calls"]

    assert calls < 10
    assert read(queue, requests[-1])[-1].usage == USAGE


@pytest.mark.parametrize("n", [1, 3])
def test_a_whole_answer_comes_in_two_parts(outbox: Outbox, queue: Queue, broker: Broker, n: int) -> None:
    """Where nobody reads before the end, the first piece comes at once, and all the others with the last."""
    request_id = ids.new_id(ids.REQUEST)
    with outbox.open(request_id, whole=True) as delivery:
        for token in range(20):
            for index in range(n):
                delivery.put(Chunk(index=index, text=f"{token},"))
                if not token and not index:
                    while not broker.client.exists(f"lorad:chunks:{request_id}"):
                        time.sleep(0.005)
        for index in range(n):
            is_end = index == n - 1
            delivery.put(Chunk(index=index, text="!", finish_reason="stop", usage=USAGE if is_end else None))
        assert delivery.wait(WAIT_S) == "ok"
    chunks = read(queue, request_id)

    text = "".join(f"{token}," for token in range(20)) + "!"
    assert told(chunks) == {index: (text, [], "stop") for index in range(n)}
    assert len(chunks) == 1 + n


def test_a_whole_answer_that_fails_ends(outbox: Outbox, queue: Queue) -> None:
    """An error does not wait for anything."""
    request_id = ids.new_id(ids.REQUEST)
    with outbox.open(request_id, whole=True) as delivery:
        delivery.put(Chunk(text="a"))
        delivery.put(Chunk(text="b"))
        delivery.put_error("internal_error", "no")
        assert delivery.wait(WAIT_S) == "internal_error"

    assert read(queue, request_id)[-1].error is not None


def test_a_cancellation_ends_its_request_alone(outbox: Outbox, queue: Queue) -> None:
    """Whoever waits for the delivery hears at once; what is put afterwards is not sent."""
    a, b = ids.new_id(ids.REQUEST), ids.new_id(ids.REQUEST)
    with outbox.open(a) as one, outbox.open(b) as other:
        cancel(queue._client, a)
        assert one.wait(WAIT_S) == CANCELLED
        one.put(Chunk(text="nobody reads this"))
        other.put(Chunk(usage=USAGE))
        assert other.wait(WAIT_S) == "ok"

    assert not queue._client.exists(f"lorad:chunks:{a}")


def test_forged_cancellations_do_no_harm(outbox: Outbox, queue: Queue, broker: Broker) -> None:
    """Entries of another shape are passed over, and a right one behind them is heard."""
    request_id = ids.new_id(ids.REQUEST)
    with outbox.open(request_id) as delivery:
        broker.client.xadd(CANCELS, {"x": "y"})
        broker.client.xadd(CANCELS, {"request": "../../etc"})
        broker.client.xadd(CANCELS, {"request": ids.new_id(ids.REQUEST)})
        cancel(queue._client, request_id)

        assert delivery.wait(WAIT_S) == CANCELLED


def test_leaving_without_an_end_is_a_loss(outbox: Outbox) -> None:
    """A delivery that nobody ended is lost, and known no more."""
    with outbox.open(ids.new_id(ids.REQUEST)) as delivery:
        assert outbox.num_open == 1

    assert (delivery.outcome, outbox.num_open) == (LOST, 0)


def test_closing_sends_what_waits(queue: Queue) -> None:
    """The last chunks before the end of the process are on the broker."""
    outbox = queue.outbox()
    requests = [ids.new_id(ids.REQUEST) for _ in range(20)]
    deliveries = [outbox.open(request_id) for request_id in requests]
    for delivery in deliveries:
        delivery.put(Chunk(usage=USAGE))
    outbox.close()

    assert all(delivery.outcome == "ok" for delivery in deliveries)


def test_answers_from_many_threads_keep_their_order(outbox: Outbox, queue: Queue) -> None:
    """Each answer's chunks arrive in the order of its thread."""
    requests = [ids.new_id(ids.REQUEST) for _ in range(8)]
    barrier = threading.Barrier(len(requests))

    def write(request_id: str) -> None:
        with outbox.open(request_id) as delivery:
            barrier.wait()
            for number in range(100):
                delivery.put(Chunk(text=f"{number},"))
            delivery.put(Chunk(usage=USAGE))
            assert delivery.wait(WAIT_S) == "ok"

    threads = [threading.Thread(target=write, args=(request_id,)) for request_id in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    expected = "".join(f"{number}," for number in range(100))
    texts = ["".join(chunk.text for chunk in read(queue, request_id)) for request_id in requests]
    assert texts == list(itertools.repeat(expected, len(requests)))
