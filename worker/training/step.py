"""One optimizer step under way: which samples it sees, which of them are still to come, what the others have given."""

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.training.dataset import TokenisedDataset
from worker.training.stream import Gained, Part


class Step:
    """A step over `batch`, in parts of whatever size; their gradients add up, each label token weighing the same."""

    def __init__(self, data: TokenisedDataset, batch: Sequence[int]) -> None:
        self._data = data
        self._batch = list(batch)
        self._taken = 0
        self.num_labels = sum(map(data.num_labels, batch))
        self.num_tokens = sum(map(data.num_tokens, batch))
        self.seconds = 0.0
        """Time of the forward and backward passes that it had a part in."""
        self.gradients: list[Tensor] = []
        self.loss: Tensor | None = None
        """Mean over the label tokens, in nats, so far as the parts have come."""

    @property
    def has_begun(self) -> bool:
        return self._taken > 0

    @property
    def is_whole(self) -> bool:
        return self._taken == len(self._batch)

    def next_samples(self, max_tokens: int) -> tuple[list[int], range]:
        """The next samples that fit, and their places in the batch."""
        found = leading(self._batch[self._taken :], self._data, max_tokens)
        return found, range(self._taken, self._taken + len(found))

    def absorb(self, part: Part, gained: Gained, seconds: float) -> None:
        """Add what the samples that were next gave."""
        assert list(part.indices) == self._batch[self._taken : self._taken + len(part.indices)]
        self._taken += len(part.indices)
        self.seconds += seconds
        if self.loss is None:
            self.gradients, self.loss = list(gained.gradients), gained.loss
        else:
            torch._foreach_add_(self.gradients, list(gained.gradients))
            self.loss = self.loss + gained.loss


def leading(waiting: Sequence[int], data: TokenisedDataset, max_tokens: int) -> list[int]:
    """The first of `waiting` that together have at most `max_tokens` tokens; a longer one goes alone."""
    found: list[int] = []
    room = max_tokens
    for index in waiting:
        room -= data.num_tokens(index)
        if found and room < 0:
            break
        found.append(index)
    return found
