"""AdamW on one adapter's parameters with its learning-rate schedule; state in and out by parameter name."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from shared.specs import TrainSpec

MOMENTS: Final = ("exp_avg", "exp_avg_sq")


def learning_rate(spec: TrainSpec, step: int, total_steps: int) -> float:
    """The learning rate of step `step` (from 0) of `total_steps`, for A.

    Warm-up of w steps: lr (step + 1) / (w + 1), so that no step is spent at 0. Then, with p = (step - w) / (n - w),
    which would be 1 one step after the last; linear: lr (1 - p); cosine: lr (1 + cos(pi p)) / 2; constant: lr.
    """
    warmup = min(spec.warmup_steps, total_steps)
    if step < warmup:
        return spec.learning_rate * (step + 1) / (warmup + 1)
    passed = (step - warmup) / (total_steps - warmup)
    match spec.lr_schedule:
        case "constant":
            return spec.learning_rate
        case "cosine":
            return spec.learning_rate * (1 + math.cos(math.pi * passed)) / 2
        case "linear":
            return spec.learning_rate * (1 - passed)


@dataclass(frozen=True)
class Standing:
    """Where an adapter and its optimizer stand: copies on the CPU by parameter name, and how many updates it had."""

    updates: int
    lora: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]
    """For each of MOMENTS."""


class AdapterOptimizer:
    """One job's AdamW (betas 0.9 and 0.999, eps 1e-8) over fp32 parameters, with clipping of their joint gradient.

    Parameters named '....lora_B' move at `lora_plus_ratio` times the rate of the others.
    Source: Loshchilov and Hutter 2019, arXiv:1711.05101; the arithmetic is torch.optim.AdamW's, as one fused kernel.
    The ratio: Hayou et al. 2024, arXiv:2402.12354, section 4.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], spec: TrainSpec) -> None:
        self._parameters = dict(parameters)
        self._max_grad_norm = spec.max_grad_norm
        halves: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self._parameters.items():
            halves.setdefault(spec.lora_plus_ratio if name.endswith(".lora_B") else 1.0, []).append(parameter)
        self._ratios = list(halves)
        self._adamw = torch.optim.AdamW(
            [{"params": members} for members in halves.values()],
            lr=spec.learning_rate,
            weight_decay=spec.weight_decay,
            fused=True,
        )
        self.updates = 0

    def set_gradients(self, gradients: Sequence[Tensor]) -> Tensor:
        """Take the gradients of one step, in the order of the parameters, and clip them to a joint norm of at most
        `max_grad_norm`; returns the norm they had, a scalar on their device."""
        for parameter, gradient in zip(self._parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        return nn.utils.clip_grad_norm_(self._parameters.values(), self._max_grad_norm)

    def step(self, rate: float) -> None:
        """Update the parameters at this learning rate, and drop the gradients."""
        for group, ratio in zip(self._adamw.param_groups, self._ratios, strict=True):
            group["lr"] = rate * ratio
        self._adamw.step()
        self.updates += 1
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget the gradients without a step."""
        self._adamw.zero_grad(set_to_none=True)

    def standing(self) -> Standing:
        """Copies of all that the next step depends on."""
        moments = {
            kind: {name: _copy(self._moment(p, kind)) for name, p in self._parameters.items()} for kind in MOMENTS
        }
        return Standing(self.updates, {name: _copy(p) for name, p in self._parameters.items()}, moments)

    @torch.no_grad()
    def restore(self, standing: Standing) -> None:
        """Put parameters and optimizer back to where `standing` was taken; it stays usable."""
        self.updates = standing.updates
        self.drop_gradients()
        for name, parameter in self._parameters.items():
            parameter.copy_(standing.lora[name])
            count = torch.tensor(float(standing.updates), device=parameter.device)
            self._adamw.state[parameter] = {"step": count} | {
                kind: standing.moments[kind][name].to(parameter.device, copy=True) for kind in MOMENTS
            }

    def _moment(self, parameter: nn.Parameter, kind: str) -> Tensor:
        state = self._adamw.state.get(parameter)
        moment: Tensor = torch.zeros_like(parameter) if not state else state[kind]
        return moment


def pairs_of(named: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """'<path>.lora_A' and '.lora_B' -> tensor, as path -> (A, B)."""
    paths = dict.fromkeys(name.rpartition(".")[0] for name in named)
    return {path: (named[f"{path}.lora_A"], named[f"{path}.lora_B"]) for path in paths}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
