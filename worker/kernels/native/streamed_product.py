"""Linear layers of a serving model as compiled products over weights that stream from memory."""

# Shapes: T tokens, I in features, O out features.

from torch import Tensor

from worker.kernels.native.step_kernels import StepKernels
from worker.kernels.packed_linear import PackedProduct
from worker.lora.product import MakeProduct, Product


class StreamedProduct:
    """x W^T + b for a frozen W, of which this keeps a copy in the order in which the kernel reads it.

    Values are those of `functional.linear` within rounding, and the same for a token whatever the others are.
    """

    def __init__(self, kernels: StepKernels, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self.out_features, self.in_features = weight_OI.shape
        self._packed = kernels.pack(weight_OI)
        self._bias_O = None if bias_O is None else bias_O.contiguous()
        self._compute = kernels.product

    @property
    def pointers(self) -> tuple[int, int | None]:
        """Where the packed weight and the bias lie."""
        return self._packed.data_ptr(), None if self._bias_O is None else self._bias_O.data_ptr()

    def __call__(self, x_TI: Tensor, /) -> Tensor:
        return self._compute(x_TI.contiguous(), self._packed, self._bias_O, None)

    def onto(self, x_TI: Tensor, y_TO: Tensor, /) -> Tensor:
        """y + x W^T + b, rounded once."""
        return self._compute(x_TI.contiguous(), self._packed, self._bias_O, y_TO.contiguous())


def packed_by(kernels: StepKernels | None) -> MakeProduct:
    """What makes products over packed weights: the kernel's where it can, else oneDNN's."""

    def make(weight_OI: Tensor, bias_O: Tensor | None) -> Product:
        if kernels is not None and kernels.can_pack(weight_OI):
            return StreamedProduct(kernels, weight_OI, bias_O)
        return PackedProduct(weight_OI, bias_O)

    return make
