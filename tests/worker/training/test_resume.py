"""Exact resume: a job that was interrupted gives, bit for bit, the adapter of one that was not."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import TrainingFailed
from shared.specs import LoraSpec, Order, TrainSpec
from tests.worker.training.conftest import PAIRS, Recorder
from worker.base_model import BaseModel
from worker.training.checkpoint import HEADER_NAME, TENSORS_NAME
from worker.training.engine import TrainingEngine

Engines = Callable[..., TrainingEngine]
Recorders = Callable[..., Recorder]

PROGRAM = """
import sys
from pathlib import Path
from shared.specs import Order, TrainSpec
from worker.base_model import load_base_model
from worker.training.engine import TrainingEngine
from worker.training.job import TrainingJob

base, train, checkpoint, adapter, spec = sys.argv[1:]
job = TrainingJob(
    job_id="ftjob-1", spec=TrainSpec.model_validate_json(spec), train_path=Path(train), resume_from=[Path(checkpoint)],
    checkpoint_due=lambda: False, save_checkpoint=lambda *_: None, on_event=lambda *_: None,
    on_step=lambda report: None, order=lambda: Order.GO_ON,
)
loaded = load_base_model(Path(base), name="tiny", digest="d" * 64, device="cpu", dtype="float32")
engine = TrainingEngine(loaded, max_tokens=64)
result = engine.submit(job).result()
result.write_adapter(Path(adapter))
print(result.steps, result.trained_tokens)
engine.close()
"""

SCHEDULE = {"warmup_steps": 2, "weight_decay": 0.1, "n_epochs": 3, "lora": {"dropout": 0.25}}
"""Nine steps in which the rate rises and falls, weights decay and dropout draws: all that a resume can get wrong."""


def adapter_bytes(engine: TrainingEngine, seen: Recorder, train_file: Path, into: Path) -> bytes:
    engine.submit(seen.job(train_file)).result().write_adapter(into)
    return (into / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def disk_base(tiny_base: BaseModel) -> BaseModel:
    """The tiny base from disk under the digest that the program above gives it."""
    return replace(tiny_base, digest="d" * 64)


@pytest.mark.parametrize("stopped_after", [1, 3, 8])
def test_resumed_equals_uninterrupted(
    stopped_after: int,
    disk_base: BaseModel,
    recorder: Recorders,
    train_file: Path,
    engine_for: Engines,
    tmp_path: Path,
) -> None:
    """k steps, a checkpoint and the other steps in another engine give the bytes of all steps at once.

    After the first step, at the end of an epoch, and before the last step.
    """
    whole, first, second = (recorder(**SCHEDULE) for _ in range(3))
    first.orders = {stopped_after: Order.PAUSE}
    engine = engine_for(disk_base)
    uninterrupted = adapter_bytes(engine, whole, train_file, tmp_path / "whole")
    engine.submit(first.job(train_file)).result()
    engine.close()
    resumed = (
        engine_for(disk_base).submit(second.job(train_file, resume_from=[first.checkpoints[stopped_after]])).result()
    )
    resumed.write_adapter(tmp_path / "resumed")

    assert (tmp_path / "resumed" / "adapter_model.safetensors").read_bytes() == uninterrupted
    assert [report.step for report in second.reports] == list(range(stopped_after + 1, 10))


def test_resumed_in_a_new_process_equals_uninterrupted(
    disk_base: BaseModel,
    tiny_base_directory: Path,
    recorder: Recorders,
    train_file: Path,
    engine_for: Engines,
    tmp_path: Path,
) -> None:
    """Four steps, a checkpoint, a new process and five steps give the bytes and the counts of nine steps at once."""
    whole, first = recorder(**SCHEDULE), recorder(**SCHEDULE)
    first.orders = {4: Order.PAUSE}
    engine = engine_for(disk_base)
    uninterrupted = adapter_bytes(engine, whole, train_file, tmp_path / "whole")
    engine.submit(first.job(train_file)).result()
    arguments = [tiny_base_directory, train_file, first.checkpoints[4], tmp_path / "resumed"]
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments), first.spec.model_dump_json()],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ).stdout  # fmt: skip

    assert (tmp_path / "resumed" / "adapter_model.safetensors").read_bytes() == uninterrupted
    assert told.split() == ["9", str(sum(report.num_tokens for report in whole.reports))]


def test_resumed_reports_continue(
    disk_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """Steps, losses, rates and norms after a resume are those of the uninterrupted job."""
    whole, first, second = (recorder(**SCHEDULE) for _ in range(3))
    first.orders = {4: Order.PAUSE}
    engine = engine_for(disk_base)
    engine.submit(whole.job(train_file)).result()
    engine.submit(first.job(train_file)).result()
    engine.submit(second.job(train_file, resume_from=[first.checkpoints[4]])).result()
    told = [
        [(r.step, r.train_loss, r.learning_rate, r.grad_norm, r.epoch) for r in reports]
        for reports in (whole.reports, first.reports + second.reports)
    ]

    assert told[0] == told[1]


@pytest.mark.parametrize("forgotten", ["exp_avg/", "exp_avg_sq/", "lora/"])
def test_every_part_of_a_checkpoint_matters(
    forgotten: str, disk_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, tmp_path: Path
) -> None:
    """The opposite: resuming from a checkpoint with one part blanked gives another adapter."""
    whole, first, second = (recorder(**SCHEDULE) for _ in range(3))
    first.orders = {4: Order.PAUSE}
    engine = engine_for(disk_base)
    uninterrupted = adapter_bytes(engine, whole, train_file, tmp_path / "whole")
    engine.submit(first.job(train_file)).result()
    path = first.checkpoints[4] / TENSORS_NAME
    tensors = load_file(path)
    blanked = {
        name: torch.zeros_like(tensor) if name.startswith(forgotten) else tensor for name, tensor in tensors.items()
    }
    save_file(blanked, path)
    engine.submit(second.job(train_file, resume_from=[first.checkpoints[4]])).result().write_adapter(
        tmp_path / "second"
    )

    assert (tmp_path / "second" / "adapter_model.safetensors").read_bytes() != uninterrupted


def test_saving_does_not_disturb_training(
    disk_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, tmp_path: Path
) -> None:
    """A job that saves after every step trains the same adapter."""
    quiet, busy = recorder(**SCHEDULE), recorder(**SCHEDULE, checkpoint_every=1)
    engine = engine_for(disk_base)
    adapter = adapter_bytes(engine, quiet, train_file, tmp_path / "quiet")

    assert adapter_bytes(engine, busy, train_file, tmp_path / "busy") == adapter
    assert len(busy.checkpoints) == 8


def test_a_checkpoint_may_be_written_later(
    disk_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, tmp_path: Path
) -> None:
    """The writer holds copies: what it writes is the step that it was made at, not what training made of it since."""
    at_once = recorder(**SCHEDULE, checkpoint_every=4)
    engine = engine_for(disk_base)
    kept = []
    job = at_once.job(train_file)

    def save_and_keep(step: int, metrics: object, write: Callable[[Path], None]) -> None:
        kept.append(write)
        job.save_checkpoint(step, metrics, write)  # type: ignore[arg-type]  # passed on as it came

    engine.submit(replace(job, save_checkpoint=save_and_keep)).result()
    (tmp_path / "later").mkdir()
    kept[0](tmp_path / "later")

    for filename in (HEADER_NAME, TENSORS_NAME):
        assert (tmp_path / "later" / filename).read_bytes() == (at_once.checkpoints[4] / filename).read_bytes()


@pytest.fixture
def checkpoint(disk_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines) -> Path:
    seen = recorder()
    seen.orders = {2: Order.PAUSE}
    engine_for(disk_base).submit(seen.job(train_file)).result()
    return seen.checkpoints[2]


def refusal(engine: TrainingEngine, seen: Recorder, train_file: Path, checkpoint: Path) -> str:
    """What the job says of a checkpoint that it cannot go on from; it then starts at its first step."""
    engine.submit(seen.job(train_file, resume_from=[checkpoint])).result()
    (message,) = [message for level, _, message, _ in seen.events if level == "warn"]
    assert seen.reports[0].step == 1
    return message


def test_other_spec_is_refused(
    disk_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, checkpoint: Path
) -> None:
    """A checkpoint is for one spec; all tensors that do not fit are listed too."""
    message = refusal(engine_for(disk_base), recorder(lora={"r": 2}), train_file, checkpoint)

    assert "it is for another spec" in message
    assert "lora/model.layers.0.self_attn.q_proj.lora_A is (4, 32) torch.float32, not (2, 32) float32" in message


def test_other_base_is_refused(
    tiny_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, checkpoint: Path
) -> None:
    """A checkpoint is for one base model."""
    assert "another base model" in refusal(engine_for(tiny_base), recorder(), train_file, checkpoint)


def test_other_data_is_refused(
    disk_base: BaseModel,
    recorder: Recorders,
    write_lines: Callable[..., Path],
    engine_for: Engines,
    checkpoint: Path,
) -> None:
    """A checkpoint is for one training file."""
    other = write_lines([*PAIRS[1:], PAIRS[0]], "other.jsonl")

    assert "another training file" in refusal(engine_for(disk_base), recorder(), other, checkpoint)


@pytest.mark.parametrize("damage", ["missing", "cut", "header", "unknown"])
def test_damaged_checkpoint_is_refused(
    damage: str, disk_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, checkpoint: Path
) -> None:
    """A checkpoint that is not whole is refused, whatever is wrong with it."""
    path, header = checkpoint / TENSORS_NAME, checkpoint / HEADER_NAME
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "header":
        header.write_text(json.dumps({**json.loads(header.read_text()), "step": "2"}))
    else:
        save_file({**load_file(path), "more/x": torch.zeros(1)}, path)

    assert "cannot be resumed from" in refusal(engine_for(disk_base), recorder(), train_file, checkpoint)


def test_the_newest_fitting_checkpoint_wins(
    disk_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, tmp_path: Path
) -> None:
    """Past a damaged checkpoint the next older one is taken, and the adapter is that of an uninterrupted job."""
    whole, first, second = (recorder(**SCHEDULE) for _ in range(3))
    first.due_after, first.orders = {3}, {5: Order.PAUSE}
    engine = engine_for(disk_base)
    uninterrupted = adapter_bytes(engine, whole, train_file, tmp_path / "whole")
    engine.submit(first.job(train_file)).result()
    damaged = first.checkpoints[5] / TENSORS_NAME
    damaged.write_bytes(damaged.read_bytes()[:-10])
    newest_first = [first.checkpoints[5], first.checkpoints[3]]
    engine.submit(second.job(train_file, resume_from=newest_first)).result().write_adapter(tmp_path / "resumed")

    assert [report.step for report in second.reports] == list(range(4, 10))
    assert (tmp_path / "resumed" / "adapter_model.safetensors").read_bytes() == uninterrupted


def test_a_start_that_was_left_out_is_not_made_up(
    disk_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, checkpoint: Path
) -> None:
    """A job from an adapter that comes with checkpoints only, none of which fits, fails instead of starting fresh."""
    seen = recorder(init_from="adv-" + "0" * 32)

    with pytest.raises(TrainingFailed, match="nor is the adapter to start from") as failure:
        engine_for(disk_base).submit(seen.job(train_file, resume_from=[checkpoint])).result()
    assert failure.value.error_code == "cannot_resume"


def test_checkpoint_holds_no_pickle(checkpoint: Path) -> None:
    """A checkpoint is one JSON file and one safetensors file, and the JSON names its spec."""
    assert sorted(p.name for p in checkpoint.iterdir()) == [HEADER_NAME, TENSORS_NAME]
    assert TrainSpec.model_validate(json.loads((checkpoint / HEADER_NAME).read_text())["spec"]).lora == LoraSpec(r=4)
