"""A name that is deleted and made again while it is in use: nobody who comes after gets the old weights."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shared.errors import NotFound
from tests.worker.inference.conftest import WAIT_S, AdapterShelf, StartEngine, answer, ask, read, reference
from tests.worker.inference.residents import size_bytes
from worker.base_model import BaseModel
from worker.inference.engine import InferenceEngine

NUM_CLIENTS = 8
NUM_ROUNDS = 6


@dataclass
class Names:
    """One name and the version that it names now, as the adapter store has it: a version id is never used again."""

    shelf: AdapterShelf
    current: str | None = None
    deleted: set[str] = field(default_factory=set)

    def create(self, version_id: str) -> None:
        self.current = version_id

    def delete(self) -> None:
        assert self.current is not None
        self.deleted.add(self.current)
        self.current = None

    def locate(self, version_id: str) -> Path:
        if version_id in self.deleted:
            raise NotFound(f"there is no adapter version {version_id!r}")
        return self.shelf.locate(version_id)


@dataclass
class Clients:
    """Ask for a name over and over. `seen`: (what the name named when they asked, text or error code)."""

    engine: InferenceEngine
    names: Names
    seen: list[tuple[str, str]] = field(default_factory=list)
    answered: threading.Condition = field(default_factory=threading.Condition)
    stopping: threading.Event = field(default_factory=threading.Event)

    def ask_on(self) -> None:
        while not self.stopping.is_set():
            version_id = self.names.current
            if version_id is None:  # the API's own 404
                self.stopping.wait(0.001)
                continue
            got = answer(self.engine, ask("Once", version_id))
            with self.answered:
                self.seen.append((version_id, got.error.code if got.error else got.text))
                self.answered.notify_all()

    def wait_for_answers_of(self, version_id: str, count: int) -> None:
        with self.answered:
            assert self.answered.wait_for(
                lambda: sum(seen == version_id for seen, _ in self.seen) >= count, timeout=WAIT_S
            )


@pytest.fixture
def versions(shelf: AdapterShelf) -> list[str]:
    return [shelf.make(f"v{number}", r=2) for number in range(NUM_ROUNDS)]


@pytest.mark.parametrize("room_for", [1, 1000])
def test_a_recreated_name_never_gives_its_old_answers(
    base: BaseModel, shelf: AdapterShelf, versions: list[str], start: StartEngine, room_for: int
) -> None:
    """Under load, whoever asks once the name was made again gets what the new version says, or that it is not found
    once that one is deleted as well; whether the old version still lies in memory or had to make way."""
    expected = {version: reference(base, shelf, "Once", version) for version in versions}
    assert len(set(expected.values())) == len(versions)
    names = Names(shelf)
    clients = Clients(
        start(locate=names.locate, adapter_cache_bytes=room_for * size_bytes(base, shelf, versions[0])), names
    )

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        working = [pool.submit(clients.ask_on) for _ in range(NUM_CLIENTS)]
        try:
            for version in versions:
                names.create(version)
                clients.wait_for_answers_of(version, 2 * NUM_CLIENTS)
                names.delete()
        finally:
            clients.stopping.set()
    for client in working:
        client.result()

    assert {text for version, text in clients.seen} <= {*expected.values(), "not_found"}
    assert all(text in (expected[version], "not_found") for version, text in clients.seen)
    assert {version for version, text in clients.seen if text == expected[version]} == set(versions)


def test_a_running_answer_outlives_its_adapter(
    base: BaseModel, shelf: AdapterShelf, versions: list[str], start: StartEngine
) -> None:
    """Deleted in the middle of an answer, the adapter speaks to its end; one that was not in memory is not found."""
    first, second, *_ = versions
    expected = reference(base, shelf, "Once", first, num_tokens=60)
    names = Names(shelf, first)
    engine = start(locate=names.locate)

    stream = engine.submit(ask("Once", first, max_tokens=60))
    begun = next(stream)
    names.delete()
    names.deleted.add(second)
    refused = answer(engine, ask("Once", second)).error
    rest = read(stream)

    assert begun.text + rest.text == expected
    assert refused is not None
    assert refused.code == "not_found"


@pytest.fixture
def held_up(shelf: AdapterShelf, versions: list[str]) -> Iterator[tuple[Names, threading.Event]]:
    """Names whose `locate` gets no further until the event is set."""
    names, may_go = Names(shelf, versions[0]), threading.Event()
    locate = names.locate

    def later(version_id: str) -> Path:
        assert may_go.wait(WAIT_S)
        return locate(version_id)

    names.locate = later  # type: ignore[method-assign]
    yield names, may_go
    may_go.set()


def test_all_that_wait_for_a_deleted_adapter_are_told(
    held_up: tuple[Names, threading.Event], versions: list[str], start: StartEngine
) -> None:
    """Requests that were accepted before the deletion and still wait end as not found, each of them, and nothing else
    does."""
    names, may_go = held_up
    engine = start(locate=names.locate)

    streams = [engine.submit(ask("Once", versions[0])) for _ in range(20)]
    base_answer = answer(engine, ask("Once"))
    names.delete()
    may_go.set()
    codes = {got.error.code if got.error else got.finish_reason for got in map(read, streams)}

    assert base_answer.error is None
    assert codes == {"not_found"}
