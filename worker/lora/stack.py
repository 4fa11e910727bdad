"""The tensors of served adapters: one adapter's over all layers of a kind, and many adapters' side by side."""

# Shapes: N layers, M members of a site, I in features, O out features of one member, R columns, r rank of one adapter,
# B tokens.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor

from worker.lora.product import MakeProduct, PlainProduct, Product

MOST_ON_DIAGONAL: Final = 160
"""Columns of all members together up to which zeros beside the diagonal cost less than another product."""
PACK_AFTER: Final = 8
"""Steps without a new adapter after which products that keep their matrix as the processor likes it are made: that
takes about as long as they save in so many."""


@dataclass(frozen=True)
class Part:
    """One adapter at all N layers of one kind of site: A (N, M r, I) of its members, and s B^T (N, r, O) of each.

    Layers and members that the adapter lacks, and the columns that a smaller rank leaves, are zero.
    """

    members: tuple[int, ...]
    rank: int
    a_NMI: Tensor
    b_NrO: tuple[Tensor, ...]

    @classmethod
    def of(cls, tensors: Mapping[tuple[int, int], tuple[Tensor, Tensor, float]], *, num_layers: int,
           dtype: torch.dtype, device: torch.device) -> "Part":  # fmt: skip
        """From (layer, member) -> (A (r, I), B (O, r), s)."""
        members = tuple(sorted({member for _, member in tensors}))
        rank = max(len(a_rI) for a_rI, _, _ in tensors.values())
        in_features = next(iter(tensors.values()))[0].shape[1]
        sizes = {member: len(b_Or) for (_, member), (_, b_Or, _) in tensors.items()}
        a_NMrI = torch.zeros(num_layers, len(members), rank, in_features, dtype=dtype)
        b_NrO = tuple(torch.zeros(num_layers, rank, sizes[member], dtype=dtype) for member in members)
        # Layers that are alike go at once: one by one, the calls would take longer than the work.
        alike: dict[tuple[int, int], list[int]] = {}
        for (layer, member), (a_rI, _, _) in sorted(tensors.items(), key=lambda item: item[0]):
            alike.setdefault((member, len(a_rI)), []).append(layer)
        for (member, own_rank), layers in alike.items():
            i = members.index(member)
            at = slice(None) if len(layers) == num_layers else torch.tensor(layers)
            halves = [tensors[layer, member] for layer in layers]
            a_NMrI[at, i, :own_rank] = torch.stack([a_rI for a_rI, _, _ in halves]).to(dtype)
            scaling_N11 = torch.tensor([scaling for _, _, scaling in halves])[:, None, None]
            b_NOr = torch.stack([b_Or for _, b_Or, _ in halves]).mul_(scaling_N11).to(dtype)
            b_NrO[i][at, :own_rank] = b_NOr.transpose(1, 2)
        return cls(members, rank, a_NMrI.flatten(1, 2).to(device), tuple(half.to(device) for half in b_NrO))

    @property
    def size_bytes(self) -> int:
        return self.a_NMI.nbytes + sum(half.nbytes for half in self.b_NrO)

    @property
    def is_finite(self) -> bool:
        return all(torch.stack(torch.aminmax(half)).isfinite().all() for half in (self.a_NMI, *self.b_NrO))

    def add(self, layer: int, x_TI: Tensor, y_TO: Tensor, sizes: tuple[int, ...], *, places: slice | Tensor,
            weight: float) -> None:  # fmt: skip
        """y[places] += weight s (x[places] A^T) B^T, for each member on its part of y, in place."""
        low = x_TI[places] @ self.a_NMI[layer].t()
        for i, (member, b_NrO) in enumerate(zip(self.members, self.b_NrO, strict=True)):
            low_r = low[:, i * self.rank : (i + 1) * self.rank]
            columns = _columns(member, sizes)
            if isinstance(places, slice):
                y_TO[places, columns].addmm_(low_r, b_NrO[layer], alpha=weight)
            else:
                y_TO[:, columns].index_add_(0, places, low_r @ b_NrO[layer], alpha=weight)


