"""What generators publish: who is alive, who is preferred, what is believed."""

import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest

from shared import ids
from shared.generators import EngineReport, GeneratorReport, Generators
from shared.queue import Queue
from tests.servers import Broker

BASE, OTHER_BASE = ids.new_id(ids.BASE_MODEL), ids.new_id(ids.BASE_MODEL)
A, B = ids.new_id(ids.ADAPTER_VERSION), ids.new_id(ids.ADAPTER_VERSION)


@pytest.fixture
def queue(broker: Broker) -> Iterator[Queue]:
    broker.client.flushall()
    queue = Queue(broker.url)
    yield queue
    queue.close()


@pytest.fixture
def generators(queue: Queue) -> Generators:
    return queue.generators


def publish(
    generators: Generators, *resident: str, base: str = BASE, running: int = 0, waiting: int = 0, **fields: Any
) -> str:
    """The id of a generator of four rows that holds these adapters."""
    engine = EngineReport(
        base_model_id=base, running=running, waiting=waiting, max_rows=4, kv_tokens_used=0, kv_tokens_total=100,
        resident=list(resident), requests_per_s=2.5,
    )  # fmt: skip
    report = GeneratorReport(
        **{
            "generator_id": ids.new_id(ids.GENERATOR), "host": "here", "pid": 1, "started_unix_s": 1.0, "seats": 8,
            "seats_taken": 0, "engines": [engine],
        }
        | fields
    )  # fmt: skip
    generators.publish(report)
    generators._read_at_s = -1e9
    return report.generator_id


def test_the_holder_is_preferred(generators: Generators) -> None:
    """Of two generators the one with all adapters of the request; with none of them nobody is."""
    holder = publish(generators, A, B)
    publish(generators, A)

    assert generators.holder(BASE, [A, B]) == holder
    assert generators.holder(BASE, [ids.new_id(ids.ADAPTER_VERSION)]) is None


def test_nobody_is_preferred_without_need(generators: Generators) -> None:
    """The bare base is everywhere, and a generator alone gets everything anyway."""
    publish(generators, A)
    alone = generators.holder(BASE, [A])
    publish(generators)

    assert (alone, generators.holder(BASE, [])) == (None, None)


@pytest.mark.parametrize(
    "state",
    [{"running": 4}, {"running": 2, "waiting": 2}, {"seats": 0}, {"base": OTHER_BASE}],
    ids=["full", "full with those that wait", "about to leave", "of another base"],
)
def test_who_has_no_row_for_it_is_not_preferred(generators: Generators, state: dict[str, Any]) -> None:
    """A holder that is full, about to leave, or holds it for another base model gets no request ahead of others."""
    publish(generators, A, **state)
    publish(generators)

    assert generators.holder(BASE, [A]) is None


def test_the_emptier_holder_is_preferred(generators: Generators) -> None:
    """Among holders the one with more free rows."""
    publish(generators, A, running=3)
    emptier = publish(generators, A, running=1)

    assert generators.holder(BASE, [A]) == emptier


def test_what_was_sent_counts_while_it_is_open(generators: Generators) -> None:
    """A burst between two reports fills the holder no further than its rows; what has ended frees them."""

    class Errand:
        pass

    holder = publish(generators, A)
    publish(generators)
    errands = [Errand() for _ in range(4)]
    for errand in errands:
        assert generators.holder(BASE, [A]) == holder
        generators.note_sent(holder, errand)
    full = generators.holder(BASE, [A])
    generators.note_lost(holder, errands[0])
    after_loss = generators.holder(BASE, [A])
    generators.note_sent(holder, errands[0])
    del errand, errands
    gc.collect()

    assert (full, after_loss, generators.holder(BASE, [A])) == (None, holder, holder)


def test_silence_is_death(generators: Generators, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not publish again is gone after ALIVE_S; who withdraws is gone at once."""
    monkeypatch.setattr("shared.generators.ALIVE_S", 1)
    silent = publish(generators, A)
    was_alive = generators.is_alive(silent)
    monkeypatch.undo()
    lasting, leaving = publish(generators), publish(generators)
    generators.withdraw(leaving)
    time.sleep(1.2)

    assert was_alive
    assert [one.generator_id for one in generators.alive(max_age_s=0)] == [lasting]
    assert not generators.is_alive(silent)


def test_a_report_of_another_release_is_alive(generators: Generators, broker: Broker) -> None:
    """A generator whose report we cannot read is no choice of ours, but what it answers is not given up."""
    unreadable = publish(generators, A)
    broker.client.set(f"lorad:generator:{unreadable}", '{"generator_id": 7}')
    generators._read_at_s = -1e9

    assert generators.alive() == []
    assert generators.is_alive(unreadable)


def test_rates_add_up_by_base_model(generators: Generators) -> None:
    """Requests per second of all generators of one base model together."""
    publish(generators)
    publish(generators)
    publish(generators, base=OTHER_BASE)

    assert generators.requests_per_s(BASE) == 5.0
    assert generators.requests_per_s(ids.new_id(ids.BASE_MODEL)) == 0.0


def test_reports_are_read_twice_a_second_at_most(generators: Generators, broker: Broker) -> None:
    """A hundred requests at once cost one look at the reports."""
    publish(generators, A)
    publish(generators)
    broker.client.config_resetstat()
    for _ in range(100):
        generators.holder(BASE, [A])

    assert broker.client.info("commandstats")["cmdstat_mget"]["calls"] <= 2
