"""What the model of the ledger remembers: its numbers, jobs, attempts and versions."""

from dataclasses import dataclass, field
from typing import Any, Final

LEASE_MS: Final = 60_000
MAX_BACKOFF_MS: Final = 600_000
WAITED_TOO_LONG_MS: Final = 60_000
RING_AGAIN_MS: Final = 30_000
UNUSED_MS: Final = 240_000
STORAGE_WAIT_MS: Final = 600_000
MAX_ATTEMPTS: Final = 3
MAX_STORAGE_FAILURES: Final = 3
MAX_QUEUED: Final = 6
"""How many queued jobs a tenant may have in these tests."""

ENDED: Final = frozenset({"succeeded", "failed", "cancelled"})


@dataclass
class ModelAttempt:
    started_at: int
    ended_at: int | None = None
    outcome: str | None = None


@dataclass
class ModelJob:
    id: str
    tenant: str
    name: str
    base: str
    priority: int
    created_at: int
    state: str = "queued"
    fence: int = 0
    attempt: int = 0
    owner: str | None = None
    lease_expires_at: int | None = None
    not_before: int = 0
    runs_alone: bool = False
    cancel_asked: bool = False
    pause_asked: bool = False
    rung_at: int | None = None
    started_at: int | None = None
    step: int = 0
    storage_failures: int = 0
    attempts: list[ModelAttempt] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checkpoints: list[tuple[int, int]] = field(default_factory=list)

    def waited_ms(self, now: int) -> int:
        return now - max(self.not_before, self.created_at)

    def ran_ms(self, now: int) -> int:
        """All attempts together; that of a lost trainer ran until its lease ended."""
        lost = self.lease_expires_at is not None and self.lease_expires_at < now
        until = self.lease_expires_at if lost else now
        return sum((until if a.ended_at is None else a.ended_at) - a.started_at for a in self.attempts)

    def row(self) -> dict[str, Any]:
        """What the job's row must hold, as `ledger_calls.comparable` reads it."""
        return {
            "state": self.state,
            "fence": self.fence,
            "attempt": self.attempt,
            "lease_owner": self.owner,
            "lease_expires_at": self.lease_expires_at,
            "not_before": self.not_before,
            "runs_alone": self.runs_alone,
            "cancel_asked": self.cancel_asked,
            "pause_asked": self.pause_asked,
            "rung_at": self.rung_at,
            "started_at": self.started_at,
            "step": self.step,
            "storage_failures": self.storage_failures,
        }


@dataclass
class ModelVersion:
    id: str
    tenant: str
    name: str
    number: int
    job_id: str
    sha256: str
    deleted_at: int | None = None
