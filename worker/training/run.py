"""One job in the engine: which samples are next, and what becomes of what they give. When is the engine's to decide."""

import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor

from shared.errors import TrainingFailed
from shared.specs import Order, StepReport
from worker.base_model import BaseModel
from worker.lora.format import read_adapter, write_adapter
from worker.lora.manager import AdapterManager
from worker.lora.spec import LoadedAdapter
from worker.training.checkpoint import Checkpoint, Header, Position, newest_fitting
from worker.training.dataset import epoch_order
from worker.training.evaluation import Evaluation
from worker.training.failure import sample_too_large
from worker.training.forecast import num_steps
from worker.training.job import TrainingResult
from worker.training.loss import Score
from worker.training.optimizer import AdapterOptimizer, learning_rate, pairs_of
from worker.training.preparation import Prepared
from worker.training.reports import Reports
from worker.training.step import Step, leading
from worker.training.stream import Gained, Part

MAX_NON_FINITE: Final = 3
"""Steps in a row whose loss or gradient is not finite, until a rollback or the end."""


class TrainingRun:
    """A job from its tokens to its trained adapter. It is at one of three points:

    in a step      `next_train_part`, `absorb`, until `is_step_whole`; then `end_step`
    evaluating     `next_valid_part`, `judge`, for as long as `is_evaluating`
    between steps  `is_between_steps`: `save_checkpoint`, `result`, or the next step

    An optimizer step sees `batch_size` samples, or what is left of the epoch. Uses the model's thread.
    """

    def __init__(self, prepared: Prepared, base: BaseModel, manager: AdapterManager) -> None:
        """Attaches the adapter: fresh, from another, or as the newest fitting checkpoint left it."""
        self.job = prepared.job
        self.max_part_tokens: int | None = None
        """A bound that running out of memory has left; None before that."""
        self._spec = prepared.job.spec
        self._base = base
        self._manager = manager
        self._train = prepared.train
        self._steps_per_epoch, self.total_steps = num_steps(self._train, self._spec)
        self._order: tuple[int, list[int]] | None = None
        self._reports = Reports(prepared.job)
        self._position = Position()
        self._best: Mapping[str, Tensor] | None = None
        self._evaluation = Evaluation(prepared.valid, self._spec)
        self._attach()
        try:
            self._parameters = manager.parameters(self.job.job_id)
            self._optimizer = AdapterOptimizer(self._parameters, self._spec)
            self._resume()
            self._anchor = self._optimizer.standing()
            self._anchored_at = self._first_step = self.step
            # A step whose evaluation is still to come is worth saving again once that is over.
            self._saved_at = self.step if self._position.unreported is None else None
            self._began_s = time.monotonic() - self._position.seconds
            self._busy_s = 0.0
            self._under_way = self._next_step()
            total = sum(p.numel() for p in base.model.parameters()) - self._num_attached()
            self._reports.start(self.step, self.total_steps, self._parameters, num_base_parameters=total)
        except BaseException:
            self.detach()
            raise

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        return self._position.step

    def steps_left(self) -> int:
        return self.total_steps - self.step

    def is_between_steps(self) -> bool:
        return not self._under_way.has_begun and not self._evaluation.is_under_way

    def is_evaluating(self) -> bool:
        return self._evaluation.is_under_way

    def is_step_whole(self) -> bool:
        return self._under_way.is_whole

    def detach(self) -> None:
        """Take the adapter off; the run is of no use after."""
        self._manager.remove(self.job.job_id)

    # -- in a step

    def next_train_part(self, max_tokens: int) -> Part:
        """The next samples of this step that fit into `max_tokens`; a longer one goes alone."""
        indices, places = self._under_way.next_samples(min(max_tokens, self.max_part_tokens or max_tokens))
        return Part(
            adapter=self.job.job_id,
            parameters=list(self._parameters.values()),
            data=self._train,
            indices=indices,
            # What dropout drops: of the job's seed, the step, and the sample's place in it; not of the part.
            seeds=[(self._spec.seed * 2**17 + self.step) * 2**9 + place for place in places],
            num_labels=self._under_way.num_labels,
        )

    def absorb(self, part: Part, gained: Gained, seconds: float) -> None:
        """Add what the last `next_train_part` gained; `seconds` is what it took."""
        self._under_way.absorb(part, gained, seconds)

    def end_step(self) -> None:
        """Move the adapter by what the parts gained, and report; a step that was not finite is skipped instead.

        Raises TrainingFailed (diverged) where a rollback has not helped.
        """
        rate = learning_rate(self._spec, self.step, self.total_steps) * self._position.rate_scale
        made = self._under_way
        assert made.loss is not None
        norm = self._optimizer.set_gradients(made.gradients)
        began_s = time.perf_counter()
        loss, grad_norm = torch.stack([made.loss, norm.to(made.loss)]).tolist()  # the one wait for a GPU in a step
        made.seconds += time.perf_counter() - began_s
        report = None
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._optimizer.step(rate)
            self._move(updates=self._optimizer.updates, non_finite_in_a_row=0)
            report = self._advance(made, loss, rate, grad_norm)
        else:
            self._optimizer.drop_gradients()
            self._move(step=self.step + 1, non_finite_in_a_row=self._position.non_finite_in_a_row + 1)
            self._skip(loss, grad_norm, rate)
        self._under_way = self._next_step()
        if self._spec.max_seconds is not None and self._seconds() >= self._spec.max_seconds and self.steps_left():
            self._end_early(f"{self._spec.max_seconds} s of training are over, as max_seconds asks")
        if report is not None:
            self.job.on_step(report)
        is_due = self._evaluation.is_due(self.step, self._steps_per_epoch, is_last=not self.steps_left())
        if is_due and self._reports.last is not None:
            self._evaluation.begin()
            self._move(unreported=self._reports.last)
        elif report is not None:
            self._reports.tell_metrics()

    # -- evaluating

    def next_valid_part(self, max_tokens: int) -> Part:
        """The next validation samples that fit into `max_tokens`; a longer one goes alone."""
        assert self._evaluation.data is not None
        max_tokens = min(max_tokens, self.max_part_tokens or max_tokens)
        indices = leading(self._evaluation.waiting, self._evaluation.data, max_tokens)
        return Part(
            adapter=self.job.job_id, parameters=(), data=self._evaluation.data, indices=indices,
            seeds=[0] * len(indices), num_labels=1,
        )  # fmt: skip

    def judge(self, part: Part, found: Score) -> None:
        """Add the score of the last `next_valid_part`; with the last part, end the evaluation."""
        self._evaluation.add(part.indices, found)
        if self._evaluation.waiting:
            return
        loss, accuracy = self._evaluation.end()
        is_finite = math.isfinite(loss)
        self._reports.evaluated(loss if is_finite else None, accuracy)
        if is_finite and (self._position.best_loss is None or loss < self._position.best_loss):
            self._best = self._optimizer.standing().lora
            self._move(best_loss=loss, best_step=self.step, evaluations_since_best=0)
        else:
            self._move(evaluations_since_best=self._position.evaluations_since_best + 1)
        self._move(unreported=None)
        self._reports.tell_metrics()
        patience = self._spec.early_stopping_patience
        if patience is not None and self._position.evaluations_since_best >= patience and self.steps_left():
            best_loss, best_step = self._position.best_loss, self._position.best_step
            lowest = "none was finite" if best_loss is None else f"the lowest was {best_loss:.4f} at step {best_step}"
            self._end_early(f"no lower validation loss in {patience} evaluations; {lowest}")

    # -- between steps

    def is_checkpoint_due(self) -> bool:
        """Never twice for one step: it may take turns until the next begins."""
        every = self._spec.checkpoint_every
        return self.step != self._saved_at and (bool(every and self.step % every == 0) or self.job.checkpoint_due())

    def save_checkpoint(self) -> None:
        """Hand over a copy of all that the next step depends on, unless this run has done so for this step.

        Nothing of a step under way is saved, and an evaluation under way will begin anew.
        """
        if self.step == self._saved_at:
            return
        self._move(seconds=self._seconds())
        standing = self._optimizer.standing()
        checkpoint = Checkpoint(self._header(), standing, self._best)
        self.job.save_checkpoint(self.step, self._reports.metrics_of(self.step), checkpoint.write)
        self._saved_at = self.step
        if not self._position.non_finite_in_a_row:  # else what was saved may be what diverges
            self._anchor, self._anchored_at = standing, self.step

    def check_trained(self) -> None:
        """Raises TrainingFailed (diverged) if nothing was learnt, or more than the last step was not finite."""
        if not self._position.updates:
            why = f"none of the {self.step} steps was finite, or a rollback has undone all that were"
        elif self._position.non_finite_in_a_row > 1:
            why = f"the last {self._position.non_finite_in_a_row} of {self.step} steps were not finite"
        else:
            return
        raise TrainingFailed(f"training diverged: {why}; use a lower learning rate", code="diverged")

    def result(self, outcome: Literal["finished", "stopped"], order: Order | None = None) -> TrainingResult:
        """How the job ended, holding a copy of the adapter to publish."""
        adapter = self._manager.snapshot(self.job.job_id)
        if outcome == "finished" and self._spec.publish == "best" and self._best is not None:
            adapter = LoadedAdapter(spec=adapter.spec, tensors=pairs_of(self._best))
            self._reports.best_is_published(self._position.best_step)
        return TrainingResult(
            outcome=outcome,
            order=order,
            metrics=self._reports.metrics,
            steps=self.step,
            trained_tokens=self._position.trained_tokens,
            write_adapter=partial(write_adapter, adapter=adapter, base_model_name=self._base.name),
        )

    def halve_parts(self, part: Part) -> None:
        """After `part` alone did not fit into memory, make smaller ones; the optimizer step stays the same.

        Raises TrainingFailed (out_of_memory) where it was a single sample.
        """
        if len(part.indices) == 1:
            raise sample_too_large(part.num_tokens)
        self.max_part_tokens = max(part.num_tokens // 2, 1)
        self._reports.parts_are_smaller(self.step, part.num_tokens, self.max_part_tokens)

    # -- within

    def _next_step(self) -> Step:
        epoch, within = divmod(self.step, self._steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self._train), seed=self._spec.seed, epoch=epoch))
        size = self._spec.batch_size
        return Step(self._train, self._order[1][within * size : (within + 1) * size])

    def _advance(self, made: Step, loss: float, rate: float, grad_norm: float) -> StepReport:
        step = self.step + 1
        self._busy_s += made.seconds
        report = StepReport(
            step=step,
            total_steps=self.total_steps,
            train_loss=loss,
            learning_rate=rate,
            grad_norm=grad_norm,
            epoch=step / self._steps_per_epoch,
            num_tokens=made.num_tokens,
            num_label_tokens=made.num_labels,
            tokens_per_second=made.num_tokens / max(made.seconds, 1e-9),
            eta_seconds=(self.total_steps - step) * self._busy_s / max(step - self._first_step, 1),
        )
        self._reports.stepped(report)
        self._move(step=step, trained_tokens=self._position.trained_tokens + made.num_tokens)
        return report

    def _skip(self, loss: float, grad_norm: float, rate: float) -> None:
        """After a step that was not finite: tell, and roll back or fail if it was one too many."""
        what = f"loss {loss:g}, gradient norm {grad_norm:g} at learning rate {rate:g}"
        if self._position.non_finite_in_a_row < MAX_NON_FINITE:
            self._warn(f"Step {self.step} was skipped, it is not finite: {what}")
            return
        if self._position.rate_scale < 1.0:
            raise TrainingFailed(
                f"training diverged at step {self.step}: {what}, again after a rollback to half the learning rate; "
                "use a lower learning rate",
                code="diverged",
            )
        self._optimizer.restore(self._anchor)
        self._move(updates=self._anchor.updates, rate_scale=0.5, non_finite_in_a_row=0)
        self._warn(
            f"{MAX_NON_FINITE} steps in a row were not finite (step {self.step}: {what}); the adapter was put back to "
            f"step {self._anchored_at} and goes on at half the learning rate"
        )

    def _end_early(self, why: str) -> None:
        self.job.on_event("info", "message", f"Training ends at step {self.step} of {self.total_steps}: {why}", {})
        self.total_steps = self.step
        self._move(ended_early=True)

    def _warn(self, message: str) -> None:
        self.job.on_event("warn", "message", message, {"step": self.step})

    def _move(self, **changes: Any) -> None:
        self._position = self._position.model_copy(update=changes)

    def _seconds(self) -> float:
        return time.monotonic() - self._began_s

    # -- the start

    def _attach(self) -> None:
        job = self.job
        if job.init_from is None:
            self._manager.add(job.job_id, self._spec.lora, seed=self._spec.seed)
        else:
            adapter = read_adapter(job.init_from)
            self._manager.add_from(job.job_id, adapter, self._spec.lora, seed=self._spec.seed)
        self._manager.train(True)

    def _resume(self) -> None:
        expected = self._header()
        checkpoint, refused = newest_fitting(self.job.resume_from, expected, self._parameters)
        for why in refused:
            self._warn(why)
        if checkpoint is None:
            if self._spec.init_from is not None and self.job.init_from is None:
                raise TrainingFailed("no checkpoint fits, nor is the adapter to start from here", code="cannot_resume")
            return
        header = checkpoint.header
        self.job.on_event(
            "info", "message", f"Resuming from step {header.position.step}", {"step": header.position.step}
        )
        self._optimizer.restore(checkpoint.standing)
        self._position, self._best = header.position, checkpoint.best
        if (header.device, header.dtype) != (expected.device, expected.dtype):
            self._warn(
                f"Resumed on {expected.device} in {expected.dtype}, not on {header.device} in {header.dtype}: "
                "equal within rounding" + ("; dropout drops other inputs" if self._spec.lora.dropout else "")
            )
        if header.position.ended_early:
            self.total_steps = self.step
        if header.position.unreported is not None:
            self._reports.stepped(header.position.unreported)
            self._evaluation.begin()

    def _num_attached(self) -> int:
        return sum(p.numel() for name in self._manager.list() for p in self._manager.parameters(name).values())

    def _header(self) -> Header:
        return Header(
            spec=self._spec,
            base_digest=self._base.digest,
            data_sha256=self._train.digest,
            device=self._base.device.type,
            dtype=str(self._base.dtype).removeprefix("torch."),
            position=self._position,
        )
