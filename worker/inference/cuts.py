"""Which tokens may be drawn, and how likely: temperature, top_k, top_p, min_p, without sorting a vocabulary."""

# Shapes: V vocabulary, G groups of it, K tokens that are kept.

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]
Weights = NDArray[np.float64]

_BLOCK: Final = 256
_COLDEST: Final = 1e-30
"""Colder overflows float32; at this temperature already only equals of the likeliest token are left."""
_MARGIN: Final = 1e-5
"""Relative; more than float32 sums over a vocabulary are off by."""


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """What is drawn from, p = softmax(logits / temperature), after three cuts. The likeliest token always stays.

    top_k: the k likeliest tokens (0: all). Then top_p: the fewest likeliest that together have at least this share of
    what is left (1: all). Then min_p: those at least this many times as likely as the likeliest (0: all).

    Sources: top_p, Holtzman et al. 2020, arXiv:1904.09751, section 3.1; min_p, Nguyen et al. 2024, arXiv:2407.01082.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def draw(self, logits_V: Logits, uniform: float) -> int:
        """A token id, by inverse transform: the first, by id, whose cumulative probability exceeds `uniform` in [0, 1).

        In order of id and not of likelihood, so that rounding which swaps two equals does not change the choice.
        """
        kept = self.kept(logits_V)
        if kept is None:
            return self._draw_uncut(logits_V, uniform)
        ids_K, weights_K = kept
        return int(ids_K[_position(weights_K, uniform)])

    def kept(self, logits_V: Logits) -> tuple[Ids, Weights] | None:
        """The ids that are left, ascending, and weights in proportion to their probabilities; None: nothing is cut."""
        if 0 < self.top_k < len(logits_V):
            ids_K = largest(logits_V, self.top_k)
            weights_K = self._weights(logits_V, ids_K)
            needed = self.top_p * float(weights_K.sum())
        elif self.top_p < 1:
            ids_K, weights_K, needed = self._likeliest(logits_V)
        elif self.min_p > 0:
            peak = float(logits_V.max())
            floor = peak + self.temperature * math.log(self.min_p) - _MARGIN * (1 + abs(peak))
            ids_K = np.flatnonzero(logits_V >= floor)
            weights_K = self._weights(logits_V, ids_K)
        else:
            return None
        if self.top_p < 1:
            fewest_K = _fewest(weights_K, needed)
            ids_K, weights_K = ids_K[fewest_K], weights_K[fewest_K]
        if self.min_p > 0:
            likely_K = weights_K >= self.min_p * weights_K.max()
            ids_K, weights_K = ids_K[likely_K], weights_K[likely_K]
        return ids_K, weights_K

    def _likeliest(self, logits_V: Logits) -> tuple[Ids, Weights, float]:
        """Tokens among which are the likeliest that have top_p of everything, their weights, and how much that is.

        Those with at most (1 - top_p) / V each have at most 1 - top_p together, so the others have enough. Mostly far
        fewer do, which is tried first.
        """
        z_V = self._exponentials(logits_V)
        total = float(z_V.sum())
        for spread in (1024.0, 2.0 * len(z_V)):
            ids_K = np.flatnonzero(z_V > (1 - self.top_p) * total / spread)
            if float(z_V[ids_K].sum(dtype=np.float64)) >= self.top_p * total * (1 + _MARGIN):
                break
        else:
            ids_K = np.flatnonzero(z_V)
        weights_K = self._weights(logits_V, ids_K)
        return ids_K, weights_K, self.top_p * total

    def _draw_uncut(self, logits_V: Logits, uniform: float) -> int:
        """The same draw from all V tokens, by sums of blocks first."""
        z_V = self._exponentials(logits_V)
        sums = np.add.reduceat(z_V, np.arange(0, len(z_V), _BLOCK)).astype(np.float64)
        cumulative = sums.cumsum()
        block = _position(sums, uniform)
        begin = block * _BLOCK
        rest = uniform * cumulative[-1] - (cumulative[block] - sums[block])
        weights = z_V[begin : begin + _BLOCK].astype(np.float64)
        return begin + _position(weights, max(0.0, rest / float(weights.sum())))

    def _exponentials(self, logits_V: Logits) -> Logits:
        """exp((l - max) / temperature), in float32."""
        z_V: Logits = logits_V - logits_V.max()
        if self.temperature != 1:
            z_V *= 1 / max(self.temperature, _COLDEST)
        np.exp(z_V, out=z_V)
        return z_V

    def _weights(self, logits_V: Logits, ids_K: Ids) -> Weights:
        """The same of a few, in float64."""
        below_K = logits_V[ids_K].astype(np.float64) - float(logits_V.max())
        return np.exp(below_K / max(self.temperature, _COLDEST))


def largest(logits_V: Logits, k: int) -> Ids:
    """The ids of the k largest, ascending; of equals, the lower ids. k is at least 1 and below V.

    The k largest of the maxima of G groups of tokens are k tokens, so none of the k largest of all lies below the
    least of them. Two passes that the processor vectorises leave little more than k tokens to sort.
    """
    num_groups = 1024
    if 4 * k > num_groups or len(logits_V) < 4 * num_groups:
        floor = np.partition(logits_V, -k)[-k]
    else:
        deep = len(logits_V) // num_groups
        peaks_G = logits_V[: deep * num_groups].reshape(deep, num_groups).max(axis=0)
        floor = np.partition(peaks_G, -k)[-k]
    ids = np.flatnonzero(logits_V > floor) if floor == -np.inf else np.flatnonzero(logits_V >= floor)
    if len(ids) > k:
        ids = np.sort(ids[np.argsort(-logits_V[ids], kind="stable")[:k]])
    return ids


def _fewest(weights_K: Weights, needed: float) -> NDArray[np.bool_]:
    """Which of the tokens are the fewest heaviest that together have what is needed; of equals, the first."""
    sorted_K = np.sort(weights_K)[::-1]
    # A token stays if those before it do not have enough yet: all up to the first that reaches it.
    count = min(int(np.searchsorted(sorted_K.cumsum(), needed, side="left")) + 1, len(sorted_K))
    least = sorted_K[count - 1]
    stays_K: NDArray[np.bool_] = weights_K > least
    equals = np.flatnonzero(weights_K == least)
    stays_K[equals[: count - np.count_nonzero(stays_K)]] = True
    return stays_K


def _position(weights_K: Weights, uniform: float) -> int:
    """The first place whose cumulative weight exceeds `uniform` times the sum; never one without weight."""
    cumulative_K = weights_K.cumsum()
    at = int(np.searchsorted(cumulative_K, uniform * cumulative_K[-1], side="right"))
    return at if at < len(weights_K) else int(np.flatnonzero(weights_K)[-1])
