"""Weighted mixes of adapters: the sum of their updates, held in memory whole or not at all."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared import limits
from shared.errors import IncompatibleAdapter
from shared.specs import AdapterShare, GenerationRequest
from tests.worker.inference.conftest import AdapterShelf, StartEngine, answer, ask, generated_by_transformers, read
from tests.worker.inference.residents import acquire, bank_of, shares, size_bytes
from worker.base_model import BaseModel
from worker.inference.adapters import READ_AHEAD, Readiness, ResidentAdapters
from worker.lora.format import read_adapter

Mix = Mapping[str, float]


pytestmark = pytest.mark.usefixtures("computed_by")


def mixed(prompt: str, mix: Mix, **changed: Any) -> GenerationRequest:
    asked = [AdapterShare(version_id=name, weight=weight) for name, weight in mix.items()]
    return ask(prompt, **changed).model_copy(update={"adapters": asked})


def merged(base: BaseModel, shelf: AdapterShelf, prompt: str, mix: Mix) -> str:
    """The text of the model whose weights have the whole mix added: W + sum of w s B A."""
    model = copy.deepcopy(base.model)
    with torch.no_grad():
        for name, weight in mix.items():
            adapter = read_adapter(shelf.directory / name)
            for path, (a_RI, b_OR) in adapter.tensors.items():
                model.get_submodule(path).weight.add_(weight * adapter.spec.scaling(path) * (b_OR @ a_RI))
    return generated_by_transformers(replace(base, model=model), prompt)


MIXES: list[Mix] = [
    {"a": 0.7, "b": 0.3},
    {"a": 0.3, "b": 0.7},
    {"b": 1.0, "a": 1.0, "c": -0.5},
    {"a": 0.5},
    {"a": 1.0},
    {"a": 0.0, "c": 0.0},
    {},
]


@pytest.fixture
def three(shelf: AdapterShelf) -> list[str]:
    """Adapters of different ranks on different modules."""
    return [
        shelf.make("a", r=2), shelf.make("b", r=5), shelf.make("c", r=3, target_modules=["q_proj", "down_proj"])
    ]  # fmt: skip


def test_a_mix_is_the_model_with_the_weighted_sum_merged(
    base: BaseModel, shelf: AdapterShelf, three: list[str], start: StartEngine
) -> None:
    """Mixes, single adapters with a weight, and the base, all in one batch, each give what their merged model gives."""
    expected = [merged(base, shelf, "Once", mix) for mix in MIXES]
    engine = start()

    streams = [engine.submit(mixed("Once", mix)) for mix in MIXES]

    assert [read(stream).text for stream in streams] == expected
    assert len({expected[0], expected[1], expected[4], expected[6]}) == 4
    assert expected[5] == expected[6]


def test_a_mix_says_what_made_it(three: list[str], start: StartEngine) -> None:
    """The fingerprint is of the versions and their weights: the same for the same mix, another for other weights."""
    engine = start()

    prints = [answer(engine, mixed("Once", mix)).last.fingerprint for mix in (*MIXES, MIXES[0])]

    assert prints[0] == prints[-1]
    assert len(set(prints[:-1])) == len(MIXES)


def test_mixes_that_need_each_others_room_are_all_answered(
    base: BaseModel, shelf: AdapterShelf, start: StartEngine
) -> None:
    """With room for two, pairs that overlap take turns; none holds a half that another waits for."""
    names = [shelf.make(name, r=2) for name in ("a", "b", "c", "d")]
    pairs: list[Mix] = [{one: 0.5, other: 0.5} for one in names for other in names if one != other]
    expected = [merged(base, shelf, "Once", pair) for pair in pairs]
    engine = start(adapter_cache_bytes=2 * size_bytes(base, shelf, "a"))

    streams = [engine.submit(mixed("Once", pair)) for pair in pairs]

    assert [read(stream).text for stream in streams] == expected


def test_a_mix_of_more_than_are_read_ahead_is_answered(shelf: AdapterShelf, start: StartEngine) -> None:
    """The largest mix that may be asked for is read whole, also while others wait."""
    parts = [shelf.make(f"part{i}", r=1, size=0.01) for i in range(limits.MAX_MIX)]
    assert len(parts) > READ_AHEAD
    engine = start()

    whole = engine.submit(mixed("Once", dict.fromkeys(parts, 0.1)))
    others = [engine.submit(ask("Once", part)) for part in reversed(parts)]

    assert [read(stream).error for stream in (whole, *others)] == [None] * (1 + len(parts))


def test_a_mix_with_a_bad_part_fails_with_its_reason(shelf: AdapterShelf, start: StartEngine) -> None:
    """The other part still answers by itself."""
    good = shelf.make("good", r=2)
    engine = start()

    streams = [engine.submit(request) for request in (mixed("Once", {good: 0.5, "absent": 0.5}), ask("Once", good))]
    broken, whole = [read(stream) for stream in streams]

    assert broken.error is not None
    assert broken.error.code == "incompatible_adapter"
    assert whole.finish_reason == "length"


def test_a_mix_larger_than_the_budget_is_refused_with_the_numbers(
    base: BaseModel, shelf: AdapterShelf, start: StartEngine
) -> None:
    """Two that fit by themselves but not together can never be mixed, and the answer says so."""
    names = [shelf.make(name, r=2) for name in ("a", "b")]
    each = size_bytes(base, shelf, "a")
    engine = start(adapter_cache_bytes=2 * each - 1)

    alone = [answer(engine, ask("Once", name)).error for name in names]
    error = answer(engine, mixed("Once", {"a": 0.5, "b": 0.5})).error

    assert alone == [None, None]
    assert error is not None
    assert f"a, b together have {2 * each} bytes; this server holds {2 * each - 1} bytes" in error.message


@pytest.fixture
def room_for_two(base: BaseModel, shelf: AdapterShelf) -> Iterator[Callable[..., ResidentAdapters]]:
    """Adapters a, b, c of one size, and room for two of them; no engine."""
    for name in ("a", "b", "c"):
        shelf.make(name, r=2)
    budget = 2 * size_bytes(base, shelf, "a")
    bank = bank_of(base)
    started: list[ResidentAdapters] = []

    def make(**changed: Any) -> ResidentAdapters:
        options: dict[str, Any] = {"locate": shelf.locate, "budget_bytes": budget, "on_read": lambda: None}
        started.append(ResidentAdapters(bank, **options | changed))
        return started[-1]

    yield make
    for one in started:
        one.close()
    bank.close()


def test_all_of_a_mix_is_pinned_or_nothing(room_for_two: Callable[..., ResidentAdapters]) -> None:
    """A mix that lacks room for a part pins none; one that has it pins each part once."""
    adapters = room_for_two()
    acquire(adapters, "c")

    assert acquire(adapters, "a", "b") is Readiness.NO_ROOM
    assert adapters.num_pins == 1
    adapters.release(shares("c"))
    assert acquire(adapters, "a", "b") is Readiness.READY
    assert adapters.num_pins == 2
    adapters.release(shares("a", "b"))
    assert adapters.num_pins == 0


def test_making_room_for_a_part_never_evicts_the_rest_of_its_mix(
    room_for_two: Callable[..., ResidentAdapters],
) -> None:
    """The part in memory is the least recently used one, and stays: the other unused adapter goes."""
    adapters = room_for_two()
    for name in ("a", "c"):
        acquire(adapters, name)
        adapters.release(shares(name))

    assert acquire(adapters, "a", "b") is Readiness.READY
    assert adapters.resident == ("a", "b")


def test_a_mix_is_read_ahead_whole_or_not(shelf: AdapterShelf, room_for_two: Callable[..., ResidentAdapters]) -> None:
    """A mix that has no place for all of its parts gets none, so that nobody's parts lie read for want of a place."""
    names, may_go = [f"n{i}" for i in range(READ_AHEAD - 1)], threading.Event()

    def locate(name: str) -> Path:
        may_go.wait()
        return shelf.locate("a")

    adapters = room_for_two(locate=locate)
    adapters.prefetch([*(shares(name) for name in names), shares("b", "c")])
    waits = adapters.acquire(shares("b", "c"))
    may_go.set()
    for name in names:
        acquire(adapters, name)
        adapters.release(shares(name))

    assert waits is Readiness.LOADING
    assert len(shelf.located) == len(names)
    adapters.prefetch([shares("b", "c")])
    assert acquire(adapters, "b", "c") is Readiness.READY


