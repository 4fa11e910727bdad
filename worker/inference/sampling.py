"""One request's choice of the next token."""

# Shapes: B rows, V vocabulary, K candidates.

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose: at temperature 0 the likeliest token, else by chance.

    By chance means p = softmax(logits / temperature), cut to the `top_k` likeliest tokens (0: all), then to the fewest
    likeliest that together have at least `top_p` of what is left (1: all). `seed` None draws one.
    Source of top_p: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None


class Sampler:
    """Draws tokens for one request from a random stream of its own: one number per token, whoever else is served."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._draws = torch.Generator()
        if sampling.seed is None:
            self._draws.seed()
        else:
            self._draws.manual_seed(sampling.seed % (1 << 63))

    def choose(self, logits_V: Tensor) -> int:
        """A token id, by inverse transform: the first whose cumulative probability exceeds a uniform draw.

        Computed in float64 on the CPU, so that the rounding of another batch shape all but never changes the choice.
        """
        if self.sampling.temperature == 0:
            return int(logits_V.argmax())
        p_V = self.probabilities(logits_V)
        cumulative_V = p_V.cumsum(0)
        draw = torch.rand((), dtype=torch.float64, generator=self._draws) * cumulative_V[-1]
        chosen = int(torch.searchsorted(cumulative_V, draw, right=True))
        return min(chosen, int(p_V.nonzero()[-1]))

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """What `choose` draws from at a temperature above 0: (V,), float64 on the CPU, 0 where cut off."""
        above_V = logits_V.to("cpu", torch.float64)
        p_V = torch.softmax((above_V - above_V.max()) / self.sampling.temperature, dim=0)
        if 0 < self.sampling.top_k < len(p_V):
            kept_K = p_V.topk(self.sampling.top_k).indices
            p_V = torch.zeros_like(p_V).index_copy_(0, kept_K, p_V[kept_K])
            p_V /= p_V.sum()
        if self.sampling.top_p < 1:
            sorted_V, order_V = p_V.sort(descending=True, stable=True)
            # A token stays if those before it do not have top_p yet; the first always does.
            kept_V = sorted_V.cumsum(0) - sorted_V < self.sampling.top_p
            p_V = p_V.index_fill(0, order_V[~kept_V], 0.0)
            p_V /= p_V.sum()
        return p_V


def choose_all(logits_BV: Tensor, samplers: Sequence[Sampler]) -> list[int | None]:
    """Each row's next token; None for a row whose logits are not finite numbers, which then has no next token."""
    best_B = logits_BV.max(dim=-1)
    highest, greedy = best_B.values.tolist(), best_B.indices.tolist()
    chosen: list[int | None] = []
    for row, sampler in enumerate(samplers):
        if not math.isfinite(highest[row]):
            chosen.append(None)
        elif sampler.sampling.temperature == 0:
            chosen.append(greedy[row])
        else:
            chosen.append(sampler.choose(logits_BV[row]))
    return chosen
