"""RMSNorm of a frozen model: the module's own values, a gradient in few passes, and no fp32 copies kept for it."""

# Shapes: ... any leading shape, H features.

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

Forward = Callable[[Tensor], Tensor]


def is_rms_norm(module: nn.Module) -> bool:
    """True for Transformers' RMSNorms that compute s x / rms(x), s = w or, in Gemma, 1 + w: decided by trying it."""
    return type(module).__name__.endswith("RMSNorm") and _scale_of(module) is not None


def lean_forward(module: nn.Module) -> Forward:
    """A forward for an RMSNorm: y is `module.forward`'s, bit for bit; only what autograd does with it changes.

    y = s x r with r = (mean(x^2) + eps)^-1/2. Backward, with g = s dy:  dx = r (g - x r^2 mean(g x)), in fp32 at least.
    It keeps x alone. Where the weight is to be trained, or no gradient is wanted, it is the module's own forward. Valid
    while the weight stays as it is.
    """
    scale = _scale_of(module)
    assert scale is not None, f"{type(module).__name__} is no RMSNorm"
    return partial(_forward, module, module.forward, scale, eps_of(module))


def fused_forward(module: nn.Module) -> Forward | None:
    """A forward for an RMSNorm of which no gradient is wanted: one kernel on a GPU, where the module's own takes eight,
    rounded once instead of twice. None where s is not the weight itself."""
    weight, scale = module.weight, _scale_of(module)
    assert isinstance(weight, Tensor)
    if scale is None or not torch.equal(scale, weight.to(scale.dtype)):
        return None
    eps, shape = eps_of(module), list(weight.shape)
    return lambda x: functional.rms_norm(x, shape, weight, eps)


def _forward(module: nn.Module, own: Forward, scale_H: Tensor, eps: float, x: Tensor) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.requires_grad or not x.requires_grad or not torch.is_grad_enabled():
        return own(x)
    y: Tensor = _RMSNorm.apply(x, own, scale_H.to(x.device), eps)  # type: ignore[no-untyped-call]  # torch
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Forward, scale_H: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, scale_H)
        ctx.eps = eps
        return own(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        x, scale_H = ctx.saved_tensors
        dtype, width = torch.promote_types(x.dtype, torch.float32), x.shape[-1]
        wide_x = x.to(dtype)
        r = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True).square_().div_(width).add_(ctx.eps).rsqrt_()
        g = dy.to(dtype, copy=True).mul_(scale_H)
        pull = (g * wide_x).sum(dim=-1, keepdim=True).mul_(r.square()).div_(-width)
        return g.addcmul_(wide_x, pull).mul_(r).to(x.dtype), None, None, None


def _scale_of(module: nn.Module) -> Tensor | None:
    """s (H,) in fp32 at least; None if the module computes something else."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not hasattr(module, _eps_name(module)):
        return None
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(4, len(weight), generator=draws).to(weight)
    wide_x = x.to(wide.dtype)
    unit = wide_x * (wide_x.square().mean(dim=-1, keepdim=True) + eps_of(module)).rsqrt()
    with torch.no_grad():
        y = module(x).to(wide.dtype)
    # Four roundings of the model's dtype, relative to each value.
    tolerance = 4 * torch.finfo(weight.dtype).eps
    for scale in (wide, 1 + wide):
        if torch.allclose(y, unit * scale, rtol=tolerance, atol=tolerance):
            return scale
    return None


def _eps_name(module: nn.Module) -> str:
    return "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"


def eps_of(module: nn.Module) -> float:
    """What an RMSNorm adds to the mean of squares."""
    return float(getattr(module, _eps_name(module)))
