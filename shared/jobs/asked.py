"""What a user asks of a job: submit, cancel, pause, resume."""

from shared.db import Tx
from shared.jobs.queries import NewJob
from shared.tables import Job


def submit(tx: Tx, new: NewJob, *, max_queued: int) -> Job:
    """A new queued job; raises QueueFull. Ring the doorbell after the commit, never before."""
    raise NotImplementedError


def request_cancel(tx: Tx, tenant: str, job_id: str) -> Job:
    """The job, cancelled if nobody trains it, else asked to stop; StateConflict if it has ended. Twice is once."""
    raise NotImplementedError


def request_pause(tx: Tx, tenant: str, job_id: str) -> Job:
    """The job, paused if nobody trains it, else asked to pause; StateConflict if it has ended. Twice is once."""
    raise NotImplementedError


def resume(tx: Tx, tenant: str, job_id: str) -> Job:
    """The paused job, queued again; StateConflict if it is not paused."""
    raise NotImplementedError
