"""The ledger in plain Python, written from what `shared.jobs` promises in words: what must each call answer?

Answers are words or plain tuples, so that those of the real ledger (`tests.shared.ledger_calls`) compare with `==`.
Each verb here is one indivisible step; the clock stands still unless a test sets `now`, in ms.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tests.shared.ledger_rows import (
    ENDED,
    LEASE_MS,
    MAX_ATTEMPTS,
    MAX_BACKOFF_MS,
    MAX_QUEUED,
    MAX_STORAGE_FAILURES,
    RING_AGAIN_MS,
    STORAGE_WAIT_MS,
    WAITED_TOO_LONG_MS,
    ModelAttempt,
    ModelJob,
    ModelVersion,
)

Told = tuple[str, int, int, bool]
"""What a claim tells a trainer: job, fence, attempt, and whether the job must run alone."""


class Token(Protocol):
    """The proof of ownership, as `shared.jobs.Claim` is."""

    @property
    def job_id(self) -> str: ...
    @property
    def fence(self) -> int: ...


@dataclass
class LedgerModel:
    now: int
    jobs: dict[str, ModelJob] = field(default_factory=dict)
    versions: dict[str, ModelVersion] = field(default_factory=dict)
    followed: set[str] = field(default_factory=set)
    """Names of the arcs that some job has followed."""

    def in_state(self, *states: str) -> list[ModelJob]:
        """Jobs in these states, oldest submission first."""
        return [job for job in self.jobs.values() if job.state in states]

    def owns(self, claim: Token) -> bool:
        """True while this claim is the job's current one."""
        job = self.jobs[claim.job_id]
        return job.state == "running" and job.fence == claim.fence

    # -- what users ask

    def is_full(self, tenant: str) -> bool:
        return sum(job.tenant == tenant for job in self.in_state("queued")) >= MAX_QUEUED

    def submit(self, job_id: str, *, tenant: str, name: str, base: str, priority: int) -> None:
        self.jobs[job_id] = ModelJob(job_id, tenant, name, base, priority, self.now)
        self.followed.add("submit")

    def cancel(self, tenant: str, job_id: str) -> str:
        job = self.jobs[job_id]
        if job.tenant != tenant:
            return "missing"
        if job.state in ENDED:
            return "conflict"
        job.cancel_asked = True
        if job.state != "running":
            self._follow(job, f"cancel_{job.state}", "cancelled")
        return job.state

    def pause(self, tenant: str, job_id: str) -> str:
        job = self.jobs[job_id]
        if job.tenant != tenant:
            return "missing"
        if job.state in ENDED:
            return "conflict"
        job.pause_asked = True
        if job.state == "queued":
            self._follow(job, "pause_queued", "paused")
        return job.state

    def resume(self, tenant: str, job_id: str) -> str:
        job = self.jobs[job_id]
        if job.tenant != tenant:
            return "missing"
        if job.state != "paused":
            return "conflict"
        job.pause_asked, job.not_before = False, 0
        self._follow(job, "resume", "queued")
        return job.state

    def delete(self, tenant: str, name: str) -> str:
        """Delete an adapter."""
        live = self._live(tenant, name)
        for version in live:
            version.deleted_at = self.now
        return "done" if live else "missing"

    def delete_version(self, tenant: str, name: str, number: int) -> str:
        found = [version for version in self._live(tenant, name) if version.number == number]
        for version in found:
            version.deleted_at = self.now
        return "done" if found else "missing"

    # -- what trainers do

    def claim(self, trainer: str, holds_base: str | None, max_running: int = 0) -> Told | None:
        mine = [job for job in self.in_state("running") if job.owner == trainer]
        if any(job.runs_alone for job in mine):
            return None
        line = self._line(holds_base, max_running)
        if mine and line and not _joins(line[0], holds_base):
            if line[0].waited_ms(self.now) > WAITED_TOO_LONG_MS:
                return None
            line = [job for job in line if _joins(job, holds_base)]
        if not line:
            return None
        job = line[0]
        job.fence, job.attempt, job.owner = job.fence + 1, job.attempt + 1, trainer
        job.lease_expires_at = self.now + LEASE_MS
        job.started_at = self.now if job.started_at is None else job.started_at
        job.attempts.append(ModelAttempt(self.now))
        self._follow(job, "claim", "running")
        return job.id, job.fence, job.attempt, job.runs_alone

    def _line(self, holds_base: str | None, max_running: int) -> list[ModelJob]:
        """Who may be claimed, the next first."""
        running: dict[str, int] = {}
        served: dict[str, int] = {}
        for job in self.jobs.values():
            running[job.tenant] = running.get(job.tenant, 0) + (job.state == "running")
            served[job.tenant] = max(served.get(job.tenant, 0), job.started_at or 0)

        def place(job: ModelJob) -> tuple[Any, ...]:
            at_hand = holds_base in (None, job.base) or job.waited_ms(self.now) > WAITED_TOO_LONG_MS
            return -job.priority, not at_hand, running[job.tenant], served[job.tenant], job.created_at, job.id

        unasked = [job for job in self.in_state("queued") if not (job.cancel_asked or job.pause_asked)]
        ready = [job for job in unasked if job.not_before <= self.now]
        return sorted((job for job in ready if not max_running or running[job.tenant] < max_running), key=place)

    def beat(self, claim: Token, step: int | None = None) -> str:
        if not self.owns(claim):
            return "lost"
        job = self.jobs[claim.job_id]
        job.lease_expires_at = self.now + LEASE_MS
        job.step = job.step if step is None else step
        return "cancel" if job.cancel_asked else "pause" if job.pause_asked else "go_on"

    def note(self, claim: Token, words: str) -> str:
        """Write an event."""
        if not self.owns(claim):
            return "lost"
        self.jobs[claim.job_id].notes.append(words)
        return "done"

    def checkpoint(self, claim: Token, step: int) -> str:
        """Record a checkpoint and forget all but the newest two."""
        if not self.owns(claim):
            return "lost"
        job = self.jobs[claim.job_id]
        job.checkpoints = sorted([*job.checkpoints, (claim.fence, step)], reverse=True)[:2]
        return "done"

    def publish(self, claim: Token, version_id: str, sha256: str) -> str | tuple[str, int]:
        """Succeed; the number of the new version."""
        if not self.owns(claim):
            return "lost"
        job = self.jobs[claim.job_id]
        if job.cancel_asked:
            return "cancel_requested"
        job.pause_asked = False
        self._follow(job, "publish", "succeeded", "succeeded")
        number = 1 + sum((version.tenant, version.name) == (job.tenant, job.name) for version in self.versions.values())
        self.versions[version_id] = ModelVersion(version_id, job.tenant, job.name, number, job.id, sha256)
        return "ready", number

    def fail(self, claim: Token) -> str:
        if not self.owns(claim):
            return "lost"
        job = self.jobs[claim.job_id]
        if not self._obey_cancel(job):
            self._follow(job, "fail", "failed", "failed")
        return "done"

    def give_back(self, claim: Token, charge: bool) -> str:
        if not self.owns(claim):
            return "lost"
        job = self.jobs[claim.job_id]
        if self._obey_cancel(job) or self._obey_pause(job):
            return "done"
        if charge and job.attempt >= MAX_ATTEMPTS:
            self._follow(job, "fail", "failed", "failed")
            return "done"
        if charge:
            job.not_before = self.now + _backoff_ms(job.attempt)
        else:
            job.attempt -= 1
        self._follow(job, "give_back", "queued", "given back")
        return "done"

    def give_back_for_storage(self, claim: Token) -> str:
        """The disk was full: uncharged, but not for ever."""
        if not self.owns(claim):
            return "lost"
        job = self.jobs[claim.job_id]
        if self._obey_cancel(job) or self._obey_pause(job):
            return "done"
        if job.storage_failures >= MAX_STORAGE_FAILURES:
            self._follow(job, "fail", "failed", "failed")
            return "done"
        job.attempt, job.storage_failures = job.attempt - 1, job.storage_failures + 1
        job.not_before = self.now + STORAGE_WAIT_MS
        self._follow(job, "give_back", "queued", "given back")
        return "done"

    def take_back(self, trainer: str, held: Sequence[str]) -> int:
        """Give back what this trainer was given without its knowing; how many jobs."""
        unheld = [job for job in self.in_state("running") if job.owner == trainer and job.id not in held]
        for job in unheld:
            job.attempt -= 1
            self._follow(job, "give_back", "queued", "given back")
        return len(unheld)

    def obey(self, claim: Token, order: str) -> str:
        """Stop as the order that a beat has brought says."""
        if not self.owns(claim):
            return "lost"
        job = self.jobs[claim.job_id]
        if not (self._obey_cancel(job) or (order == "pause" and self._obey_pause(job))):
            raise AssertionError(f"the order {order!r} was never given")
        return "done"

    # -- what sweepers do

    def sweep(self, may_expire: bool, max_job_ms: int | None = None) -> tuple[int, ...]:
        """Numbers of jobs overdue, requeued, failed, cancelled, paused and waiting, and 1 if a ring is due."""
        overdue = [job for job in self.in_state("running", "queued") if self._is_overdue(job, max_job_ms)]
        for job in overdue:
            job.cancel_asked = True
        ends: list[str] = []
        for job in self.in_state("queued"):
            if job.cancel_asked or job.pause_asked:
                end = ("cancel_queued", "cancelled") if job.cancel_asked else ("pause_queued", "paused")
                self._follow(job, *end)
                ends.append(job.state)
        for job in self.in_state("running") if may_expire else []:
            if job.lease_expires_at is not None and job.lease_expires_at < self.now:
                self._lose(job)
                ends.append(job.state)
        waiting = [job for job in self.in_state("queued") if job.not_before <= self.now]
        unheard = [job for job in waiting if job.rung_at is None or job.rung_at < self.now - RING_AGAIN_MS]
        counts = [ends.count(state) for state in ("queued", "failed", "cancelled", "paused")]
        return (len(overdue), *counts, len(waiting), int(bool(unheard)))

    def _is_overdue(self, job: ModelJob, max_job_ms: int | None) -> bool:
        return max_job_ms is not None and not job.cancel_asked and job.fence > 0 and job.ran_ms(self.now) > max_job_ms

    def _lose(self, job: ModelJob) -> None:
        job.attempts[-1].ended_at = job.lease_expires_at
        if job.cancel_asked:
            self._follow(job, "cancel", "cancelled", "cancelled")
        elif job.attempt >= MAX_ATTEMPTS:
            self._follow(job, "give_up", "failed", "lost")
        elif job.pause_asked:
            job.runs_alone = True
            self._follow(job, "pause", "paused", "paused")
        else:
            job.runs_alone, job.not_before = True, self.now + _backoff_ms(job.attempt)
            self._follow(job, "lose", "queued", "lost")

    def mark_rung(self) -> str:
        for job in self.in_state("queued"):
            if job.not_before <= self.now:
                job.rung_at = self.now
        return "done"

    # -- steps that several verbs share

    def _obey_cancel(self, job: ModelJob) -> bool:
        if job.cancel_asked:
            self._follow(job, "cancel", "cancelled", "cancelled")
        return job.cancel_asked

    def _obey_pause(self, job: ModelJob) -> bool:
        if job.pause_asked:
            job.attempt -= 1
            self._follow(job, "pause", "paused", "paused")
        return job.pause_asked

    def _follow(self, job: ModelJob, arc: str, state: str, outcome: str | None = None) -> None:
        self.followed.add(arc)
        if outcome is not None:
            last = job.attempts[-1]
            last.outcome, last.ended_at = outcome, self.now if last.ended_at is None else last.ended_at
        if state != "running":
            job.owner = job.lease_expires_at = None
        if state == "queued":
            job.rung_at = None
        job.state = state

    def _live(self, tenant: str, name: str) -> list[ModelVersion]:
        mine = [version for version in self.versions.values() if (version.tenant, version.name) == (tenant, name)]
        return [version for version in mine if version.deleted_at is None]


def _joins(job: ModelJob, holds_base: str | None) -> bool:
    """True if a trainer that runs others already may take this one too."""
    return job.base == holds_base and not job.runs_alone


def _backoff_ms(attempt: int) -> int:
    """Half a lease after the first attempt, twice that after the next, ten minutes at most."""
    return int(min(LEASE_MS // 2 * 2 ** (attempt - 1), MAX_BACKOFF_MS))
