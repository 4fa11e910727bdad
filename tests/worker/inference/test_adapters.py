"""Adapters in the engine: read beside it, attached on first use, evicted under the byte budget, failing alone."""

import threading
import time
from pathlib import Path

import pytest

from shared.errors import AdapterCorrupt, NotFound
from tests.worker.inference.conftest import (
    WAIT_S,
    AdapterShelf,
    CloseGate,
    StartEngine,
    answer,
    ask,
    read,
    reference,
)
from tests.worker.inference.residents import size_bytes
from worker.base_model import BaseModel
from worker.inference.adapters import READ_AHEAD, Readiness, ResidentAdapters, Shares

WEIGHTS = "adapter_model.safetensors"


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
    engine = start(adapter_cache_bytes=2 * size_bytes(base, shelf, "a"))

    order = ["a", "b", "a", "c", "a", "b"]
    texts = [answer(engine, ask("Once", name)).text for name in order]

    assert texts == [expected[name] for name in order]
    assert shelf.located == ["a", "b", "c", "b"]


def test_more_adapters_in_use_than_there_is_room_for_are_all_answered(
    base: BaseModel, shelf: AdapterShelf, start: StartEngine
) -> None:
    """Requests for six adapters at once, with room for one, wait for each other and get their own adapter's answer."""
    names = [shelf.make(name, r=2) for name in ("a", "b", "c", "d", "e", "f")]
    expected = [reference(base, shelf, "Once", name) for name in names]
    engine = start(adapter_cache_bytes=size_bytes(base, shelf, "a"))

    streams = [engine.submit(ask("Once", name)) for name in names]

    assert [read(stream).text for stream in streams] == expected


def test_an_adapter_larger_than_the_whole_budget_is_refused_with_the_numbers(
    base: BaseModel, shelf: AdapterShelf, start: StartEngine
) -> None:
    """It can never fit, so the request fails at once and says why."""
    name = shelf.make("one", r=2)
    needed = size_bytes(base, shelf, name)
    engine = start(adapter_cache_bytes=1000)

    error = answer(engine, ask("Once", name)).error

    assert error is not None
    assert error.code == "incompatible_adapter"
    assert str(needed) in error.message
    assert "1000" in error.message


def test_a_bad_adapter_fails_alone_with_its_code(base: BaseModel, shelf: AdapterShelf, start: StartEngine) -> None:
    """An adapter that cannot be located, read or fitted fails its requests with the reason; the others go on."""
    good = shelf.make("good", r=2)
    expected = reference(base, shelf, "Once", good)
    damaged = shelf.directory / shelf.make("damaged", r=2) / WEIGHTS
    damaged.write_bytes(damaged.read_bytes()[:-8])

    def locate(name: str) -> Path:
        if name == "changed":
            raise AdapterCorrupt("adapter_model.safetensors of changed does not match")
        if name == "deleted":
            raise NotFound("there is no adapter version 'deleted'")
        return shelf.locate(name)

    engine = start(locate=locate)
    asked = ["changed", "deleted", good, "damaged", "deleted", "absent", good]
    answers = [read(stream) for stream in [engine.submit(ask("Once", name)) for name in asked]]

    codes = [a.error.code if a.error else a.text for a in answers]
    assert codes == [
        "adapter_corrupt", "not_found", expected, "incompatible_adapter", "not_found", "incompatible_adapter", expected
    ]  # fmt: skip


def test_a_failed_load_is_tried_again_by_the_next_request(shelf: AdapterShelf, start: StartEngine) -> None:
    """A failure is not remembered: once the files are there, the adapter is served."""
    put_away = (shelf.directory / shelf.make("one", r=2)).rename(shelf.directory / "elsewhere")
    engine = start()
    failed = answer(engine, ask("Once", "one"))
    put_away.rename(shelf.directory / "one")

    assert failed.error is not None
    assert answer(engine, ask("Once", "one")).finish_reason == "length"


def test_a_slow_load_holds_up_nobody_else(base: BaseModel, shelf: AdapterShelf, start: StartEngine) -> None:
    """While one adapter is being read, requests for the base and for another adapter, both later, are answered."""
    slow, quick, may_go = shelf.make("slow", r=2), shelf.make("quick", r=2), threading.Event()
    expected = {name: reference(base, shelf, "Once", name) for name in (slow, quick, None)}

    def locate(version_id: str) -> Path:
        assert version_id != slow or may_go.wait(WAIT_S)
        return shelf.locate(version_id)

    engine = start(locate=locate)
    waits = engine.submit(ask("Once", slow))
    others = {name: answer(engine, ask("Once", name)).text for name in (None, quick)}
    may_go.set()

    assert others | {slow: read(waits).text} == expected


def test_a_request_that_lacks_only_room_is_not_overtaken(
    base: BaseModel, shelf: AdapterShelf, start: StartEngine, close_gate: CloseGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests for the adapter in use wait behind one that needs its place, or that one might wait forever."""
    used, wanted = shelf.make("used", r=2), shelf.make("wanted", r=2)
    engine, gate = start(adapter_cache_bytes=size_bytes(base, shelf, used)), close_gate()
    answers = [engine.submit(ask("first", used, max_tokens=100))]
    gate.wait_for_forward()
    lacks_room, acquire = threading.Event(), ResidentAdapters.acquire

    def noted(adapters: ResidentAdapters, needed: Shares) -> Readiness:
        readiness = acquire(adapters, needed)
        if readiness is Readiness.NO_ROOM:
            lacks_room.set()
        return readiness

    monkeypatch.setattr(ResidentAdapters, "acquire", noted)
    answers.append(engine.submit(ask("wants room", wanted)))
    for _ in range(90):
        gate.let_pass()
        gate.wait_for_forward()
        if lacks_room.wait(0.05):
            break
    answers.append(engine.submit(ask("behind them", used)))
    gate.open()
    for stream in answers:
        read(stream)

    prompts_read = [num_tokens for _, num_tokens in gate.steps if num_tokens >= len("wants room")]
    assert lacks_room.is_set()
    assert prompts_read == [len("wants room"), len("behind them")]


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


def test_a_request_does_not_wait_for_the_place_of_one_that_left(
    base: BaseModel, shelf: AdapterShelf, start: StartEngine, close_gate: CloseGate
) -> None:
    """The adapter that was kept for the first in the queue makes way once that is cancelled, though nothing runs."""
    kept, wanted = shelf.make("kept", r=2), shelf.make("wanted", r=2)
    read_before = threading.Event()

    def locate(version_id: str) -> Path:
        if version_id == wanted:
            threading.Timer(0.3, read_before.set).start()
        return shelf.locate(version_id)

    engine = start(max_rows=1, adapter_cache_bytes=size_bytes(base, shelf, kept), locate=locate)
    answer(engine, ask("so that it is there", kept))
    gate = close_gate()
    streams = [engine.submit(ask("runs", max_tokens=2)), engine.submit(ask("is first", kept))]
    gate.wait_for_forward()
    streams.append(engine.submit(ask("is second", wanted, deadline_unix_s=time.time() + 20)))
    gate.let_pass()
    gate.wait_for_forward()
    assert read_before.wait(WAIT_S)
    streams[1].cancel()
    gate.open()

    assert [read(stream).finish_reason for stream in (streams[0], streams[2])] == ["length", "length"]
