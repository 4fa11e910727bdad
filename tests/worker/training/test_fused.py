"""Jobs side by side on one base: each gets the adapter it would get alone, whatever happens to its neighbours.

The base is float64, so that what is left between fused and solo is the rounding of gradients to the adapters' fp32.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from shared.errors import TrainingFailed
from shared.specs import Order
from tests.worker.training.conftest import PAIRS, Recorder, base_around
from worker.base_model import BaseModel
from worker.lora.format import read_adapter
from worker.training.engine import TrainingEngine
from worker.training.job import TrainingResult

Engines = Callable[..., TrainingEngine]
Recorders = Callable[..., Recorder]
Lines = Callable[..., Path]

LONG = [{"prompt": "word " * n, "completion": "x" * (n % 5 + 1)} for n in (3, 9, 30, 1, 14)]
MARK = "Z"
"""A character that no other data has: hooks know the disturbed job by it."""


@pytest.fixture
def base(tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> BaseModel:
    return replace(base_around(tiny_llama.double(), tiny_tokenizer), dtype=torch.float64)


@pytest.fixture
def jobs(recorder: Recorders, write_lines: Lines) -> list[tuple[Recorder, Path]]:
    """Three jobs of different rank, targets, batch size, lengths, dropout, schedule and number of steps."""
    pairs, long = write_lines(PAIRS, "pairs.jsonl"), write_lines(LONG, "long.jsonl")
    everywhere = {"r": 7, "target_modules": "all-linear", "use_rslora": True}
    return [
        (recorder(n_epochs=3, batch_size=3, seed=1), pairs),
        (recorder(n_epochs=5, batch_size=2, seed=2, lora={**everywhere, "dropout": 0.3}, learning_rate=3e-3), long),
        (recorder(max_steps=7, batch_size=8, seed=3, lora={"r": 1, "dropout": 0.1}, lr_schedule="cosine"), pairs),
    ]


@contextmanager
def held(engine: TrainingEngine, seen: Recorder, path: Path) -> Iterator[Future[TrainingResult]]:
    """A job that holds the engine's thread after its first step until the block ends: what is submitted inside the
    block starts in the same turn."""
    arrived, go_on = threading.Event(), threading.Event()

    def hold(step: int) -> None:
        if step == 1:
            arrived.set()
            assert go_on.wait(30)

    seen.after_step = hold
    future = engine.submit(seen.job(path))
    assert arrived.wait(30)
    yield future
    go_on.set()


def tensors_of(result: TrainingResult, into: Path) -> dict[str, Tensor]:
    result.write_adapter(into)
    pairs = read_adapter(into).tensors
    return {f"{path}.{half}": tensor for path, pair in pairs.items() for half, tensor in zip("AB", pair, strict=True)}


def alone(engine_for: Engines, base: BaseModel, jobs: list[tuple[Recorder, Path]], into: Path) -> list[dict[str, Any]]:
    """What each job gives on an engine of its own."""
    results = []
    for i, (seen, path) in enumerate(jobs):
        engine = engine_for(base, max_tokens=4096)
        fresh = Recorder(into, seen.spec)
        results.append(tensors_of(engine.submit(fresh.job(path)).result(), into / f"alone-{i}"))
        engine.close()
    return results


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for the last bits of fp32 gradients, which AdamW carries on."""
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("max_tokens", [4096, 100])
def test_fused_equals_solo(
    max_tokens: int,
    base: BaseModel,
    jobs: list[tuple[Recorder, Path]],
    recorder: Recorders,
    engine_for: Engines,
    tmp_path: Path,
) -> None:
    """Jobs that start together, beside one that is there already, train what they train alone; with room for all at
    once, and with little room."""
    expected = alone(engine_for, base, jobs, tmp_path)
    first = recorder(max_steps=6, seed=9)
    widths: list[int] = []
    hook = base.model.get_input_embeddings().register_forward_pre_hook(  # type: ignore[operator]  # a module's own
        lambda _, arguments: widths.append(arguments[0].numel())
    )
    engine = engine_for(base, max_tokens=max_tokens)
    with held(engine, first, jobs[0][1]):
        futures = [engine.submit(seen.job(path)) for seen, path in jobs]
    found = [tensors_of(future.result(), tmp_path / f"fused-{i}") for i, future in enumerate(futures)]
    hook.remove()

    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)
    steps = sum(seen.reports[-1].step for seen, _ in [*jobs, (first, Path())])
    longest = max(len(pair["prompt"] + pair["completion"]) for pair in LONG) + 1
    if max_tokens == 4096:
        assert len(widths) < steps  # fewer forwards than optimizer steps: they were shared
    else:
        assert max(widths) <= max(100, longest)


