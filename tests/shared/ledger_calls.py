"""The real ledger on a real database, with the verbs and the words of `tests.shared.ledger_model`."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sqlalchemy import delete, func, select

from shared import ids, jobs
from shared.db import Tx, read, write
from shared.errors import CancelRequested, NotFound, OwnershipLost, QueueFull, StateConflict
from shared.jobs import Claim
from shared.specs import StepReport, TrainSpec
from shared.store import adapters, checkpoints, garbage
from shared.store.adapters import PreparedVersion
from shared.store.layout import Layout
from shared.tables import Adapter, AdapterVersion, Checkpoint, Job, JobAttempt, JobEvent, Table
from tests.shared.conftest import World, make_world
from tests.shared.database_clock import START_MS, SetClock, clocked_engine
from tests.shared.ledger_model import Told
from tests.shared.ledger_rows import LEASE_MS, MAX_QUEUED

LEASE_S: Final = LEASE_MS / 1000

KEPT_TABLES: Final = frozenset({"files", "base_models"})
WORDS: Final[dict[type[Exception], str]] = {
    OwnershipLost: "lost",
    CancelRequested: "cancel_requested",
    QueueFull: "full",
    NotFound: "missing",
}


@dataclass
class Snapshot:
    """All that the ledger holds."""

    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    attempts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By job, in the order of their fences."""

    events: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """By job: number and text, in the order of the numbers."""

    checkpoints: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By job: fence and step of those that exist, newest first."""

    versions: dict[str, dict[str, Any]] = field(default_factory=dict)
    adapters: dict[tuple[str, str], bool] = field(default_factory=dict)
    """By tenant and name: does it live?"""


@dataclass
class Ledger:
    """The calls that API, trainers and sweepers make, each in a transaction of its own."""

    world: World
    set_clock: SetClock

    @property
    def bases(self) -> tuple[str, str]:
        return self.world.base.id, self.world.other_base.id

    # -- what users ask

    def submit(self, *, tenant: str, name: str, base: str, priority: int) -> str:
        """The new job's id, or 'full'."""
        new = jobs.NewJob(
            tenant=tenant, base_model_id=base, training_file_id=self.world.file_id, adapter_name=name,
            spec=TrainSpec(), priority=priority,
        )  # fmt: skip
        return str(self._word(lambda tx: jobs.submit(tx, new, max_queued=MAX_QUEUED).id))

    def cancel(self, tenant: str, job_id: str) -> object:
        return self._word(lambda tx: jobs.request_cancel(tx, tenant, job_id).state)

    def pause(self, tenant: str, job_id: str) -> object:
        return self._word(lambda tx: jobs.request_pause(tx, tenant, job_id).state)

    def resume(self, tenant: str, job_id: str) -> object:
        return self._word(lambda tx: jobs.resume(tx, tenant, job_id).state)

    def delete(self, tenant: str, name: str) -> object:
        return self._word(lambda tx: adapters.delete(tx, tenant, name) and None)

    def delete_version(self, tenant: str, name: str, number: int) -> object:
        return self._word(lambda tx: adapters.delete_version(tx, tenant, name, number) and None)

    # -- what trainers do

    def claim(self, trainer: str, holds_base: str | None, max_running: int = 0) -> Claim | None:
        with write(self.world.engine) as tx:
            return jobs.claim_next(
                tx, trainer=trainer, lease_s=LEASE_S, holds_base=holds_base, max_running=max_running
            )  # fmt: skip

    def beat(self, claim: Claim, step: int | None = None) -> object:
        report = None if step is None else _report(step)
        return self._word(lambda tx: jobs.heartbeat(tx, claim, lease_s=LEASE_S, report=report).value)

    def note(self, claim: Claim, words: str) -> object:
        return self._word(lambda tx: jobs.add_event(tx, claim, message=words))

    def checkpoint(self, claim: Claim, step: int) -> object:
        def record(tx: Tx) -> None:
            checkpoint_id = ids.new_id(ids.CHECKPOINT)
            jobs.record_checkpoint(tx, claim, checkpoint_id=checkpoint_id, step=step, manifest={})
            checkpoints.forget_old(tx, claim.job_id)

        return self._word(record)

    def prepare(self, claim: Claim) -> PreparedVersion:
        """Durable adapter files of this claim's own bytes, as at the end of a training."""
        return self.world.prepare(weights_of(claim), name=claim.adapter_name, job_id=claim.job_id)

    def publish(self, claim: Claim, prepared: PreparedVersion) -> object:
        return self._word(lambda tx: ("ready", jobs.succeed(tx, claim, prepared).version))

    def fail(self, claim: Claim) -> object:
        return self._word(lambda tx: jobs.fail(tx, claim, code="training_failed", message="it diverged"))

    def give_back(self, claim: Claim, charge: bool) -> object:
        return self._word(lambda tx: jobs.give_back(tx, claim, charge=charge, reason="no memory", lease_s=LEASE_S))

    def give_back_for_storage(self, claim: Claim) -> object:
        reason = "no space left on the device"
        return self._word(
            lambda tx: jobs.give_back_for_storage(tx, claim, code="storage_full", reason=reason, lease_s=LEASE_S)
        )

    def take_back(self, trainer: str, held: Sequence[str]) -> object:
        return self._word(lambda tx: jobs.take_back(tx, trainer=trainer, held=held))

    def obey(self, claim: Claim, order: str) -> object:
        stop = jobs.stop_cancelled if order == "cancel" else jobs.stop_paused
        return self._word(lambda tx: stop(tx, claim))

    # -- what sweepers do

    def sweep(self, may_expire: bool, max_job_ms: int | None = None) -> tuple[int, ...]:
        max_job_s = None if max_job_ms is None else max_job_ms / 1000
        with write(self.world.engine) as tx:
            swept = jobs.sweep(tx, may_expire=may_expire, lease_s=LEASE_S, max_job_s=max_job_s)
        ended = swept.requeued, swept.failed, swept.cancelled, swept.paused
        return (swept.overdue, *ended, swept.waiting, int(swept.ring))

    def mark_rung(self) -> object:
        return self._word(jobs.mark_rung)

    def remove_deleted(self) -> None:
        """Remove the bytes of versions that were deleted a while ago."""
        with read(self.world.engine) as tx:
            garbage.remove_deleted(tx, self.world.layout)

    # -- what tests look at

    def empty(self) -> None:
        """Forget all jobs and adapters."""
        with write(self.world.engine) as tx:
            for table in reversed(Table.metadata.sorted_tables):
                if table.name not in KEPT_TABLES:
                    tx.execute(delete(table))
        self.set_clock(START_MS)

    def weights(self, version_id: str) -> Path:
        return self.world.layout.adapter(version_id) / "adapter_model.safetensors"

    def snapshot(self) -> Snapshot:
        """Everything, read while nobody writes."""
        seen = Snapshot()
        with read(self.world.engine) as tx:
            seen.jobs = {row["id"]: dict(row) for row in tx.execute(select(Job.__table__)).mappings()}
            for row in tx.execute(select(JobAttempt.__table__).order_by(JobAttempt.fence)).mappings():
                seen.attempts.setdefault(row["job_id"], []).append(dict(row))
            for job_id, seq, message in tx.execute(
                select(JobEvent.job_id, JobEvent.seq, JobEvent.message).order_by(JobEvent.seq)
            ):
                seen.events.setdefault(job_id, []).append((seq, message))
            live = select(Checkpoint.job_id, Checkpoint.fence, Checkpoint.step).where(Checkpoint.deleted_at.is_(None))
            for job_id, fence, step in tx.execute(live.order_by(Checkpoint.fence.desc(), Checkpoint.step.desc())):
                seen.checkpoints.setdefault(job_id, []).append((fence, step))
            seen.versions = {row["id"]: dict(row) for row in tx.execute(select(AdapterVersion.__table__)).mappings()}
            found = tx.execute(select(Adapter.tenant, Adapter.name, func.coalesce(Adapter.deleted_at, 0) == 0))
            seen.adapters = {(tenant, name): lives for tenant, name, lives in found}
        return seen

    def _word(self, act: Callable[[Tx], object]) -> object:
        """What the act returned, 'done' for nothing, or the word for what it raised; committed unless it raised."""
        try:
            with write(self.world.engine) as tx:
                answer = act(tx)
        except tuple(WORDS) as error:
            return WORDS[type(error)]
        except StateConflict:
            return "conflict"
        return "done" if answer is None else answer


