"""The engine on a GPU, over a tiny Llama with real adapters; the reference is Transformers' `generate` on a CPU."""

import copy
import time
from dataclasses import replace

import pytest

from tests.gpu.conftest import CUDA
from tests.worker.conftest import tiny_base
from tests.worker.inference.conftest import (
    AdapterShelf,
    StartEngine,
    answer,
    ask,
    base,
    generated_by_transformers,
    read,
    reference,
    shelf,
    start,
)
from tests.worker.inference.test_engine import PROMPTS
from worker.base_model import BaseModel
from worker.inference.engine import InferenceEngine

__all__ = ["base", "shelf", "start", "tiny_base"]  # fixtures

SAMPLED = {"temperature": 0.9, "top_p": 0.9, "seed": 5, "max_tokens": 20}


@pytest.fixture
def on_gpu(base: BaseModel) -> BaseModel:
    return replace(base, model=copy.deepcopy(base.model).to(CUDA), device=CUDA)


def idle(engine: InferenceEngine) -> None:
    """Until nothing is left to do; then nothing may be held."""
    for _ in range(1000):
        if not engine.state().running and not engine.state().waiting:
            break
        time.sleep(0.01)
    engine.close()
    engine.check()


def test_rows_of_a_mixed_batch_equal_generation_alone(
    base: BaseModel, on_gpu: BaseModel, shelf: AdapterShelf, start: StartEngine
) -> None:
    """Rows of several adapters, ranks and prompt lengths, and of the base, get what they get alone, twice in a row."""
    adapters = [
        shelf.make("r2", r=2),
        None,
        shelf.make("r8", r=8),
        shelf.make("q", r=3, target_modules=["q_proj"]),
        None,
    ]
    expected = [reference(base, shelf, p, a, 20) for p, a in zip(PROMPTS, adapters, strict=True)]
    engine = start(on_gpu)

    for _ in range(2):
        streams = [engine.submit(ask(p, a, max_tokens=20)) for p, a in zip(PROMPTS, adapters, strict=True)]
        assert [read(stream).text for stream in streams] == expected
    idle(engine)


def test_sampled_rows_are_not_changed_by_others(on_gpu: BaseModel, shelf: AdapterShelf, start: StartEngine) -> None:
    """A seeded answer is the same alone and beside others, and another one with another seed."""
    name = shelf.make("one", r=4)
    engine = start(on_gpu)
    alone = answer(engine, ask(PROMPTS[1], name, **SAMPLED)).text

    streams = [engine.submit(ask(PROMPTS[1], name, **SAMPLED)), *[engine.submit(ask(p)) for p in PROMPTS]]
    assert read(streams[0]).text == alone
    for stream in streams[1:]:
        read(stream)
    assert answer(engine, ask(PROMPTS[1], name, **SAMPLED | {"seed": 6})).text != alone
    idle(engine)


def test_a_cancelled_answer_leaves_the_others_alone(
    base: BaseModel, on_gpu: BaseModel, shelf: AdapterShelf, start: StartEngine
) -> None:
    """One of three rows is cancelled while all decode; the others go on as alone, and nothing of it stays."""
    name = shelf.make("one", r=4)
    expected = [reference(base, shelf, PROMPTS[1], name, 60), generated_by_transformers(base, PROMPTS[3], 60)]
    engine = start(on_gpu)
    cancelled = engine.submit(ask(PROMPTS[2], name, max_tokens=200, ignore_eos=True))
    streams = [engine.submit(ask(PROMPTS[1], name, max_tokens=60)), engine.submit(ask(PROMPTS[3], max_tokens=60))]
    for _ in range(5):
        next(cancelled)

    cancelled.cancel()

    assert [read(stream).text for stream in streams] == expected
    idle(engine)


def test_a_long_row_that_joins_short_ones(base: BaseModel, on_gpu: BaseModel, start: StartEngine) -> None:
    """Rows that are carried over into longer places while they decode get what they get alone."""
    long = "the quick brown fox jumps over the lazy dog " * 3
    expected = [generated_by_transformers(base, PROMPTS[1], 40), generated_by_transformers(base, long, 40)]
    engine = start(on_gpu)
    first = engine.submit(ask(PROMPTS[1], max_tokens=40))
    begun = [next(first) for _ in range(4)]

    second = read(engine.submit(ask(long, max_tokens=40)))

    assert "".join(chunk.text for chunk in begun) + read(first).text == expected[0]
    assert second.text == expected[1]
    idle(engine)
