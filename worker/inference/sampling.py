"""The next token of every row that is being generated."""

# Shapes: B rows, V vocabulary.

import hashlib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import LoradError
from worker.inference import logprobs
from worker.inference.cuts import Cuts
from worker.inference.penalties import Penalties


@dataclass(frozen=True, slots=True)
class Chosen:
    """A row's next token, and where that was asked for its `logprob` and the `top` (token id, logprob)s, in order."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Constraint(Protocol):
    """Says which tokens may come next in one sequence."""

    def mask(self, logits_V: NDArray[np.float32]) -> None:
        """Put -inf in the place of every token that may not come next."""

    def add(self, token_id: int) -> None:
        """The sequence has got this token, which `mask` allowed."""

    @property
    def is_complete(self) -> bool:
        """True if the sequence is whole and nothing may follow."""


class Sampler:
    """How one sequence chooses: penalties, then the constraint, then the likeliest at temperature 0 or else by chance.

    Draw number t is a function of the seed and t alone, so nothing that happens to other rows changes it. `seed` None
    draws one. `num_top` None asks for no log-probabilities.
    """

    def __init__(
        self,
        cuts: Cuts,
        *,
        seed: int | None = None,
        penalties: Penalties | None = None,
        constraint: Constraint | None = None,
        num_top: int | None = None,
    ) -> None:
        self.cuts = cuts
        self.num_top = num_top
        self._penalties = None if penalties is None or penalties.are_neutral else penalties
        self._constraint = constraint
        self._seed = secrets.randbits(64) if seed is None else seed
        self._num_draws = 0

    @property
    def takes_the_likeliest(self) -> bool:
        """True if nothing but the row's largest logit has to be known."""
        return (
            self.cuts.temperature == 0 and self.num_top is None and self._penalties is None and self._constraint is None
        )

    def choose(self, logits_V: NDArray[np.float32], likeliest: int) -> Chosen:
        """The next token, given the id of the largest logit; the logits are left alone."""
        changed_V = logits_V
        if self._penalties is not None or self._constraint is not None:
            changed_V = logits_V.copy()
            if self._penalties is not None:
                self._penalties.apply(changed_V)
            if self._constraint is not None:
                self._constraint.mask(changed_V)
            likeliest = int(changed_V.argmax())
            if not math.isfinite(changed_V[likeliest]):
                raise LoradError("no token is left to choose", code="internal_error")
        token_id = likeliest if self.cuts.temperature == 0 else self.cuts.draw(changed_V, self._uniform())
        if self.num_top is None:
            return Chosen(token_id)
        return Chosen(token_id, *logprobs.of_row(logits_V, token_id, self.num_top))

    def add(self, token_id: int) -> None:
        """The sequence has got this token."""
        if self._penalties is not None:
            self._penalties.add(token_id)
        if self._constraint is not None:
            self._constraint.add(token_id)

    @property
    def is_complete(self) -> bool:
        """True if the constraint says that the sequence is whole and nothing may follow."""
        return self._constraint is not None and self._constraint.is_complete

    def _uniform(self) -> float:
        """The next number in [0, 1): the upper 53 bits of a hash."""
        digest = hashlib.blake2b(f"{self._seed} {self._num_draws}".encode(), digest_size=8).digest()
        self._num_draws += 1
        return (int.from_bytes(digest) >> 11) * 2.0**-53


class _Samples(Protocol):
    @property
    def sampler(self) -> Sampler: ...


def choose_all(logits_BV: Tensor, choices: Sequence[_Samples]) -> list[Chosen | Exception | None]:
    """Each row's next token, whatever its neighbours are.

    None for a row whose logits are not finite (a NaN, +inf, or nothing above -inf); where choosing raised, the
    exception. The logits, float32 or bfloat16 on any device, are left alone.
    """
    if logits_BV.device.type == "cpu":
        logits_np = logits_BV.to(torch.float32).numpy()
        likeliest_B = logits_np.argmax(axis=1)  # a NaN counts as the largest
        peaks_B = logits_np[np.arange(len(choices)), likeliest_B]
        rows = dict(enumerate(logits_np))
    else:
        best = logits_BV.max(dim=-1)
        both_2B = torch.stack([best.values.double(), best.indices.double()]).cpu()  # at once: each copy waits
        peaks_B, likeliest_B = both_2B[0].numpy(), both_2B[1].long().numpy()
        rows = _fetch(logits_BV, [k for k, choice in enumerate(choices) if not choice.sampler.takes_the_likeliest])
    usable_B = np.isfinite(peaks_B).tolist()
    likeliest = likeliest_B.tolist()
    chosen: list[Chosen | Exception | None] = []
    for k, choice in enumerate(choices):
        if not usable_B[k]:
            chosen.append(None)
        elif choice.sampler.takes_the_likeliest:
            chosen.append(Chosen(likeliest[k]))
        else:
            try:
                chosen.append(choice.sampler.choose(rows[k], likeliest[k]))
            except Exception as error:
                chosen.append(error)
    return chosen


def _fetch(logits_BV: Tensor, which: list[int]) -> dict[int, NDArray[np.float32]]:
    """Rows of logits on another device, as float32 here."""
    if not which:
        return {}
    fetched = logits_BV[which].cpu().to(torch.float32).numpy()
    return dict(zip(which, fetched, strict=True))
