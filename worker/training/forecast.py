"""What the steps of a job will see, counted before the first of them."""

from dataclasses import dataclass

from shared import limits
from shared.specs import TrainSpec
from worker.training.dataset import TokenisedDataset, epoch_order


@dataclass(frozen=True)
class Forecast:
    """Steps, and the tokens and label tokens of all of them. Exact, unless something ends the training early."""

    steps_per_epoch: int
    total_steps: int
    num_tokens: int
    num_label_tokens: int


def num_steps(data: TokenisedDataset, spec: TrainSpec) -> tuple[int, int]:
    """(steps of one epoch, the last of which may have fewer samples; steps in all).

    In all: `max_steps`, or those of `n_epochs`, of which there are at most limits.MAX_STEPS.
    """
    steps_per_epoch = -(-len(data) // spec.batch_size)
    return steps_per_epoch, spec.max_steps or min(spec.n_epochs * steps_per_epoch, limits.MAX_STEPS)


def forecast(data: TokenisedDataset, spec: TrainSpec) -> Forecast:
    """What the training engine does with this data, batch by batch in each epoch's order."""
    steps_per_epoch, total_steps = num_steps(data, spec)
    whole_epochs, steps_left = divmod(total_steps, steps_per_epoch)
    rest = epoch_order(len(data), seed=spec.seed, epoch=whole_epochs)[: steps_left * spec.batch_size]
    return Forecast(
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        num_tokens=whole_epochs * data.report.num_tokens + sum(map(data.num_tokens, rest)),
        num_label_tokens=whole_epochs * data.report.num_label_tokens + sum(map(data.num_labels, rest)),
    )
