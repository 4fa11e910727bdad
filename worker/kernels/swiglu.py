"""The gated MLP of a frozen model: its own values, with less kept for the gradient."""

# Shapes: ... any leading shape, F the MLP's width.

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_PARTS = ("gate_proj", "up_proj", "down_proj")


def is_gated_mlp(module: nn.Module) -> bool:
    """True for MLPs that compute down(silu(gate(x)) * up(x)) and nothing else: decided by trying it."""
    if not all(isinstance(getattr(module, name, None), nn.Linear) for name in _PARTS):
        return False
    weight = module.get_parameter("gate_proj.weight")
    x = torch.linspace(-2, 2, 3 * weight.shape[1], device=weight.device).view(3, -1).to(weight.dtype)
    with torch.no_grad():
        own = module(x)
        return isinstance(own, Tensor) and torch.equal(own, lean_mlp(module, x))


def lean_mlp(module: Any, x: Tensor) -> Tensor:
    """What a gated MLP computes, bit for bit; its layers may have been wrapped by adapters since."""
    return module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))  # type: ignore[no-any-return]  # a module's


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, (..., F) both. Keeps the two inputs alone and forms silu(gate) again in backward:
    dup = dy silu(gate),  dgate = dy up silu'(gate)."""
    if not (torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)):
        return torch.nn.functional.silu(gate).mul_(up)
    result: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]  # torch
    return result


def lean_forward(module: nn.Module) -> partial[Tensor]:
    """A forward for a gated MLP."""
    return partial(lean_mlp, module)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), torch.nn.functional.silu(gate).mul_(dy)
