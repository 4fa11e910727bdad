"""One job in the engine: its data, adapter, optimizer and position. What happens between two steps is the engine's."""

# Shapes: T tokens of a packed stream, N label positions in it, H hidden width.

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from shared.errors import InvalidTrainingFile, TrainingFailed
from shared.specs import Order, StepReport
from worker.attention import packed_segments
from worker.base_model import BaseModel
from worker.lora.format import write_adapter
from worker.lora.manager import AdapterManager
from worker.training.checkpoint import Checkpoint, Header
from worker.training.dataset import TokenisedDataset, Tokeniser, epoch_order, pack
from worker.training.job import Json, TrainingJob, TrainingResult
from worker.training.loss import Score, head_of, loss_sum, score
from worker.training.optimizer import AdapterOptimizer, learning_rate


class TrainingRun:
    """A job from its tokenised files to its trained adapter, one optimizer step at a time.

    An optimizer step sees `batch_size` samples, or what is left of the epoch, whatever the packing: gradients of all
    its micro-batches add up, each label token weighing the same. Uses the model's thread; changes the base in nothing.
    """

    def __init__(
        self,
        job: TrainingJob,
        base: BaseModel,
        manager: AdapterManager,
        *,
        max_tokens: int,
        between_samples: Callable[[], None],
    ) -> None:
        """Reads and tokenises the job's files; raises InvalidTrainingFile. `between_samples` may raise to end that."""
        self.job = job
        self.step = 0
        self.trained_tokens = 0
        self.metrics: dict[str, Json] = {}
        self._base = base
        self._manager = manager
        self._trunk: Any = base.model.base_model  # the model without its head
        self._head = head_of(base.model)
        self._max_tokens = max_tokens
        self._train, self._valid = self._read(between_samples)
        self._steps_per_epoch = math.ceil(len(self._train) / job.spec.batch_size)
        self.total_steps = job.spec.max_steps or job.spec.n_epochs * self._steps_per_epoch
        self._order: tuple[int, list[int]] | None = None
        self._first_step = 0
        self._busy_s = 0.0

    def steps_left(self) -> int:
        return self.total_steps - self.step

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the adapter is on the model, fresh or as its checkpoint left it; afterwards the base is bare."""
        job = self.job
        self._manager.add(job.job_id, job.spec.lora, seed=job.spec.seed)
        try:
            self._manager.train(True)
            self._parameters = self._manager.parameters(job.job_id)
            self._optimizer = AdapterOptimizer(self._parameters, job.spec, total_steps=self.total_steps)
            if job.resume_from is not None:
                self._resume(Checkpoint.read(job.resume_from))
            self._report_start()
            yield
        finally:
            self._manager.train(False)
            self._manager.remove(job.job_id)

    # -- one step

    def make_step(self) -> StepReport:
        """One optimizer step; raises TrainingFailed (diverged), the adapter then being as before the step."""
        started_s = time.perf_counter()
        batch = self._batch(self.step)
        num_labels = sum(self._train.num_labels(i) for i in batch)
        loss = torch.zeros((), device=self._base.device)
        for indices in pack(batch, self._train.num_tokens, max_tokens=self._max_tokens):
            share = loss_sum(*self._hidden_and_targets(self._train, indices), self._head) / num_labels
            share.backward()  # type: ignore[no-untyped-call]  # torch types none of this
            loss += share.detach()
        rate = learning_rate(self.job.spec, self.step, self.total_steps)
        train_loss, grad_norm = float(loss), self._optimizer.clip()
        if not (math.isfinite(train_loss) and math.isfinite(grad_norm)):
            raise TrainingFailed(
                f"training diverged at step {self.step + 1}: loss {train_loss:g}, gradient norm {grad_norm:g} "
                f"at learning rate {rate:g}; lower the learning rate",
                code="diverged",
            )
        self._optimizer.step(self.step)
        return self._advance(batch, train_loss, rate, grad_norm, num_labels, time.perf_counter() - started_s)

    def _batch(self, step: int) -> list[int]:
        epoch, within = divmod(step, self._steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self._train), seed=self.job.spec.seed, epoch=epoch))
        size = self.job.spec.batch_size
        return self._order[1][within * size : (within + 1) * size]

    def _hidden_and_targets(self, data: TokenisedDataset, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Hidden states (N, H) that predict the label tokens (N,) of some samples, run as one packed stream."""
        samples = [data[i] for i in indices]
        lengths = [len(tokens) for tokens, _ in samples]
        device = self._base.device
        tokens_T = torch.cat([tokens for tokens, _ in samples]).to(device, torch.int64)
        labels_N = torch.cat([is_label for _, is_label in samples]).nonzero()[:, 0].to(device)
        positions_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
        route = [(self.job.job_id, sum(lengths))]
        with packed_segments(lengths), self._manager.routed_segments(route):
            hidden_1TH = self._trunk(
                input_ids=tokens_T[None], position_ids=positions_T[None], use_cache=False
            ).last_hidden_state
        return hidden_1TH[0, labels_N - 1], tokens_T[labels_N]

    def _advance(
        self, batch: list[int], loss: float, rate: float, grad_norm: float, num_labels: int, seconds: float
    ) -> StepReport:
        num_tokens = sum(map(self._train.num_tokens, batch))
        self.step += 1
        self.trained_tokens += num_tokens
        self._busy_s += seconds
        mean_step_s = self._busy_s / (self.step - self._first_step)
        report = StepReport(
            step=self.step,
            total_steps=self.total_steps,
            train_loss=loss,
            learning_rate=rate,
            grad_norm=grad_norm,
            epoch=self.step / self._steps_per_epoch,
            num_tokens=num_tokens,
            num_label_tokens=num_labels,
            tokens_per_second=num_tokens / seconds,
            eta_seconds=(self.total_steps - self.step) * mean_step_s,
        )
        self.metrics = report.model_dump()
        return report

    # -- between steps

    def evaluate_if_due(self, should_stop: Callable[[], bool]) -> None:
        """After an epoch and at the end, add `valid_loss` and `valid_mean_token_accuracy` to the metrics.

        Nats per label token, and the share of labels ranked first. One packed stream at a time; gives up,
        adding nothing, once `should_stop` says so.
        """
        data = self._valid
        if data is None or (self.steps_left() and self.step % self._steps_per_epoch):
            return
        self._manager.train(False)
        total = Score(0.0, 0, 0)
        try:
            for indices in pack(range(len(data)), data.num_tokens, max_tokens=self._max_tokens):
                if should_stop():
                    return
                with torch.no_grad():
                    total += score(*self._hidden_and_targets(data, indices), self._head)
        finally:
            self._manager.train(True)
        self.metrics["valid_loss"] = total.loss / total.num_labels
        self.metrics["valid_mean_token_accuracy"] = total.num_correct / total.num_labels

    def report_metrics(self) -> None:
        """Send the step's metrics as its event."""
        message = f"Step {self.step}/{self.total_steps}: training loss={self.metrics['train_loss']:.4f}"
        if "valid_loss" in self.metrics:
            message += f", validation loss={self.metrics['valid_loss']:.4f}"
        self.job.on_event("info", "metrics", message, dict(self.metrics))

    def is_checkpoint_due(self) -> bool:
        every = self.job.spec.checkpoint_every
        return bool(every and self.step % every == 0) or self.job.checkpoint_due()

    def save_checkpoint(self) -> None:
        """Hand over a copy of all that the next step depends on."""
        copies = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}
        tensors = {"lora": copies, **self._optimizer.moments()}
        checkpoint = Checkpoint(self._header(), tensors, self._manager.dropout_state(self.job.job_id).clone())
        self.job.save_checkpoint(self.step, dict(self.metrics), checkpoint.write)

    def result(self, outcome: Literal["finished", "stopped"], order: Order | None = None) -> TrainingResult:
        """How the job ended, holding a copy of the adapter as it is now."""
        adapter = self._manager.snapshot(self.job.job_id)
        return TrainingResult(
            outcome=outcome,
            order=order,
            metrics=dict(self.metrics),
            steps=self.step,
            trained_tokens=self.trained_tokens,
            write_adapter=partial(write_adapter, adapter=adapter, base_model_name=self._base.name),
        )

    # -- the start

    def _read(self, between_samples: Callable[[], None]) -> tuple[TokenisedDataset, TokenisedDataset | None]:
        base, job = self._base, self.job
        tokeniser = Tokeniser(base.tokenizer, base.eos_token_ids, job.spec, longest=base.context_length)
        train = tokeniser.read(job.train_path, between_samples=between_samples)
        self._report_data("Training", train)
        if job.valid_path is None:
            return train, None
        try:
            valid = tokeniser.read(job.valid_path, between_samples=between_samples)
        except InvalidTrainingFile as error:
            raise InvalidTrainingFile(f"validation file: {error.message}", param="validation_file") from error
        self._report_data("Validation", valid)
        return train, valid

    def _report_data(self, which: str, data: TokenisedDataset) -> None:
        report = data.report
        message = (
            f"{which} data: {report.num_used} samples, {report.num_tokens} tokens, "
            f"{report.num_label_tokens} of them labels"
        )
        if report.num_truncated:
            message += f"; {report.num_truncated} of {report.num_samples} samples were cut at the longest length"
        if report.num_dropped:
            message += f"; {report.num_dropped} without any label were dropped"
        level: Literal["info", "warn"] = "warn" if report.num_truncated or report.num_dropped else "info"
        self.job.on_event(level, "message", message, report.to_json())

    def _report_start(self) -> None:
        trainable = sum(p.numel() for p in self._parameters.values())
        total = sum(p.numel() for p in self._base.model.parameters())
        message = f"Training starts: {self.steps_left()} steps, {trainable:,} of {total:,} parameters"
        data: dict[str, Json] = {
            "step": self.step, "total_steps": self.total_steps, "trainable_parameters": trainable, "parameters": total
        }  # fmt: skip
        self.job.on_event("info", "message", message, data)

    def _resume(self, checkpoint: Checkpoint) -> None:
        header = self._header()
        checkpoint.check(header, self._parameters)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(checkpoint.tensors["lora"][name])
        self.step = self._first_step = checkpoint.header.step
        self.trained_tokens = checkpoint.header.trained_tokens
        self._optimizer.restore(checkpoint.tensors, steps=self.step)
        if checkpoint.header.device == header.device:
            self._manager.set_dropout_state(self.job.job_id, checkpoint.dropout_state)
        elif self.job.spec.lora.dropout:
            message = f"Resumed on {header.device}, not {checkpoint.header.device}: dropout draws anew from the seed"
            self.job.on_event("warn", "message", message, {})

    def _header(self) -> Header:
        return Header(
            spec=self.job.spec,
            base_digest=self._base.digest,
            data_sha256=self._train.digest,
            device=self._base.device.type,
            step=self.step,
            trained_tokens=self.trained_tokens,
        )
