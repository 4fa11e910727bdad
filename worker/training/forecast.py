"""What the steps of a job will see, counted before the first of them."""

from dataclasses import dataclass

from shared.specs import TrainSpec
from worker.training.dataset import TokenisedDataset, epoch_order


@dataclass(frozen=True)
class Forecast:
    """Steps, and the tokens and label tokens of all of them. Exact, unless something ends the training early."""

    steps_per_epoch: int
    total_steps: int
    num_tokens: int
    num_label_tokens: int


def forecast(data: TokenisedDataset, spec: TrainSpec) -> Forecast:
    """What the training engine does with this data: batches of an epoch's order, `max_steps` before `n_epochs`."""
    steps_per_epoch = -(-len(data) // spec.batch_size)
    total_steps = spec.max_steps or spec.n_epochs * steps_per_epoch
    whole_epochs, steps_left = divmod(total_steps, steps_per_epoch)
    rest = epoch_order(len(data), seed=spec.seed, epoch=whole_epochs)[: steps_left * spec.batch_size]
    return Forecast(
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        num_tokens=whole_epochs * data.report.num_tokens + sum(map(data.num_tokens, rest)),
        num_label_tokens=whole_epochs * data.report.num_label_tokens + sum(map(data.num_labels, rest)),
    )