@contextmanager
def open_ledger(url: str, data: Path) -> Iterator[Ledger]:
    """An empty ledger on the fresh migrated database at `url`, its store in `data`."""
    layout = Layout(data)
    layout.prepare()
    with clocked_engine(url) as (engine, set_clock):
        yield Ledger(make_world(engine, layout), set_clock)


def comparable(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a job's row that the model predicts."""
    named = (
        "state", "fence", "attempt", "lease_owner", "lease_expires_at", "not_before", "runs_alone", "rung_at",
        "started_at", "step", "storage_failures",
    )  # fmt: skip
    asked = {f"{what}_asked": row[f"{what}_requested_at"] is not None for what in ("cancel", "pause")}
    return {name: row[name] for name in named} | asked


def told(claim: Claim | None) -> Told | None:
    """What a claim says, comparable with the model's answer."""
    return None if claim is None else (claim.job_id, claim.fence, claim.attempt, claim.runs_alone)


def weights_of(claim: Claim) -> bytes:
    """The bytes that this claim's training ends with: no two claims train the same."""
    return f"{claim.job_id} under fence {claim.fence}".encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _report(step: int) -> StepReport:
    return StepReport(
        step=step, total_steps=100, train_loss=1.0, learning_rate=0.1, grad_norm=1.0, epoch=0.5, num_tokens=10,
        num_label_tokens=5, tokens_per_second=1.0, eta_seconds=30.0,
    )  # fmt: skip
