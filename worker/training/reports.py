"""What a job tells of its steps and evaluations, as events of the API's shapes."""

from collections.abc import Mapping

from torch import nn

from shared.specs import StepReport
from worker.training.job import Json, TrainingJob


class Reports:
    """The last step's figures, with those of its evaluation, and the events that tell them."""

    def __init__(self, job: TrainingJob) -> None:
        self._job = job
        self._metrics: dict[str, Json] = {}
        self.last: StepReport | None = None
        """The report of the last finite step; None before the first."""

    @property
    def metrics(self) -> dict[str, Json]:
        """Data of the last step's metrics event; empty before the first."""
        return dict(self._metrics)

    def metrics_of(self, step: int) -> dict[str, Json]:
        """`metrics` if they are this step's; a step that was not finite has none."""
        return self.metrics if self._metrics.get("step") == step else {}

    def stepped(self, report: StepReport) -> None:
        """Note a step; tells nothing yet."""
        self.last = report
        self._metrics = report.model_dump()

    def evaluated(self, loss: float | None, accuracy: float) -> None:
        """Note an evaluation after the last step; `loss` is None if it is not finite, which JSON has no number for."""
        self._metrics |= {"valid_loss": loss, "valid_mean_token_accuracy": accuracy}

    def tell_metrics(self) -> None:
        """The event of the last step."""
        assert self.last is not None
        message = f"Step {self.last.step}/{self.last.total_steps}: training loss={self.last.train_loss:.4f}"
        if "valid_loss" in self._metrics:
            loss = self._metrics["valid_loss"]
            message += f", validation loss={loss:.4f}" if isinstance(loss, float) else ", validation loss not finite"
        self._job.on_event("info", "metrics", message, self.metrics)

    def start(
        self, step: int, total_steps: int, trained: Mapping[str, nn.Parameter], *, num_base_parameters: int
    ) -> None:
        """The event of the start, after `step` steps that earlier attempts made."""
        trainable = sum(parameter.numel() for parameter in trained.values())
        parameters = num_base_parameters + trainable
        message = f"Training starts: {total_steps - step} steps, {trainable:,} of {parameters:,} parameters"
        data: dict[str, Json] = {
            "step": step, "total_steps": total_steps, "trainable_parameters": trainable, "parameters": parameters,
        }  # fmt: skip
        self._job.on_event("info", "message", message, data)

    def best_is_published(self, step: int | None) -> None:
        """The event of an end with an adapter that is not the last."""
        message = f"The adapter of step {step} is published, which had the lowest validation loss"
        self._job.on_event("info", "message", message, {"step": step})

    def parts_are_smaller(self, step: int, num_tokens: int, max_tokens: int) -> None:
        """The warning that `num_tokens` at once were too many for the memory, and that `max_tokens` are the bound."""
        message = (
            f"Out of memory with {num_tokens} tokens at once; from now on at most {max_tokens}, in more parts. The"
            " optimizer step stays the same"
        )
        self._job.on_event("warn", "message", message, {"step": step, "max_tokens": max_tokens})
