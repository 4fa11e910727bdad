"""The differentiable arithmetic: a frozen linear layer plus low-rank updates of some of its rows."""

# Shapes: N rows of one adapter (its tokens), I in features, O out features, R rank; ... any leading shape.

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

Linear: TypeAlias = nn.Linear | Conv1D  # type: ignore[misc, unused-ignore]  # transformers ships no types


@dataclass(frozen=True)
class Update:
    """One adapter's part in one forward. `kept_NI` (bool) marks inputs that dropout let through; None: all."""

    places: slice | Tensor
    a_RI: Tensor
    b_OR: Tensor
    scaling: float
    kept_NI: Tensor | None
    dropout: float


def weight_OI(linear: Linear) -> Tensor:
    """The weight as (O, I), a view; GPT-2's Conv1D stores it transposed."""
    weight: Tensor = linear.weight
    return weight.t() if isinstance(linear, Conv1D) else weight


def updated_linear(x: Tensor, linear: Linear, lead: tuple[int, ...], updates: list[Update]) -> Tensor:
    """y = x W^T + b, then for each update, in place on its rows:  y += s (dropout(x) A^T) B^T.

    Shapes: x (..., I), y (..., O). `lead` is the leading shape of x under which updates index dimension 0. Rows that
    no update indexes hold exactly what `linear(x)` gives.

    Backward, with g = dy of an update's rows, z = dropout(x) of them, h = z A^T and G = s g B:
        dA = G^T z      dB = s g^T h      dx = dy W + dropout(G A)
    The frozen W and b get none. It keeps x once for all updates, h (N, R), and one byte per element that dropout
    looked at; A and B are used in the dtype of x and their gradients come in their own dtype.
    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; the derivatives are the chain rule.
    """
    tensors = [tensor for update in updates for tensor in (update.a_RI, update.b_OR)]
    result: Tensor = _UpdatedLinear.apply(x, linear, lead, updates, *tensors)  # type: ignore[no-untyped-call]  # torch
    return result


class _UpdatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Linear, lead: tuple[int, ...], updates: list[Update],
                *weights: Tensor) -> Tensor:  # fmt: skip
        y: Tensor = linear(x)
        x_lead, y_lead = x.reshape(*lead, x.shape[-1]), y.view(*lead, y.shape[-1])
        low: list[Tensor] = []
        for update in updates:
            z_NI = _dropped(_rows(x_lead, update), update)
            h_NR = z_NI @ _like(update.a_RI, x).t()
            _add(y_lead, update.places, h_NR, _like(update.b_OR, x).t(), update.scaling)
            low.append(h_NR)
        ctx.linear, ctx.lead, ctx.updates = linear, lead, updates
        ctx.save_for_backward(x, *weights, *low)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        updates: list[Update] = ctx.updates
        weights, low = saved[: 2 * len(updates)], saved[2 * len(updates) :]
        dy_lead = dy.contiguous().view(*ctx.lead, dy.shape[-1])
        x_lead = x.reshape(*ctx.lead, x.shape[-1])
        dx = dy @ weight_OI(ctx.linear) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = []
        for i, (update, h_NR) in enumerate(zip(updates, low, strict=True)):
            a_RI, b_OR = weights[2 * i], weights[2 * i + 1]
            g_NO = _rows(dy_lead, update)
            G_NR = (g_NO @ _like(b_OR, x)) * update.scaling
            wants_a, wants_b = ctx.needs_input_grad[4 + 2 * i : 6 + 2 * i]
            z_NI = _dropped(_rows(x_lead, update), update) if wants_a else None
            grads.append((G_NR.t() @ z_NI).to(a_RI) if z_NI is not None else None)
            grads.append(((g_NO.t() @ h_NR) * update.scaling).to(b_OR) if wants_b else None)
            if dx is not None:
                dx_lead = dx.view(*ctx.lead, dx.shape[-1])
                if update.kept_NI is None:
                    _add(dx_lead, update.places, G_NR, _like(a_RI, x), 1.0)
                else:
                    _put(dx_lead, update.places, _dropped(G_NR @ _like(a_RI, x), update))
        return (dx, None, None, None, *grads)


def _rows(values: Tensor, update: Update) -> Tensor:
    return values[update.places].reshape(-1, values.shape[-1])


def _like(weight: Tensor, x: Tensor) -> Tensor:
    return weight.to(device=x.device, dtype=x.dtype)


def _dropped(z_NI: Tensor, update: Update) -> Tensor:
    """Inverted dropout with the mask that was drawn for this forward; its own derivative has the same form."""
    if update.kept_NI is None:
        return z_NI
    return z_NI * update.kept_NI * (1.0 / (1.0 - update.dropout))


def _add(into: Tensor, places: slice | Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """into[places] += scaling * left @ right, in place; one rounding where the places are adjacent."""
    if isinstance(places, slice):
        into[places].view(-1, into.shape[-1]).addmm_(left, right, alpha=scaling)
    else:
        _put(into, places, (left @ right) * scaling)


def _put(into: Tensor, places: slice | Tensor, values: Tensor) -> None:
    if isinstance(places, slice):
        into[places].view(-1, into.shape[-1]).add_(values)
    else:
        into.index_add_(0, places, values.view(-1, *into.shape[1:]))
