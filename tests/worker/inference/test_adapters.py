"""Adapters in the engine: loaded on first use, evicted under the byte budget, failing alone."""

import threading
import time
from pathlib import Path

import pytest

from shared.errors import AdapterCorrupt
from tests.worker.inference.conftest import WAIT_S, AdapterShelf, CloseGate, StartEngine, answer, ask, read, reference
from worker.base_model import BaseModel
from worker.inference.adapters import READ_AHEAD, Readiness, ResidentAdapters
from worker.lora.format import read_adapter
from worker.lora.manager import AdapterManager


def size_bytes(shelf: AdapterShelf, name: str) -> int:
    tensors = read_adapter(shelf.directory / name).tensors
    return sum(half.nbytes for pair in tensors.values() for half in pair)


def test_an_adapter_is_located_once_while_it_stays_in_memory(shelf: AdapterShelf, start: StartEngine) -> None:
    """The second request for the same version reads nothing."""
    name = shelf.make("one", r=2)
    engine = start()

    for _ in range(3):
        answer(engine, ask("again", name))

    assert shelf.located == ["one"]


def test_the_least_recently_used_adapter_makes_way_and_comes_back(
    base: BaseModel, shelf: AdapterShelf, start: StartEngine
) -> None:
    """With room for two, a third takes the place of the one not used for longest, which is read again when wanted."""
    names = [shelf.make(name, r=2) for name in ("a", "b", "c")]
    expected = {name: reference(base, shelf, "Once", name) for name in names}
    engine = start(adapter_cache_bytes=2 * size_bytes(shelf, "a"))

    order = ["a", "b", "a", "c", "a", "b"]
    texts = [answer(engine, ask("Once", name)).text for name in order]

    assert texts == [expected[name] for name in order]
    assert shelf.located == ["a", "b", "c", "b"]


def test_more_adapters_in_use_than_there_is_room_for_are_all_answered(
    base: BaseModel, shelf: AdapterShelf, start: StartEngine
) -> None:
    """Requests for four adapters at once, with room for one, wait for each other and get their own adapter's answer."""
    names = [shelf.make(name, r=2) for name in ("a", "b", "c", "d")]
    expected = [reference(base, shelf, "Once", name) for name in names]
    engine = start(adapter_cache_bytes=size_bytes(shelf, "a"))

    streams = [engine.submit(ask("Once", name)) for name in names]

    assert [read(stream).text for stream in streams] == expected


def test_an_adapter_larger_than_the_whole_budget_is_refused_with_the_numbers(
    shelf: AdapterShelf, start: StartEngine
) -> None:
    """It can never fit, so the request fails at once and says why."""
    name = shelf.make("one", r=2)
    engine = start(adapter_cache_bytes=1000)

    error = answer(engine, ask("Once", name)).error

    assert error is not None
    assert error.code == "incompatible_adapter"
    assert str(size_bytes(shelf, name)) in error.message
    assert "1000" in error.message


def test_a_bad_adapter_fails_alone_with_its_code(base: BaseModel, shelf: AdapterShelf, start: StartEngine) -> None:
    """An adapter that cannot be located, read or fitted fails its request with the reason; the others go on."""
    good = shelf.make("good", r=2)
    expected = reference(base, shelf, "Once", good)
    damaged = shelf.directory / shelf.make("damaged", r=2) / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])

    def locate(name: str) -> Path:
        if name == "changed":
            raise AdapterCorrupt("adapter_model.safetensors of changed does not match")
        return shelf.locate(name)

    engine = start(locate=locate)
    streams = {name: engine.submit(ask("Once", name)) for name in ("changed", good, "damaged", "absent")}
    answers = {name: read(stream) for name, stream in streams.items()}

    assert answers[good].text == expected
    codes = {name: a.error.code for name, a in answers.items() if a.error}
    assert codes == {
        "changed": "adapter_corrupt",
        "damaged": "incompatible_adapter",
        "absent": "incompatible_adapter",
    }


def test_a_failed_load_is_tried_again_by_the_next_request(shelf: AdapterShelf, start: StartEngine) -> None:
    """A failure is not remembered: once the files are there, the adapter is served."""
    put_away = (shelf.directory / shelf.make("one", r=2)).rename(shelf.directory / "elsewhere")
    engine = start()
    failed = answer(engine, ask("Once", "one"))
    put_away.rename(shelf.directory / "one")

    assert failed.error is not None
    assert answer(engine, ask("Once", "one")).finish_reason == "length"


def test_a_slow_load_holds_up_nobody_else(base: BaseModel, shelf: AdapterShelf, start: StartEngine) -> None:
    """While one adapter is being read, requests that came later are answered."""
    name, may_go = shelf.make("slow", r=2), threading.Event()
    expected = reference(base, shelf, "Once", name)

    def locate(version_id: str) -> Path:
        assert may_go.wait(WAIT_S)
        return shelf.locate(version_id)

    engine = start(locate=locate)
    slow = engine.submit(ask("Once", name))
    quick = answer(engine, ask("quick"))
    may_go.set()

    assert quick.finish_reason == "length"
    assert read(slow).text == expected


