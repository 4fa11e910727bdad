"""The compiled kernels as functions of tensors, and the trial that they pass before they are used."""

# Shapes: T tokens, I in features, O out features, H query heads, G key-value heads, D head width, S rows of the cache,
# L positions of a row, N = S L places of a layer's cache.

import ctypes
import logging
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from worker.kernels.native.compiler import CannotCompile, compile_kernels
from worker.lora.update_table import UpdateTable

log = logging.getLogger("lorad.inference")

LANES: Final = 16
"""Widths of heads are whole numbers of vectors of so many elements."""
BLOCK: Final = 32
"""Out features that a product computes together."""
MOST_WIDTH: Final = 256
MOST_QUERIES: Final = 32
"""Of one head, and query heads of one key-value head: what `attention.c` has room for."""

_POINTER, _SIZE, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES: Final = {
    "attend": [_POINTER, _SIZE] + [_POINTER] * 5 + [_SIZE] * 4 + [_FLOAT, _INT],
    "add_updates": [_POINTER] * 3 + [_SIZE] + [_POINTER] * 2 + [_SIZE] * 3 + [_INT],
    "product": [_POINTER] * 5 + [_SIZE] * 3 + [_INT],
    "layer": [_POINTER] * 6 + [_SIZE] * 2,
}


@cache
def step_kernels(dtype: torch.dtype) -> "StepKernels | None":
    """The kernels for elements of `dtype` on this machine's CPU; None, and a line in the log that says why, where there
    is no C compiler, no team of threads to share with torch, or a kernel that fails its trial. Made once a process."""
    if dtype not in (torch.bfloat16, torch.float32):
        return None
    parallel = _parallel()
    if parallel is None:
        log.info("torch computes everything: this build of it has no threads that compiled kernels could share")
        return None
    try:
        with tempfile.TemporaryDirectory(prefix="lorad-") as directory:
            kernels = StepKernels(compile_kernels(Path(directory), bfloat16=dtype == torch.bfloat16), dtype, parallel)
    except (CannotCompile, OSError) as error:
        log.info("torch computes everything, which is slower: %s", error)
        return None
    # Late, since the trial is made of kernels.
    from worker.kernels.native.trial import failures

    if failed := failures(kernels):
        log.warning("torch computes everything, since compiled kernels are wrong here: %s", ", ".join(failed))
        return None
    log.info("compiled kernels for %s", dtype)
    return kernels


