"""The ledger after it came out of a backup: whoever ran its jobs then does so no more."""

from typing import Final

from sqlalchemy import select, update

from shared.db import Tx, now_ms
from shared.jobs.arcs import follow
from shared.tables import Job, JobState

_MESSAGE: Final = "The service was restored from a backup; the job was put back in the queue."


def put_back_restored(tx: Tx) -> int:
    """Put the jobs that ran when the backup was made back into the queue, without charging the attempt, and raise the
    fence of every unfinished job beyond any that a program of before may hold. Returns how many ran.

    Fences given out after the backup were lost with it: without the jump one of them would be given out twice, and a
    trainer left over from before would own the job as well. The jump is the time, in ms: more than a job can have had
    claims, and never the same when one backup is restored twice. An attempt ended with its last heartbeat: the time
    that the backup lay somewhere is not time that the job ran.
    """
    running = tx.execute(select(Job.id, Job.heartbeat_at).where(Job.state == JobState.RUNNING)).all()
    for job_id, heartbeat_at in running:
        values = {"attempt": Job.attempt - 1}
        follow(tx, "give_back", job_id, values=values, message=_MESSAGE, ended_at=heartbeat_at)
    unfinished = update(Job).where(Job.finished_at.is_(None))
    tx.execute(unfinished.values(fence=Job.fence + now_ms(tx)), execution_options={"synchronize_session": False})
    return len(running)
