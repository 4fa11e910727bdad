"""Products with a matrix that stays as it is, as torch computes them or as something faster does."""

# Shapes: T tokens, I in features, O out features.

from collections.abc import Callable
from typing import Protocol

from torch import Tensor
from torch.nn import functional


class Product(Protocol):
    """x W^T + b for a W that stays as it is, and the same added to something."""

    def __call__(self, x_TI: Tensor, /) -> Tensor:
        """(T, O)."""

    def onto(self, x_TI: Tensor, y_TO: Tensor, /) -> Tensor:
        """y + x W^T + b (T, O), a new tensor."""


MakeProduct = Callable[[Tensor, Tensor | None], Product]
"""From W (O, I) and b (O,)."""


class PlainProduct:
    """torch's own product."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._weight_OI, self._bias_O = weight_OI, bias_O

    def __call__(self, x_TI: Tensor, /) -> Tensor:
        return functional.linear(x_TI, self._weight_OI, self._bias_O)

    def onto(self, x_TI: Tensor, y_TO: Tensor, /) -> Tensor:
        return functional.linear(x_TI, self._weight_OI, self._bias_O).add_(y_TO)
