"""Where a job stands, on disk: everything that the next step depends on, so that a resumed job is the same job.

    state.json            what the checkpoint belongs to (spec, base, data), and the counts of `Position`
    state.safetensors     <kind>/<module path>.lora_A and .lora_B, fp32, for the kinds lora, exp_avg and exp_avg_sq, and
                          best, the adapter of the best evaluation, once there was one
The learning rate and the data position follow from the step; the order of the data, and what dropout drops, from step
and seed. A checkpoint stands between two optimizer steps, so no accumulated gradient is in it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from shared.errors import TrainingFailed
from shared.specs import Spec, StepReport, TrainSpec
from worker.training.optimizer import MOMENTS, Standing

HEADER_NAME: Final = "state.json"
TENSORS_NAME: Final = "state.safetensors"
LORA: Final = "lora"
BEST: Final = "best"


class Position(Spec):
    """The counts of a job between two steps. `updates` are steps that moved the adapter: not those with a loss that was
    not finite, and none that a rollback undid."""

    step: int = 0
    updates: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    """Training time, all attempts together."""
    rate_scale: float = 1.0
    """What a rollback left of the learning rate."""
    non_finite_in_a_row: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    unreported: StepReport | None = None
    """The last report if an evaluation after `step` and so its metrics event are still to come."""
    ended_early: bool = False
    """Whether no step comes after `step`, however many the spec asks for."""


class Header(Spec):
    """What a checkpoint belongs to and how far it is. `device` and `dtype` are where it was trained; it may go on
    elsewhere, within rounding."""

    format: Literal[2] = 2
    spec: TrainSpec
    base_digest: str
    data_sha256: str
    device: str
    dtype: str
    position: Position


@dataclass(frozen=True)
class Checkpoint:
    """A header, and tensors on the CPU by parameter name."""

    header: Header
    standing: Standing
    best: Mapping[str, Tensor] | None

    def write(self, directory: Path) -> None:
        """Write the two files into `directory`; makes nothing durable or atomic, that is for whoever publishes it."""
        kinds = {LORA: self.standing.lora, **self.standing.moments} | ({BEST: self.best} if self.best else {})
        flat = {f"{kind}/{name}": tensor for kind, named in kinds.items() for name, tensor in named.items()}
        (directory / TENSORS_NAME).write_bytes(safetensors.torch.save(flat, metadata={"format": "pt"}))
        (directory / HEADER_NAME).write_text(self.header.model_dump_json(indent=2), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> "Checkpoint":
        """The checkpoint in `directory`, in memory; raises TrainingFailed (invalid_checkpoint) if it is none."""
        try:
            header = Header.model_validate_json((directory / HEADER_NAME).read_bytes())
            flat = safetensors.torch.load((directory / TENSORS_NAME).read_bytes())
        except (OSError, ValidationError, SafetensorError) as error:
            raise _invalid([f"cannot be read: {error}"]) from error
        kinds: dict[str, dict[str, Tensor]] = {kind: {} for kind in (LORA, *MOMENTS, BEST)}
        for key, tensor in flat.items():
            kind, _, name = key.partition("/")
            if kind not in kinds:
                raise _invalid([f"unknown tensor {key}"])
            kinds[kind][name] = tensor
        best = kinds.pop(BEST) if header.position.best_step is not None else None
        standing = Standing(header.position.updates, kinds[LORA], {kind: kinds[kind] for kind in MOMENTS})
        return cls(header, standing, best)

    def check(self, expected: Header, parameters: Mapping[str, Tensor]) -> None:
        """Raises TrainingFailed (invalid_checkpoint) with every reason why this does not continue that job.

        `expected` is compared in spec, base model and training data; `parameters` in names, shapes and dtypes.
        """
        problems = [
            f"it is for another {what}"
            for what, field in (("spec", "spec"), ("base model", "base_digest"), ("training file", "data_sha256"))
            if getattr(self.header, field) != getattr(expected, field)
        ]
        kinds = {LORA: self.standing.lora, **self.standing.moments} | ({} if self.best is None else {BEST: self.best})
        for kind, named in kinds.items():
            problems += _misfits(kind, named, parameters)
        if problems:
            raise _invalid(problems)


def newest_fitting(
    directories: Iterable[Path], expected: Header, parameters: Mapping[str, Tensor]
) -> tuple[Checkpoint | None, list[str]]:
    """The first checkpoint that continues that job, None without one; and why each before it does not."""
    refused: list[str] = []
    for directory in directories:
        try:
            checkpoint = Checkpoint.read(directory)
            checkpoint.check(expected, parameters)
        except TrainingFailed as error:
            refused.append(error.message)
        else:
            return checkpoint, refused
    return None, refused


def _misfits(kind: str, named: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> list[str]:
    problems = [f"no tensor {kind}/{name}" for name in parameters if name not in named]
    problems += [f"unknown tensor {kind}/{name}" for name in named if name not in parameters]
    problems += [
        f"{kind}/{name} is {tuple(named[name].shape)} {named[name].dtype}, not {tuple(parameter.shape)} float32"
        for name, parameter in parameters.items()
        if name in named and (named[name].shape != parameter.shape or named[name].dtype != torch.float32)
    ]
    return problems


def _invalid(problems: list[str]) -> TrainingFailed:
    shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
    return TrainingFailed(f"the checkpoint cannot be resumed from: {shown}", code="invalid_checkpoint")
