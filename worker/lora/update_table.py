"""Which adapters' matrices each token of a step meets at one kind of site, as arrays for a compiled kernel."""

# Shapes: N layers of one kind of site, M members of a site, I in features, O out features of one member, r rank.

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from worker.lora.stack import Part

TOKENS_AT_ONCE: Final = 4
"""Tokens of one run that a kernel takes together."""
MOST_RANK: Final = 256
MOST_FEATURES: Final = 16384
"""Of one adapter, and in: what the kernel has room for."""
LANES: Final = 16
"""Features are whole numbers of vectors of so many."""
_SHARE: Final = np.dtype(
    [("a", "i8"), ("rank", "i8"), ("member", "i8"), ("members", "i8"), ("weight", "f8")]
)  # as struct share_of in updates.c

Own = tuple[tuple[Part, float], ...]
"""What the adapters of a run have at this kind of site, and their weights."""


class UpdateKernel(Protocol):
    """Adds what a table says to y, in place, at one layer."""

    def __call__(self, table: "UpdateTable", layer: int, x_TI: Tensor, y_TO: Tensor, /) -> None: ...


@dataclass(frozen=True)
class UpdateTable:
    """The arrays, and where they lie; right as long as the parts are."""

    num_tokens: int
    """All tokens that it speaks of are before this one."""
    num_pieces: int
    pieces_at: int
    shares_at: int
    members_at: int
    _kept: tuple[Any, ...]

    @classmethod
    def of(cls, runs: Sequence[tuple[int, int, Own]], sizes: Sequence[int]) -> "UpdateTable":
        """From runs (first token, number of tokens, parts) and the out features of every member of the site."""
        columns = list(accumulate(sizes, initial=0))
        pieces: list[NDArray[np.int64]] = []
        shares: list[tuple[int, int, int, int, float]] = []
        members: list[tuple[int, int, int]] = []
        seen: dict[int, tuple[int, int]] = {}
        for first, num_tokens, own in runs:
            if id(own) not in seen:
                seen[id(own)] = (len(shares), len(own))
                for part, weight in own:
                    shares.append((part.a_NMI.data_ptr(), part.rank, len(members), len(part.members), weight))
                    members += [
                        (b_NrO.data_ptr(), columns[member], sizes[member])
                        for member, b_NrO in zip(part.members, part.b_NrO, strict=True)
                    ]
            starts = np.arange(first, first + num_tokens, TOKENS_AT_ONCE, dtype=np.int64)
            lengths = np.minimum(first + num_tokens - starts, TOKENS_AT_ONCE)
            own_shares = np.broadcast_to(np.array(seen[id(own)], dtype=np.int64), (len(starts), 2))
            pieces.append(np.column_stack((starts, lengths, own_shares)))
        all_pieces = np.ascontiguousarray(np.concatenate(pieces))
        all_shares, all_members = np.array(shares, dtype=_SHARE), np.array(members, dtype=np.int64)
        return cls(
            num_tokens=max(first + num_tokens for first, num_tokens, _ in runs),
            num_pieces=len(all_pieces),
            pieces_at=all_pieces.ctypes.data,
            shares_at=all_shares.ctypes.data,
            members_at=all_members.ctypes.data,
            _kept=(all_pieces, all_shares, all_members, [own for _, _, own in runs]),
        )


def can_tabulate(part: Part) -> bool:
    """True if a kernel has room for this part of an adapter."""
    widths = [part.a_NMI.shape[-1], *(b_NrO.shape[-1] for b_NrO in part.b_NrO)]
    return part.rank <= MOST_RANK and widths[0] <= MOST_FEATURES and not any(width % LANES for width in widths)
