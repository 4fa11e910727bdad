"""What the engine is asked to train, and what it hands back. Paths, values and callables only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.specs import Order, StepReport, TrainSpec

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]
WriteDirectory = Callable[[Path], None]
"""Writes a set of files into a directory that exists and is empty. May be called once, later and on any thread."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One adapter to train. Every callable runs on the engine's thread; an exception from one ends this job only."""

    job_id: str
    spec: TrainSpec
    train_path: Path
    valid_path: Path | None = None
    resume_from: Path | None = None
    """A checkpoint directory of this very job, written by `save_checkpoint`'s writer."""
    checkpoint_due: Callable[[], bool]
    """Asked after each optimizer step: should a checkpoint be written now, whatever `spec.checkpoint_every` says?"""
    save_checkpoint: Callable[[int, Mapping[str, Json], WriteDirectory], None]
    """(step, metrics of that step, writer of the checkpoint's files)."""
    on_event: Callable[[Literal["info", "warn", "error"], Literal["message", "metrics"], str, dict[str, Json]], None]
    """(level, type, message, data)."""
    on_step: Callable[[StepReport], Order]
    """Called after each optimizer step, before the step's event; its answer is obeyed at once."""


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
    """Writes the adapter as it was at `steps`, in PEFT's format."""