class StepKernels:
    """Functions of contiguous tensors of one dtype on the CPU.

    Each forms its sums in float32 and rounds once; what a token gets does not depend on the tokens beside it. They use
    as many of torch's threads as torch does.
    """

    def __init__(self, library: Path, dtype: torch.dtype, parallel: Any) -> None:
        self.dtype = dtype
        functions = ctypes.CDLL(str(library))
        for name, arguments in _SIGNATURES.items():
            getattr(functions, name).argtypes = arguments
            getattr(functions, name).restype = None
        functions.start(ctypes.cast(parallel, _POINTER))
        self._attend, self._add_updates = functions.attend, functions.add_updates
        self._product = functions.product
        self.layer = functions.layer
        """See `layer.c`, and `DecoderLayer`, which calls it."""

    def attends(self, num_queries: int, num_groups: int, width: int) -> bool:
        """True if `attend` takes heads like these."""
        return width % LANES == 0 and width <= MOST_WIDTH and num_queries <= MOST_QUERIES * num_groups

    def suit(self, query_1HTD: Tensor, keys_SGLD: Tensor, values_SGLD: Tensor) -> bool:
        """True if `attend` takes these, as they lie."""
        width = query_1HTD.shape[3]
        return (
            self.attends(query_1HTD.shape[1], keys_SGLD.shape[1], width)
            and query_1HTD.stride(1) == width
            and query_1HTD.stride(3) == 1
            and values_SGLD.shape[3] == width
            and query_1HTD.dtype == keys_SGLD.dtype == values_SGLD.dtype == self.dtype
        )

    def attend(self, query_THD: Tensor, keys_SGLD: Tensor, values_SGLD: Tensor, first_T: Tensor, count_T: Tensor,
               scaling: float) -> Tensor:  # fmt: skip
        """softmax(scaling q k^T) v (T, H, D) of each token, over `count` places of the cache from `first` on.

        The heads of a token's query follow each other. Keys and values are views of (N, G, D), N = S L.
        """
        num_tokens, num_queries, width = query_THD.shape
        groups = keys_SGLD.shape[1]
        assert keys_SGLD.stride() == values_SGLD.stride()
        assert keys_SGLD.stride()[1:] == (width, groups * width, 1)
        y_THD = torch.empty_like(query_THD, memory_format=torch.contiguous_format)
        self._attend(
            query_THD.data_ptr(), query_THD.stride(0), keys_SGLD.data_ptr(), values_SGLD.data_ptr(), first_T.data_ptr(),
            count_T.data_ptr(), y_THD.data_ptr(), num_tokens, num_queries, groups, width, scaling,
            torch.get_num_threads(),
        )  # fmt: skip
        return y_THD

    def add_updates(self, table: UpdateTable, layer: int, x_TI: Tensor, y_TO: Tensor) -> None:
        """y += w (x A^T) B of each token's own adapters at that layer, in place; other tokens stay as they are."""
        x_TI = x_TI.contiguous()
        self._check(x_TI, y_TO)
        assert table.num_tokens <= x_TI.shape[0] == y_TO.shape[0]
        self._add_updates(
            x_TI.data_ptr(), y_TO.data_ptr(), table.pieces_at, table.num_pieces, table.shares_at, table.members_at,
            layer, x_TI.shape[1], y_TO.shape[1], torch.get_num_threads(),
        )  # fmt: skip

    def can_pack(self, weight_OI: Tensor) -> bool:
        """True if `product` takes this weight."""
        out_features, in_features = weight_OI.shape
        return weight_OI.dtype == self.dtype and out_features % BLOCK == 0 and in_features % 2 == 0

    def pack(self, weight_OI: Tensor) -> Tensor:
        """W in the order in which `product` reads it: (O / 32, I / 2, 32, 2) in bfloat16, else (O / 32, I, 32)."""
        out_features, in_features = weight_OI.shape
        together = 2 if self.dtype == torch.bfloat16 else 1
        blocks = weight_OI.reshape(out_features // BLOCK, BLOCK, in_features // together, together)
        return blocks.transpose(1, 2).contiguous()

    def product(self, x_TI: Tensor, packed: Tensor, bias_O: Tensor | None, onto_TO: Tensor | None) -> Tensor:
        """x W^T + b (T, O), added to `onto` if that is given. `packed` is W as `pack` lays it out."""
        self._check(x_TI, packed, *(x for x in (bias_O, onto_TO) if x is not None))
        num_tokens, in_features = x_TI.shape
        out_features = packed.numel() // in_features
        y_TO = x_TI.new_empty(num_tokens, out_features)
        assert bias_O is None or bias_O.shape == (out_features,)
        assert onto_TO is None or onto_TO.shape == y_TO.shape
        self._product(
            x_TI.data_ptr(), packed.data_ptr(), None if bias_O is None else bias_O.data_ptr(),
            None if onto_TO is None else onto_TO.data_ptr(), y_TO.data_ptr(), num_tokens, in_features, out_features,
            torch.get_num_threads(),
        )  # fmt: skip
        return y_TO

    def _check(self, *tensors: Tensor) -> None:
        """C reads and writes what it is pointed to."""
        for tensor in tensors:
            assert tensor.dtype == self.dtype
            assert tensor.is_contiguous()


def _parallel() -> Any:
    """GOMP_parallel of the OpenMP library that torch has loaded; None where there is none to be found."""
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in mapped if "omp" in line.rpartition("/")[2]}
    own = str(Path(torch.__file__).parent)  # other packages may have brought another one
    for path in sorted(paths, key=lambda path: (not path.startswith(own), path)):
        try:
            found = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
        except OSError:
            continue  # no library, whatever its name says
        if found is not None:
            return found
    return None
