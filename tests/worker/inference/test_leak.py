"""Thousands of requests over more adapters than fit: nothing is left over, and unloading gives the memory back."""

import contextlib
import gc
import itertools
import random
import time
import weakref
from collections import deque

import psutil
import pytest
import torch

from tests.worker.inference.conftest import AdapterShelf, StartEngine, ask, read
from tests.worker.inference.residents import bank_of, size_bytes
from worker.base_model import BaseModel
from worker.inference.engine import InferenceEngine
from worker.inference.stream import ChunkStream
from worker.lora.format import read_adapter

NUM_REQUESTS = 10_000
NUM_ADAPTERS = 200
NUM_CACHED = 20
AT_ONCE = 48


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def check_once_idle(engine: InferenceEngine) -> None:
    """The engine's own check. A client has its last piece a moment before the engine has put everything away."""
    for _ in range(500):
        with contextlib.suppress(AssertionError):
            return engine.check()
        time.sleep(0.02)
    return engine.check()


def answer_many(engine: InferenceEngine, names: list[str], num_requests: int, draws: random.Random) -> None:
    """Requests over these adapters, some favoured, some for the base, some cancelled; `AT_ONCE` are open at any time,
    and each that is not cancelled must end well."""
    weights = [1 / (rank + 1) for rank in range(len(names))]
    open_streams: deque[ChunkStream] = deque()

    def read_first() -> None:
        got = read(open_streams.popleft())
        assert got.error is None
        assert got.finish_reason is not None

    for number in range(num_requests):
        [name] = draws.choices([*names, None], [*weights, 0.5])
        stream = engine.submit(ask("Once upon"[: draws.randint(1, 9)], name, max_tokens=draws.randint(1, 4)))
        if number % 50 == 49:
            stream.cancel()
            continue
        open_streams.append(stream)
        if len(open_streams) == AT_ONCE:
            read_first()
    while open_streams:
        read_first()


@pytest.mark.timeout(300)
def test_thousands_of_requests_over_hundreds_of_adapters_leave_nothing(
    base: BaseModel, shelf: AdapterShelf, start: StartEngine
) -> None:
    """With a cache for a tenth of the adapters: every answer ends well, the engine finds nothing wrong with itself, and
    neither the tensors that live nor the memory of the process grow in the last third. Before that, caches fill,
    of kernels by shape among them."""
    kinds = [shelf.make(f"r{rank}", r=rank) for rank in (1, 2, 3)]
    names = [f"{kinds[number % 3]}-{number}" for number in range(NUM_ADAPTERS)]
    largest = max(size_bytes(base, shelf, kind) for kind in kinds)
    engine = start(locate=lambda name: shelf.locate(name.partition("-")[0]), adapter_cache_bytes=NUM_CACHED * largest)
    draws = random.Random(0)

    answer_many(engine, names, 2 * NUM_REQUESTS // 3, draws)
    tensors, memory = live_tensors(), resident_bytes()
    answer_many(engine, names, NUM_REQUESTS // 3, draws)

    check_once_idle(engine)
    state = engine.state()
    assert (state.running, state.waiting, state.kv_tokens_used) == (0, 0, 0)
    assert state.resident_bytes <= NUM_CACHED * largest
    assert len(shelf.located) > 2 * NUM_CACHED
    assert live_tensors() <= tensors + NUM_CACHED * 20  # as many adapters, of other ranks
    assert resident_bytes() - memory < 12 << 20


def test_unloading_gives_the_memory_back(base: BaseModel, shelf: AdapterShelf) -> None:
    """Every tensor of an adapter that was read, packed, attached and detached is gone, and so is its memory, each of
    fifty times; while it is attached its tensors live."""
    name = shelf.make("large", r=64)
    bank = bank_of(base)
    tensors: list[weakref.ref[torch.Tensor]] = []
    memory: list[int] = []
    for number in range(50):
        adapter = read_adapter(shelf.directory / name)
        packed = bank.pack(adapter, name=name)
        tensors += map(weakref.ref, itertools.chain.from_iterable(adapter.tensors.values()))
        tensors += [weakref.ref(part.a_NMI) for part in packed.parts.values()]
        bank.attach(f"{name}@{number}", packed)
        del adapter, packed
        assert any(tensor() is not None for tensor in tensors)
        bank.detach(f"{name}@{number}")
        assert not any(tensor() is not None for tensor in tensors)
        memory.append(resident_bytes())
    bank.close()

    assert max(memory[25:]) - memory[10] < 8 << 20


def test_the_last_adapter_leaves_the_model_as_it_was(base: BaseModel, shelf: AdapterShelf) -> None:
    """Once the bank is closed every module is the very object it was and computes the very same bits."""
    name = shelf.make("one", r=2)
    ids = torch.arange(8)[None]
    modules = list(base.model.modules())
    before = base.model(ids).logits
    bank = bank_of(base)
    bank.attach(name, bank.pack(read_adapter(shelf.directory / name), name=name))
    bank.detach(name)
    bank.close()

    assert all(now is then for now, then in zip(base.model.modules(), modules, strict=True))
    assert all("forward" not in vars(module) for module in modules)
    assert torch.equal(base.model(ids).logits, before)