def test_what_passes_a_mix_without_place_is_not_dropped_again(
    shelf: AdapterShelf, room_for_two: Callable[..., ResidentAdapters]
) -> None:
    """One that takes the last place behind a mix that needs two keeps it: dropped, it would be started and dropped in
    every turn of the loop for as long as the reads before it take."""
    may_go, dropped = threading.Event(), threading.Event()

    def locate(name: str) -> Path:
        assert may_go.wait(60)
        return shelf.locate("a")

    adapters = room_for_two(locate=locate, on_read=dropped.set)
    waiting = [*(shares(f"n{i}") for i in range(READ_AHEAD - 1)), shares("b", "c"), shares("last")]
    for _ in range(2):
        for asked in waiting:
            assert adapters.acquire(asked) is Readiness.LOADING
        adapters.prefetch(waiting)
    was_dropped = dropped.is_set()
    may_go.set()

    assert not was_dropped
    assert acquire(adapters, "last") is Readiness.READY


def test_the_part_that_cannot_be_read_is_the_error(
    shelf: AdapterShelf, room_for_two: Callable[..., ResidentAdapters]
) -> None:
    """It comes as soon as it is known, however long the other parts take, and asking again tries anew."""
    may_go = threading.Event()

    def locate(name: str) -> Path:
        assert name == "bad" or may_go.wait(60)
        return shelf.locate(name)

    adapters = room_for_two(locate=locate)
    with pytest.raises(IncompatibleAdapter, match="there is no such file"):
        acquire(adapters, "a", "bad")
    may_go.set()
    (shelf.directory / "b").rename(shelf.directory / "bad")

    assert acquire(adapters, "a", "bad") is Readiness.READY
