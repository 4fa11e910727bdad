"""The trainer's own decisions: its name, the doorbells it rings, and the engine that it hands out."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from shared.config import Settings
from shared.jobs import Claim
from tests.shared.conftest import World
from tests.worker.training.conftest import base_around
from worker import trainer as trainer_module
from worker.job_run import TrainerStops
from worker.trainer import Trainer, _Bench
from worker.training.engine import TrainingEngine


def settings_of(world: World, **changes: Any) -> Settings:
    return dataclasses.replace(Settings.from_env({"LORAD_DATA_DIR": str(world.layout.root)}), **changes)


def trainer_in(world: World, rung: list[int], **settings: Any) -> Trainer:
    return Trainer(settings_of(world, **settings), world.engine, world.layout, ring=lambda: rung.append(1))


def test_two_trainers_have_two_names(world: World) -> None:
    """Even with one host name and process id, as after a container's restart: an old lease is never one's own."""
    world.submit(), world.submit()
    first, second = (trainer_in(world, [])._claim() for _ in range(2))

    assert first is not None
    assert second is not None
    assert first.trainer != second.trainer


@pytest.mark.parametrize(("slots", "rings"), [(2, 2), (1, 0)])
def test_free_slots_are_rung_for(world: World, slots: int, rings: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever claims a job rings once for the slots that are still free, and not at all if it has the last."""
    claims: list[Claim] = []

    class Ended:
        """A run of a job that ends at once."""

        def __init__(self, claim: Claim, **_: object) -> None:
            claims.append(claim)

        def run(self, engine_for: object) -> None:
            world.publish(claims[-1])

    monkeypatch.setattr(trainer_module, "JobRun", Ended)
    world.submit(), world.submit()
    rung: list[int] = []
    trainer_in(world, rung, train_slots=slots).answer_doorbell()

    assert len(claims) == 2
    assert len(rung) == rings


@pytest.fixture
def bench(
    world: World, tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> Iterator[_Bench]:
    """A bench whose every base is the tiny Llama."""
    made: list[TrainingEngine] = []

    def load(*_: object) -> TrainingEngine:
        made.append(TrainingEngine(base_around(tiny_llama, tiny_tokenizer), max_tokens=64))
        return made[-1]

    monkeypatch.setattr(_Bench, "_load", load)
    yield _Bench(settings_of(world), world.engine, world.layout)
    for engine in made:
        engine.close()


def test_an_engine_is_kept_while_it_lives(bench: _Bench) -> None:
    """The same base gets the same engine; another base, or the same after its thread has died, a new one."""
    first, same = bench.engine_for("a"), bench.engine_for("a")
    other = bench.engine_for("b")
    other.close()
    again = bench.engine_for("b")

    assert first is same
    assert other is not first
    assert first.is_dead
    assert again is not other
    assert not again.is_dead


def test_no_base_is_loaded_once_the_trainer_stops(bench: _Bench) -> None:
    """A job that was claimed just before goes back instead."""
    bench.stop_jobs()

    with pytest.raises(TrainerStops):
        bench.engine_for("a")
