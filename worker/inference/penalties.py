"""Penalties: how tokens that a sequence has already change what it gets next."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Penalties:
    """Changes one sequence's logits l, before temperature and cuts, by what it holds so far.

    repetition r, over the tokens of prompt and answer, each once:  l <- l / r where l > 0, else l r
    frequency f and presence p, over the answer alone:              l <- l - f count - p [count > 0]
    in this order; 1, 0 and 0 change nothing. Sources: Keskar et al. 2019 (CTRL), arXiv:1909.05858, section 4.1, with
    the product for negative logits that makes it a penalty there too; OpenAI's API reference for the other two.
    """

    def __init__(self, prompt_ids: Sequence[int], *, repetition: float, frequency: float, presence: float) -> None:
        self._repetition, self._frequency, self._presence = repetition, frequency, presence
        in_prompt = np.unique(np.asarray(prompt_ids, dtype=np.int64)) if repetition != 1 else np.empty(0, np.int64)
        self._slots = {int(token_id): slot for slot, token_id in enumerate(in_prompt)}
        self._used = len(in_prompt)
        self._ids = np.concatenate([in_prompt, np.zeros(64, np.int64)])
        self._counts = np.zeros(len(self._ids), np.float32)

    @property
    def are_neutral(self) -> bool:
        return (self._repetition, self._frequency, self._presence) == (1, 0, 0)

    def add(self, token_id: int) -> None:
        """The answer has got this token."""
        if (slot := self._slots.get(token_id)) is None:
            if self._used == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            slot = self._slots[token_id] = self._used
            self._ids[slot] = token_id
            self._used += 1
        self._counts[slot] += 1

    def apply(self, logits_V: NDArray[np.float32]) -> None:
        """Change the logits in place."""
        ids, counts = self._ids[: self._used], self._counts[: self._used]
        seen = logits_V[ids]
        if self._repetition != 1:
            seen = np.where(seen > 0, seen / self._repetition, seen * self._repetition)
        logits_V[ids] = seen - self._frequency * counts - self._presence * (counts > 0)