class Stack:
    """Columns for many adapters at all N layers of one kind of site: A (N, M, R, I) and s B^T of each member.

    B is kept as one matrix (N, M R, O of the whole site) with the members' blocks on its diagonal as long as that is
    small: one product more costs more than the zeros. Else there is one (N, R, O) for each member.
    """

    def __init__(self, members: Sequence[int], sizes: tuple[int, ...], *, num_layers: int, in_features: int,
                 num_columns: int, dtype: torch.dtype, device: torch.device, product: MakeProduct) -> None:  # fmt: skip
        """`sizes`: the out features of every member of the site, of which `members` have updates."""
        self.members = tuple(members)
        self._num_columns = num_columns
        self._on_gpu = device.type != "cpu"
        self._make_product = product
        shape = (len(members), num_columns)
        self._a = torch.zeros(num_layers, *shape, in_features, dtype=dtype, device=device)
        columns = {member: _columns(member, sizes) for member in members}
        self._is_joint = len(members) > 1 and len(members) * num_columns <= MOST_ON_DIAGONAL
        if self._is_joint:
            whole = torch.zeros(num_layers, *shape, sum(sizes), dtype=dtype, device=device)
            self._b = {member: whole[:, i, :, columns[member]] for i, member in enumerate(members)}
            self._b_layers = [[(slice(None), slice(None), b.flatten(0, 1))] for b in whole]
            self.size_bytes = self._a.nbytes + whole.nbytes
        else:
            self._b = {
                member: torch.zeros(num_layers, num_columns, sizes[member], dtype=dtype, device=device)
                for member in members
            }
            self._b_layers = [
                [
                    (slice(i * num_columns, (i + 1) * num_columns), columns[member], self._b[member][layer])
                    for i, member in enumerate(members)
                ]
                for layer in range(num_layers)
            ]
            self.size_bytes = self._a.nbytes + sum(b.nbytes for b in self._b.values())
        self._plain = self._products_by(PlainProduct)
        self._products = self._plain
        self._num_steps = 0

    def put(self, columns: slice, part: Part | None) -> None:
        """Write an adapter into columns, as wide as its widest part; None if it does nothing here."""
        self._products, self._num_steps = self._plain, 0
        self._a[:, :, columns].zero_()
        if part is None:
            return
        own = slice(columns.start, columns.start + part.rank)
        a = part.a_NMI.view(len(part.a_NMI), len(part.members), part.rank, -1)
        for i, member in enumerate(part.members):
            self._a[:, self.members.index(member), own] = a[:, i]
            self._b[member][:, own] = part.b_NrO[i]

    def add(self, layer: int, x_BI: Tensor, y_BO: Tensor, hidden_B1R: Tensor, weights_B1R: Tensor | None) -> None:
        """y += weights * (x A^T) B^T with what is hidden set to zero, in place.

        Zeroed, not multiplied by zero: an adapter whose x A^T overflows must not reach another row as NaN.
        """
        if layer == 0:
            self._num_steps += 1
            if self._num_steps == PACK_AFTER and not self._on_gpu and self._make_product is not PlainProduct:
                self._products = self._products_by(self._make_product)
        low_product, high_products = self._products[layer]
        low_BMR = low_product(x_BI)
        each_BMR = low_BMR.view(x_BI.shape[0], -1, self._num_columns)
        each_BMR.masked_fill_(hidden_B1R, 0)
        if weights_B1R is not None:
            each_BMR *= weights_B1R
        if self._on_gpu:  # where starting a kernel is what costs
            for columns, out, b in self._b_layers[layer]:
                y_BO[:, out].addmm_(low_BMR[:, columns], b)
            return
        if self._is_joint:
            y_BO.add_(high_products[0](low_BMR))
            return
        for (columns, out, _), high_product in zip(self._b_layers[layer], high_products, strict=True):
            y_BO[:, out].add_(high_product(low_BMR[:, columns]))

    def _products_by(self, make: MakeProduct) -> list[tuple[Product, list[Product]]]:
        """Of each layer: x -> x A^T, and low -> low (s B^T) for each place in y."""
        return [
            (make(a.flatten(0, 1), None), [make(b.t(), None) for _, _, b in b_layer])
            for a, b_layer in zip(self._a, self._b_layers, strict=True)
        ]


@dataclass
class Columns:
    """Which columns of the stacks belong to which adapter."""

    capacity: int = 0
    of: dict[str, slice] = field(default_factory=dict)

    def gap(self, width: int) -> int | None:
        """Where `width` free columns begin."""
        start = 0
        for taken in sorted(self.of.values(), key=lambda columns: columns.start):
            if taken.start - start >= width:
                return start
            start = taken.stop
        return start if self.capacity - start >= width else None


@cache
def _columns(member: int, sizes: tuple[int, ...]) -> slice:
    """The part of a site's output that is one member's; kept, since every layer of every step asks."""
    ends = list(accumulate(sizes, initial=0))
    return slice(ends[member], ends[member + 1])
