"""ResidentAdapters without an engine: what is read ahead, what is kept, what is told of what went wrong."""

import hashlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import AdapterCorrupt, IncompatibleAdapter, NotFound
from shared.specs import AdapterShare
from tests.worker.inference.conftest import (
    WAIT_S,
    AdapterShelf,
)
from tests.worker.inference.residents import acquire, bank_of, shares
from worker.base_model import BaseModel
from worker.inference.adapters import READ_AHEAD, Readiness, ResidentAdapters
from worker.lora.bank import AdapterBank
from worker.lora.format import AdapterFiles, StoredAdapter, read_adapter

WEIGHTS = "adapter_model.safetensors"


StartAdapters = Callable[..., ResidentAdapters]


@pytest.fixture
def bank(base: BaseModel) -> Iterator[AdapterBank]:
    bank = bank_of(base)
    yield bank
    bank.close()


@pytest.fixture
def each_bytes(bank: AdapterBank, shelf: AdapterShelf) -> int:
    """What one of the adapters a, b, c takes, which are all of rank 2."""
    sizes = {bank.pack(read_adapter(shelf.directory / shelf.make(name, r=2)), name=name).size_bytes for name in "abc"}
    [size] = sizes
    return size


@pytest.fixture
def resident(bank: AdapterBank, shelf: AdapterShelf, each_bytes: int) -> Iterator[StartAdapters]:
    """Makes a ResidentAdapters with room for two of the adapters a, b, c, unless told otherwise."""
    started: list[ResidentAdapters] = []

    def make(**changed: Any) -> ResidentAdapters:
        options: dict[str, Any] = {"locate": shelf.locate, "budget_bytes": 2 * each_bytes, "on_read": lambda: None}
        started.append(ResidentAdapters(bank, **options | changed))
        return started[-1]

    yield make
    for one in started:
        one.close()


def test_on_read_comes_when_asking_again_will_tell(shelf: AdapterShelf, resident: StartAdapters) -> None:
    """Whoever sleeps until `on_read` finds the adapter ready: it would sleep forever if it came any earlier."""
    may_read, read_ended, asked = threading.Event(), threading.Event(), threading.Event()

    def locate(version_id: str) -> Path:
        assert may_read.wait(WAIT_S)
        return shelf.locate(version_id)

    def on_read() -> None:
        read_ended.set()
        assert asked.wait(WAIT_S)

    adapters = resident(locate=locate, on_read=on_read)
    adapters.acquire(shares("a"))
    may_read.set()
    assert read_ended.wait(WAIT_S)
    readiness = adapters.acquire(shares("a"))
    asked.set()

    assert readiness is Readiness.READY


def test_an_adapter_in_use_is_never_evicted(resident: StartAdapters) -> None:
    """With both places pinned the third has no room, and gets it when one is released."""
    adapters = resident()
    assert [acquire(adapters, name) for name in ("a", "b", "c")] == [
        Readiness.READY,
        Readiness.READY,
        Readiness.NO_ROOM,
    ]

    adapters.release(shares("a"))

    assert adapters.acquire(shares("c")) is Readiness.READY
    assert adapters.resident == ("b", "c")


def test_an_adapter_acquired_twice_stays_until_it_is_released_twice(resident: StartAdapters) -> None:
    """Pins are counted."""
    adapters = resident()
    for name in ("a", "a", "b"):
        acquire(adapters, name)

    adapters.release(shares("a"))
    still_used = acquire(adapters, "c")
    adapters.release(shares("a"))

    assert still_used is Readiness.NO_ROOM
    assert acquire(adapters, "c") is Readiness.READY


def test_what_is_evicted_leaves_the_bank(bank: AdapterBank, each_bytes: int, resident: StartAdapters) -> None:
    """The bank holds just the resident ones, and the sizes agree."""
    adapters = resident()
    for name in ("a", "b", "c"):
        assert acquire(adapters, name) is Readiness.READY
        adapters.release(shares(name))

    assert sorted(bank.names()) == sorted(adapters.resident) == ["b", "c"]
    assert adapters.size_bytes == 2 * each_bytes


