"""Where a job stands, on disk: everything that the next step depends on, so that a resumed job is the same job.

    state.json            what the checkpoint belongs to (spec, base, data), the step, tokens trained on
    state.safetensors     <kind>/<module path>.lora_A and .lora_B for the kinds lora, exp_avg and exp_avg_sq (fp32), and
                          dropout (uint8), the state of the adapter's generator
The learning rate and the data position follow from the step, the order of the data from the seed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from shared.errors import TrainingFailed
from shared.specs import Spec, TrainSpec

HEADER_NAME: Final = "state.json"
TENSORS_NAME: Final = "state.safetensors"
KINDS: Final = ("lora", "exp_avg", "exp_avg_sq")
_DROPOUT: Final = "dropout"


class Header(Spec):
    """What a checkpoint belongs to and how far it is. `device` is the type that its generator state is for."""

    format: Literal[1] = 1
    spec: TrainSpec
    base_digest: str
    data_sha256: str
    device: str
    step: int
    trained_tokens: int


@dataclass(frozen=True)
class Checkpoint:
    """`tensors[kind][parameter]` for each of KINDS, on the CPU, and the state of the dropout generator."""

    header: Header
    tensors: Mapping[str, Mapping[str, Tensor]]
    dropout_state: Tensor

    def write(self, directory: Path) -> None:
        """Write the two files into `directory`; makes nothing durable or atomic, that is for whoever publishes it."""
        flat = {f"{kind}/{name}": tensor for kind, named in self.tensors.items() for name, tensor in named.items()}
        content = safetensors.torch.save({**flat, _DROPOUT: self.dropout_state}, metadata={"format": "pt"})
        (directory / TENSORS_NAME).write_bytes(content)
        (directory / HEADER_NAME).write_text(self.header.model_dump_json(indent=2), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> "Checkpoint":
        """The checkpoint in `directory`, in memory; raises TrainingFailed (invalid_checkpoint) if it is none."""
        try:
            header = Header.model_validate_json((directory / HEADER_NAME).read_bytes())
            flat = safetensors.torch.load((directory / TENSORS_NAME).read_bytes())
            dropout_state = flat.pop(_DROPOUT)
        except (OSError, ValidationError, SafetensorError, KeyError) as error:
            raise _invalid([f"cannot be read: {error}"]) from error
        tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
        for key, tensor in flat.items():
            kind, _, name = key.partition("/")
            if kind not in tensors:
                raise _invalid([f"unknown tensor {key}"])
            tensors[kind][name] = tensor
        return cls(header, tensors, dropout_state)

    def check(self, expected: Header, parameters: Mapping[str, Tensor]) -> None:
        """Raises TrainingFailed (invalid_checkpoint) with every reason why this does not continue that job.

        `expected` is compared in what a checkpoint belongs to, not in device, step and tokens; `parameters` in names,
        shapes and dtypes.
        """
        problems = [
            f"it is for another {what}"
            for what, field in (("spec", "spec"), ("base model", "base_digest"), ("training file", "data_sha256"))
            if getattr(self.header, field) != getattr(expected, field)
        ]
        for kind, named in self.tensors.items():
            problems += [f"no tensor {kind}/{name}" for name in parameters if name not in named]
            problems += [f"unknown tensor {kind}/{name}" for name in named if name not in parameters]
            problems += [
                f"{kind}/{name} is {tuple(named[name].shape)} {named[name].dtype}, not {tuple(parameter.shape)} float32"
                for name, parameter in parameters.items()
                if name in named and (named[name].shape != parameter.shape or named[name].dtype != torch.float32)
            ]
        if problems:
            raise _invalid(problems)


def _invalid(problems: list[str]) -> TrainingFailed:
    shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
    return TrainingFailed(f"the checkpoint cannot be resumed from: {shown}", code="invalid_checkpoint")