def test_a_request_that_lacks_only_room_is_not_overtaken(
    shelf: AdapterShelf, start: StartEngine, close_gate: CloseGate
) -> None:
    """Requests for the adapter in use wait behind one that needs its place, or that one might wait forever."""
    used, wanted = shelf.make("used", r=2), shelf.make("wanted", r=2)
    wanted_is_read = threading.Event()

    def locate(version_id: str) -> Path:
        if version_id == "after":  # one thread reads, in order
            wanted_is_read.set()
        return shelf.locate(version_id)

    engine, gate = start(locate=locate, adapter_cache_bytes=size_bytes(shelf, used)), close_gate()
    streams = [engine.submit(ask("first", used, max_tokens=100))]
    gate.wait_for_forward()
    streams += [engine.submit(ask("wants room", wanted)), engine.submit(ask("after", "after"))]
    gate.let_pass()
    gate.wait_for_forward()
    gate.let_pass()
    gate.wait_for_forward()
    assert wanted_is_read.wait(WAIT_S)
    streams.append(engine.submit(ask("behind them", used)))
    gate.open()
    for stream in streams:
        read(stream)

    assert gate.shapes.index((1, len("wants room"))) < gate.shapes.index((1, len("behind them")))


def test_reads_for_cancelled_requests_do_not_keep_others_from_being_read(
    shelf: AdapterShelf, start: StartEngine
) -> None:
    """As many reads as may lie waiting are given up with their requests, and the next adapter is read."""
    name, may_go = shelf.make("one", r=2), threading.Event()

    def locate(version_id: str) -> Path:
        assert may_go.wait(WAIT_S)
        return shelf.locate("one")

    engine = start(locate=locate)
    given_up = [engine.submit(ask("slow", f"slow{i}")) for i in range(READ_AHEAD)]
    answer(engine, ask("by now all of them are being read"))
    for stream in given_up:
        stream.cancel()
    wanted = engine.submit(ask("Once", name, deadline_unix_s=time.time() + 10))
    may_go.set()

    assert read(wanted).finish_reason == "length"


@pytest.fixture
def adapters(base: BaseModel, shelf: AdapterShelf) -> ResidentAdapters:
    """Room for two adapters of rank 2, and nothing in it; no engine."""
    budget = 2 * size_bytes(shelf, shelf.make("a", r=2))
    shelf.make("b", r=2)
    shelf.make("c", r=2)
    return ResidentAdapters(
        AdapterManager(base.model), locate=shelf.locate, budget_bytes=budget, on_read=threading.Event().set
    )


def test_on_read_comes_when_asking_again_will_tell(base: BaseModel, shelf: AdapterShelf) -> None:
    """Whoever sleeps until `on_read` finds the adapter ready: it would sleep forever if it came any earlier."""
    name, may_read, read_ended, asked = shelf.make("a", r=2), threading.Event(), threading.Event(), threading.Event()

    def locate(version_id: str) -> Path:
        assert may_read.wait(WAIT_S)
        return shelf.locate(version_id)

    def on_read() -> None:
        read_ended.set()
        assert asked.wait(WAIT_S)

    adapters = ResidentAdapters(AdapterManager(base.model), locate=locate, budget_bytes=1 << 30, on_read=on_read)
    adapters.acquire(name)
    may_read.set()
    assert read_ended.wait(WAIT_S)
    readiness = adapters.acquire(name)
    asked.set()

    assert readiness is Readiness.READY


def acquire(adapters: ResidentAdapters, name: str) -> Readiness:
    """Ask until it is no longer being read."""
    deadline = threading.Event()
    for _ in range(1000):
        readiness = adapters.acquire(name)
        if readiness is not Readiness.LOADING:
            return readiness
        deadline.wait(0.01)
    raise AssertionError("never read")


def test_an_adapter_in_use_is_never_evicted(adapters: ResidentAdapters) -> None:
    """With both places pinned the third has no room, and gets it when one is released."""
    assert [acquire(adapters, name) for name in ("a", "b", "c")] == [
        Readiness.READY,
        Readiness.READY,
        Readiness.NO_ROOM,
    ]

    adapters.release("a")

    assert adapters.acquire("c") is Readiness.READY
    assert adapters.resident == ("b", "c")


def test_eviction_gives_the_modules_back(base: BaseModel, adapters: ResidentAdapters) -> None:
    """An evicted adapter leaves nothing in the model but what the resident ones put there."""
    for name in ("a", "b", "c"):
        assert acquire(adapters, name) is Readiness.READY
        adapters.release(name)

    names = {key for key, _ in base.model.named_parameters() if "lora a" in key}
    assert names == set()
    assert any("lora c" in key for key, _ in base.model.named_parameters())


def test_reads_for_requests_that_went_away_are_dropped(adapters: ResidentAdapters) -> None:
    """What was read for nobody takes no place, and is read anew when it is wanted again."""
    assert adapters.acquire("a") is Readiness.LOADING

    adapters.forget_reads_except(set())

    assert adapters.acquire("a") is Readiness.LOADING
    assert acquire(adapters, "a") is Readiness.READY
