"""AdamW on one adapter's parameters with its learning-rate schedule; state in and out by parameter name."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shared.specs import TrainSpec


def learning_rate(spec: TrainSpec, step: int, total_steps: int) -> float:
    """The learning rate of step `step` (from 0) of `total_steps`.

    Warm-up of w steps: lr (step + 1) / (w + 1), so that no step is spent at 0. Then, linear: lr (n - step) / (n - w),
    which would be 0 one step after the last; constant: lr.
    """
    warmup = min(spec.warmup_steps, total_steps)
    if step < warmup:
        return spec.learning_rate * (step + 1) / (warmup + 1)
    if spec.lr_schedule == "constant":
        return spec.learning_rate
    return spec.learning_rate * (total_steps - step) / (total_steps - warmup)


class AdapterOptimizer:
    """One job's AdamW (betas 0.9 and 0.999, eps 1e-8) over fp32 parameters, with clipping of their joint gradient.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101; the arithmetic is torch.optim.AdamW's.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], spec: TrainSpec, *, total_steps: int) -> None:
        self._parameters = dict(parameters)
        self._spec = spec
        self._total_steps = total_steps
        on_gpu = next(iter(parameters.values())).is_cuda
        self._adamw = torch.optim.AdamW(
            self._parameters.values(), lr=spec.learning_rate, weight_decay=spec.weight_decay, fused=on_gpu
        )

    def clip(self) -> float:
        """Scale all gradients down to a joint norm of at most `max_grad_norm`; returns the norm they had."""
        return float(nn.utils.clip_grad_norm_(self._parameters.values(), self._spec.max_grad_norm))

    def step(self, step: int) -> None:
        """Update the parameters as step `step` (from 0) and drop their gradients."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate(self._spec, step, self._total_steps)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Copies of the running moments: {'exp_avg', 'exp_avg_sq'} -> parameter name -> tensor on the CPU."""
        return {
            kind: {name: _copy(self._adamw.state[p][kind]) for name, p in self._parameters.items()}
            for kind in ("exp_avg", "exp_avg_sq")
        }

    def restore(self, moments: Mapping[str, Mapping[str, Tensor]], *, steps: int) -> None:
        """Continue as after `steps` steps; the exact inverse of `moments`."""
        for name, parameter in self._parameters.items():
            # torch keeps the count on the CPU unless the fused kernel reads it.
            count = torch.tensor(float(steps), device=parameter.device if parameter.is_cuda else "cpu")
            self._adamw.state[parameter] = {"step": count} | {
                kind: moments[kind][name].to(parameter.device, copy=True) for kind in ("exp_avg", "exp_avg_sq")
            }


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
