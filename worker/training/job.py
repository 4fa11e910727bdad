"""What the engine is asked to train, and what it hands back. Paths, values and callables only."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.specs import Order, StepReport, TrainSpec

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]
Level = Literal["info", "warn", "error"]
WriteDirectory = Callable[[Path], None]
"""Writes a set of files into a directory that exists and is empty. May be called once, later and on any thread."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One adapter to train. An exception from one of the callables ends this job only.

    They run on the engine's thread; while the data is read, `order` and `on_event` run on the thread that submits.
    """

    job_id: str
    spec: TrainSpec
    train_path: Path
    valid_path: Path | None = None
    init_from: Path | None = None
    """The adapter directory that `spec.init_from` names."""
    resume_from: Sequence[Path] = ()
    """Checkpoint directories of this very job, newest first; the first that fits is the one."""
    checkpoint_due: Callable[[], bool]
    """Asked after each optimizer step: should a checkpoint be written now, whatever `spec.checkpoint_every` says?"""
    save_checkpoint: Callable[[int, Mapping[str, Json], WriteDirectory], None]
    """(step, metrics of that step, writer of the checkpoint's files)."""
    on_event: Callable[[Level, Literal["message", "metrics"], str, dict[str, Json]], None]
    """(level, type, message, data)."""
    on_step: Callable[[StepReport], None]
    """Called after each finite optimizer step, before the step's metrics event."""
    order: Callable[[], Order]
    """Asked after every turn and obeyed then. PAUSE saves a checkpoint of the last whole step first: what the step or
    evaluation under way has gained is given up, and made again by the resumed job."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a job ended. A job that fails has no result: its future raises."""

    outcome: Literal["finished", "stopped"]
    order: Order | None
    """What stopped the job: CANCEL, PAUSE or LOST; None if it finished or the engine was shut down."""
    metrics: Mapping[str, Json]
    """Data of the last metrics event of this run; empty if no step was made."""
    steps: int
    trained_tokens: int
    """Tokens seen in all `steps`, those before a resume included."""
    write_adapter: WriteDirectory
    """Writes the adapter that the spec asks to publish, in PEFT's format: as it was at `steps`, or the best one."""
