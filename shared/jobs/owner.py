"""What a trainer does with a job that it owns. Every function is a compare-and-swap on the claim's fence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shared.db import Tx
from shared.specs import Order, StepReport, TrainSpec
from shared.store.adapters import PreparedVersion
from shared.tables import AdapterVersion


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The right to train one job until the lease ends; `fence` is the proof."""

    job_id: str
    tenant: str
    fence: int
    attempt: int
    trainer: str
    base_model_id: str
    training_file_id: str
    validation_file_id: str | None
    adapter_name: str
    spec: TrainSpec
    runs_alone: bool


def claim_next(tx: Tx, *, trainer: str, lease_s: float, holds_base: str | None = None) -> Claim | None:
    """The next job for this trainer, now running under its lease, or None. Call until None: a doorbell says 'look'."""
    raise NotImplementedError


def heartbeat(
    tx: Tx, claim: Claim, *, lease_s: float, report: StepReport | None = None, trained_tokens: int | None = None
) -> Order:
    """Renew the lease, note progress, and bring back what was asked; LOST if another owner has the job."""
    raise NotImplementedError


def add_event(
    tx: Tx,
    claim: Claim,
    *,
    level: Literal["info", "warn", "error"] = "info",
    type: Literal["message", "metrics"] = "message",
    message: str,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Append an event; raises OwnershipLost."""
    raise NotImplementedError


def record_checkpoint(
    tx: Tx,
    claim: Claim,
    *,
    checkpoint_id: str,
    step: int,
    manifest: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Make a published checkpoint directory known; raises OwnershipLost."""
    raise NotImplementedError


def succeed(
    tx: Tx,
    claim: Claim,
    prepared: PreparedVersion,
    *,
    result_file_ids: Sequence[str] = (),
    trained_tokens: int | None = None,
) -> AdapterVersion:
    """The new adapter version: the job succeeds and its version exists, or neither.

    Raises OwnershipLost, or CancelRequested if a cancel came first: then call stop_cancelled in a new transaction.
    """
    raise NotImplementedError


def published_version(tx: Tx, job_id: str) -> AdapterVersion | None:
    """The version that a job has published, to read back a COMMIT whose answer was lost."""
    raise NotImplementedError


def fail(tx: Tx, claim: Claim, *, code: str, message: str, param: str | None = None) -> None:
    """End the job as failed (as cancelled if that was asked); raises OwnershipLost."""
    raise NotImplementedError


def give_back(tx: Tx, claim: Claim, *, charge: bool, reason: str) -> None:
    """Put the job back in the queue; raises OwnershipLost.

    With `charge` the attempt counts: it waits a while, and fails if no attempt is left. A cancel or pause that was
    asked is carried out instead.
    """
    raise NotImplementedError


def stop_cancelled(tx: Tx, claim: Claim) -> None:
    """End the job as cancelled, as was asked; raises OwnershipLost."""
    raise NotImplementedError


def stop_paused(tx: Tx, claim: Claim) -> None:
    """Pause the job, as was asked (cancel wins); raises OwnershipLost. The attempt is not charged."""
    raise NotImplementedError
