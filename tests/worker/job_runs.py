"""Jobs to run in tests: a ledger and store with data to train on, and claims run to their end over a real engine."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.config import Settings
from shared.db import open_engine, write
from shared.jobs import Claim
from shared.specs import LoraSpec, TrainSpec
from shared.store import files
from shared.store.layout import Layout
from tests.shared.conftest import World, make_world
from tests.worker.training.conftest import PAIRS
from worker.base_model import BaseModel
from worker.job_run import JobRun
from worker.training.engine import TrainingEngine


def world_on(database_url: str, data_dir: Path) -> World:
    """A ledger with the eight lines as training file."""
    database, layout = open_engine(database_url), Layout(data_dir)
    layout.prepare()
    world = make_world(database, layout)
    lines = "".join(json.dumps(pair) + "\n" for pair in PAIRS).encode()
    with write(database) as tx:
        file = files.add_bytes(tx, layout, lines, tenant="acme", purpose="fine-tune", filename="train.jsonl")
    return dataclasses.replace(world, file_id=file.id)


def settings_of(world: World) -> Settings:
    return Settings.from_env({"LORAD_DATA_DIR": str(world.layout.root)})


def spec_of(**changes: Any) -> TrainSpec:
    return TrainSpec(**{"max_steps": 4, "batch_size": 8, "lora": LoraSpec(r=4), **changes})


def run(world: World, engine: TrainingEngine, claim: Claim | None, **settings: Any) -> None:
    """Run the claim to its end."""
    assert claim is not None
    chosen = dataclasses.replace(settings_of(world), **{"heartbeat_s": 0.05, "checkpoint_s": 1000.0, **settings})
    JobRun(claim, settings=chosen, database=world.engine, layout=world.layout).run(lambda _: engine)


def at_step(world: World, base: BaseModel, forward: int, act: Callable[[], object]) -> None:
    """Do something before forward number `forward` (from 1), on the engine's thread."""
    count = 0

    def hook(_: object, arguments: object) -> None:
        nonlocal count
        count += 1
        if count == forward:
            act()

    base.model.get_input_embeddings().register_forward_pre_hook(hook)  # type: ignore[operator]  # a module's own