def test_reports_are_those_of_a_solo_job(
    base: BaseModel, jobs: list[tuple[Recorder, Path]], recorder: Recorders, engine_for: Engines, tmp_path: Path
) -> None:
    """Losses, norms, rates and token counts are each job's own."""
    lonely = [Recorder(tmp_path, seen.spec) for seen, _ in jobs]
    for seen, (_, path) in zip(lonely, jobs, strict=True):
        engine = engine_for(base)
        engine.submit(seen.job(path)).result()
        engine.close()
    engine = engine_for(base, max_tokens=4096)
    with held(engine, recorder(), jobs[0][1]):
        futures = [engine.submit(seen.job(path)) for seen, path in jobs]
    for future in futures:
        future.result()

    for (seen, _), other in zip(jobs, lonely, strict=True):
        told = [
            [(r.step, r.train_loss, r.grad_norm, r.learning_rate, r.epoch, r.num_tokens) for r in who.reports]
            for who in (seen, other)
        ]
        assert [pytest.approx(row, rel=1e-5) for row in told[1]] == told[0]


def disturb(base: BaseModel, tokenizer: Any, how: str) -> Any:
    """A hook that makes the job whose data holds MARK give NaN, or run out of memory."""
    mark = tokenizer(MARK, add_special_tokens=False)["input_ids"][0]

    def spoil(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        is_marked = arguments[0] == mark
        if how == "memory" and is_marked.any():
            raise torch.OutOfMemoryError("the test's GPU is full")
        return output.masked_fill(is_marked[..., None], float("nan"))

    return base.model.get_input_embeddings().register_forward_hook(spoil)  # type: ignore[operator]  # a module's own


@pytest.mark.parametrize("how", ["nan", "memory", "cancel", "finish", "callback"])
def test_others_do_not_notice(
    how: str,
    base: BaseModel,
    jobs: list[tuple[Recorder, Path]],
    recorder: Recorders,
    engine_for: Engines,
    write_lines: Lines,
    tmp_path: Path,
) -> None:
    """A NaN, an allocation that fails, a cancel, an end and a bug in a callback of one job leave the others' tensors as
    they would have been."""
    expected = alone(engine_for, base, jobs, tmp_path)
    spoiled = recorder(max_steps=2 if how == "finish" else 50, batch_size=4, seed=4)
    path = write_lines([{"prompt": f"{MARK}{i}", "completion": "no"} for i in range(4)], "spoiled.jsonl")
    if how == "cancel":
        spoiled.orders = {2: Order.CANCEL}
    if how == "callback":
        spoiled.after_step = lambda step: 1 // (3 - step)  # type: ignore[assignment,return-value]  # fails at step 3
    hook = disturb(base, base.tokenizer, how) if how in ("nan", "memory") else None
    engine = engine_for(base, max_tokens=4096)
    with held(engine, recorder(max_steps=4), jobs[0][1]):
        futures = [engine.submit(seen.job(path)) for seen, path in [*jobs, (spoiled, path)]]
    found = [tensors_of(future.result(), tmp_path / f"fused-{i}") for i, future in enumerate(futures[:-1])]
    if hook is not None:
        hook.remove()

    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)
    ending = futures[-1].exception()
    match how:
        case "nan" | "memory":
            assert isinstance(ending, TrainingFailed)
            assert ending.error_code == ("diverged" if how == "nan" else "out_of_memory")
        case "callback":
            assert isinstance(ending, ZeroDivisionError)
        case _:
            assert futures[-1].result().outcome == ("finished" if how == "finish" else "stopped")


def test_all_leave_the_base_as_it_was(
    base: BaseModel, jobs: list[tuple[Recorder, Path]], recorder: Recorders, engine_for: Engines
) -> None:
    """After several jobs with different targets every module is the object it was, in the mode it was."""
    modules = dict(base.model.named_modules())
    engine = engine_for(base)
    with held(engine, recorder(), jobs[0][1]) as first:
        futures = [engine.submit(seen.job(path)) for seen, path in jobs]
    for future in [first, *futures]:
        future.result()

    assert dict(base.model.named_modules()) == modules
    assert not any(module.training for module in modules.values())


def test_a_job_that_waits_for_room_is_next(
    base: BaseModel, recorder: Recorders, engine_for: Engines, write_lines: Lines
) -> None:
    """With room for one sample in a turn, three jobs take turns: none makes all its steps before the others."""
    path = write_lines(PAIRS, "pairs.jsonl")
    order: list[str] = []
    crowd = [recorder(max_steps=4, batch_size=1, seed=i) for i in range(3)]
    for seen in crowd:
        seen.after_step = lambda step, seen=seen: order.append(seen.job_id)  # type: ignore[misc]  # bound per job
    engine = engine_for(base, max_tokens=1)
    with held(engine, recorder(max_steps=1), path):
        futures = [engine.submit(seen.job(path)) for seen in crowd]
    for future in futures:
        future.result()

    assert [len(set(order[at : at + 3])) for at in range(0, 12, 3)] == [3] * 4