def test_everything_slow_happens_on_other_threads(
    shelf: AdapterShelf, resident: StartAdapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locating, reading and packing never run on the thread that asks."""
    at_work: dict[str, str] = {}

    def noting(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            at_work[what] = threading.current_thread().name
            return call(*args, **kwargs)

        return noted

    monkeypatch.setattr(AdapterFiles, "parse", noting("read", AdapterFiles.parse))
    monkeypatch.setattr(AdapterBank, "pack", noting("pack", AdapterBank.pack))
    adapters = resident(locate=noting("locate", shelf.locate))
    at_work.clear()
    acquire(adapters, "a")

    assert at_work.keys() == {"locate", "read", "pack"}
    assert all(thread.startswith("adapter-loader") for thread in at_work.values())


def test_a_loader_computes_on_one_core_and_others_on_as_many_as_before(
    shelf: AdapterShelf, resident: StartAdapters
) -> None:
    """Loading does not take the cores that decoding needs, nor does it take them from threads that start later."""
    found: dict[str, int] = {}

    def note(name: str) -> Path:
        found["loader"] = torch.get_num_threads()
        return shelf.locate(name)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        acquire(resident(locate=note), "a")
        later = threading.Thread(target=lambda: found.update(later=torch.get_num_threads()))
        later.start()
        later.join()
        found["here"] = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)

    assert found == {"loader": 1, "later": 2, "here": 2}


def test_the_first_in_the_queue_are_read_ahead_and_no_more(shelf: AdapterShelf, resident: StartAdapters) -> None:
    """Reads start in queue order, a bounded number, before anybody asks for them."""
    names, may_go = [shelf.make(f"n{i}", r=2) for i in range(READ_AHEAD + 3)], threading.Event()

    def locate(name: str) -> Path:
        assert may_go.wait(WAIT_S)
        return shelf.locate(name)

    adapters = resident(locate=locate, budget_bytes=1 << 30)
    adapters.prefetch(shares(name) for name in names)
    adapters.prefetch(shares(name) for name in names)
    may_go.set()
    for name in names[:READ_AHEAD]:
        assert acquire(adapters, name) is Readiness.READY

    assert sorted(shelf.located) == names[:READ_AHEAD]


def test_reads_for_requests_that_went_away_are_dropped(shelf: AdapterShelf, resident: StartAdapters) -> None:
    """What was read for nobody takes no place and no memory, and is read anew when it is wanted again."""
    read_ended = threading.Event()
    adapters = resident(on_read=read_ended.set)
    assert adapters.acquire(shares("a")) is Readiness.LOADING
    assert read_ended.wait(WAIT_S)

    adapters.prefetch([shares("b")])

    assert adapters.acquire(shares("a")) is Readiness.LOADING
    assert acquire(adapters, "a") is Readiness.READY
    assert shelf.located.count("a") == 2


def test_what_waits_near_the_front_is_evicted_last(resident: StartAdapters) -> None:
    """Of two unused adapters the one that a waiting request needs stays, although it was used less recently."""
    adapters = resident()
    for name in ("a", "b"):
        acquire(adapters, name)
        adapters.release(shares(name))

    adapters.prefetch([shares("c"), shares("a")])
    acquire(adapters, "c")

    assert adapters.resident == ("a", "c")


def test_the_first_in_the_queue_loses_nothing_to_others(resident: StartAdapters) -> None:
    """An adapter that the first waiting request needs is not evicted for one behind it, even as the only unused."""
    adapters = resident()
    for name in ("a", "b"):
        acquire(adapters, name)
    adapters.release(shares("a"))

    adapters.prefetch([shares("a"), shares("c")])
    behind = acquire(adapters, "c")
    adapters.prefetch([shares("c"), shares("a")])

    assert behind is Readiness.NO_ROOM
    assert acquire(adapters, "c") is Readiness.READY


def test_bytes_that_do_not_match_their_record_are_corrupt(shelf: AdapterShelf, resident: StartAdapters) -> None:
    """A flipped bit in either file is AdapterCorrupt, also where the file still reads; the right bytes are served."""
    checksums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (shelf.directory / "a").iterdir()}
    adapters = resident(locate=lambda name: StoredAdapter(shelf.directory / name, checksums))
    path = shelf.directory / "a" / WEIGHTS
    right = path.read_bytes()
    path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    with pytest.raises(AdapterCorrupt, match=f"{WEIGHTS} of a does not match"):
        acquire(adapters, "a")
    path.unlink()
    with pytest.raises(AdapterCorrupt, match=f"{WEIGHTS} of a cannot be read"):
        acquire(adapters, "a")
    path.write_bytes(right)

    assert acquire(adapters, "a") is Readiness.READY


def test_one_that_is_deleted_while_it_is_read_is_not_found(shelf: AdapterShelf, resident: StartAdapters) -> None:
    """Files that vanish between locating and reading are a deletion, and not damage."""
    found = [shelf.directory / "gone"]

    def locate(name: str) -> StoredAdapter:
        if not found:
            raise NotFound(f"there is no adapter version {name!r}")
        return StoredAdapter(found.pop(), {WEIGHTS: "0" * 64})

    with pytest.raises(NotFound, match="'gone'"):
        acquire(resident(locate=locate), "gone")


def test_the_digest_is_of_the_files(shelf: AdapterShelf, resident: StartAdapters) -> None:
    """Equal files have one digest, different ones have two, and it comes with the weight that was asked for."""
    adapters = resident(locate=lambda name: shelf.directory / name.rstrip("'"), budget_bytes=1 << 30)
    for name in ("a", "a'", "b"):
        acquire(adapters, name)

    [first, again, other] = [adapters.digests(shares(name))[0] for name in ("a", "a'", "b")]
    assert first == again == (first[0], 1.0)
    assert other[0] != first[0]
    assert adapters.digests([AdapterShare(version_id="b", weight=0.5)]) == [(other[0], 0.5)]


def test_loading_costs_the_same_with_few_and_with_many_in_memory(
    shelf: AdapterShelf, each_bytes: int, resident: StartAdapters
) -> None:
    """Bringing in the 400th adapter makes as many calls as bringing in the 10th, and so does evicting for one more."""

    def calls_with_room_for(num_adapters: int) -> list[int]:
        """How many calls each of two adapters more than fit takes to acquire, once it is read."""
        read_ended = threading.Event()
        adapters = resident(
            locate=lambda _: shelf.directory / "a", budget_bytes=num_adapters * each_bytes, on_read=read_ended.set
        )
        calls = []
        for name in (f"{num_adapters}-{i}" for i in range(num_adapters + 2)):
            read_ended.clear()
            adapters.prefetch([shares(name)])
            assert read_ended.wait(WAIT_S)
            calls.append(calls_of(lambda name=name: adapters.acquire(shares(name))))
            adapters.release(shares(name))
        assert len(adapters.resident) == num_adapters
        return calls

    few, many = calls_with_room_for(10), calls_with_room_for(400)

    assert many[399] == few[9] > 0
    assert many[401] == few[11] > few[9]


def calls_of(do: Callable[[], object]) -> int:
    """How many calls, of Python and of C functions, this makes on the current thread."""
    count = 0

    def saw(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(saw)
    try:
        do()
    finally:
        sys.setprofile(None)
    return count


def test_an_adapter_for_another_model_is_refused_by_name(shelf: AdapterShelf, resident: StartAdapters) -> None:
    """What does not fit says which adapter and why, and takes no memory."""
    config = shelf.directory / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"q_proj"', '"x_proj"'))
    adapters = resident()

    with pytest.raises(IncompatibleAdapter, match="adapter a does not fit"):
        acquire(adapters, "a")
    assert (adapters.resident, adapters.size_bytes) == ((), 0)
