"""When a job is evaluated, and how far the evaluation under way is."""

from collections.abc import Sequence

from shared.specs import TrainSpec
from worker.training.dataset import TokenisedDataset
from worker.training.loss import Score


class Evaluation:
    """Validation loss and token accuracy of one job, a part of its validation data at a time; no logits are kept."""

    def __init__(self, data: TokenisedDataset | None, spec: TrainSpec) -> None:
        self.data = data
        self.waiting: list[int] = []
        """Samples of the evaluation under way that are still to be judged, in order."""
        self._every = spec.eval_every
        self._total = Score(0.0, 0, 0)

    @property
    def is_under_way(self) -> bool:
        return bool(self.waiting)

    def is_due(self, step: int, steps_per_epoch: int, *, is_last: bool) -> bool:
        """After every `eval_every` steps, or every epoch without that, and after the last step."""
        return self.data is not None and (is_last or step % (self._every or steps_per_epoch) == 0)

    def begin(self) -> None:
        """Start from the first validation sample."""
        assert self.data is not None
        self.waiting = list(range(len(self.data)))
        self._total = Score(0.0, 0, 0)

    def add(self, indices: Sequence[int], found: Score) -> None:
        """Count the score of the samples that are next."""
        assert list(indices) == self.waiting[: len(indices)]
        del self.waiting[: len(indices)]
        self._total += found

    def end(self) -> tuple[float, float]:
        """(nats per label token, share of label tokens ranked first) over all the data."""
        return self._total.loss / self._total.num_labels, self._total.num_correct / self._total.num_labels
