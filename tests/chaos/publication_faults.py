"""A publication broken at each of its steps, by death, by a pause and by a cancel."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pytest

from shared import db, jobs
from shared.errors import StateConflict
from shared.tables import JobState
from tests.chaos.bench import Bench
from tests.chaos.faults import fault
from tests.chaos.lab import TENANT, Lab
from tests.chaos.programs import Process, wait_until

PUBLICATION: Final = (
    "adapter.before_fsync", "publish.before_fsync", "publish.before_fsync_dir", "adapter.before_rename",
    "publish.before_rename", "publish.after_rename", "adapter.published", "publish.before_commit",
    "publish.in_transaction", "publish.after_commit",
)  # fmt: skip
"""Every point that an adapter passes on its way. No job here saves a checkpoint, whose points have the same names."""
PAUSES: Final = (
    "job.claimed", "train.step:10", "adapter.before_fsync", "adapter.before_rename", "publish.before_commit",
)  # fmt: skip


@contextmanager
def _ringing(lab: Lab) -> Iterator[None]:
    """A doorbell that never rests: trainers that are about to die may take any number of messages with them."""
    ended = threading.Event()

    def ring() -> None:
        while not ended.wait(0.3):
            lab.queue.ring_trainers()

    thread = threading.Thread(target=ring, name="ringing", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(10)


def _armed(lab: Lab, points: tuple[str, ...], action: str) -> list[Process]:
    """A trainer for each point, which does `action` there."""
    place = [point.partition(":") for point in points]
    return [lab.trainer(failpoint=f"{name}:{action}{colon}{count}") for name, colon, count in place]


@fault("F18", "killed-while-publishing", bound_s=240)
def killed_while_publishing(bench: Bench) -> None:
    """A trainer dies at each point of a publication, while somebody reads the store all the time: there is a whole
    adapter or none, and each job has one version in the end."""
    with bench.lab("postgres", checkpoint_s=1000) as lab:
        dying = _armed(lab, PUBLICATION, "kill")
        ids = lab.submit(len(PUBLICATION), steps=5)
        with _ringing(lab):
            for trainer in dying:
                trainer.wait_dead(90)
        assert {trainer.code for trainer in dying} == {-signal.SIGKILL}
        assert lab.states(ids).count(JobState.SUCCEEDED) == 1, "only who died after COMMIT has published"
        lab.sweeper()
        lab.trainer(slots=4)

        lab.wait_succeeded(ids, at_most_s=120)

        assert sorted(lab.outcomes(job_id) for job_id in ids) == [["lost", "succeeded"]] * 9 + [["succeeded"]]


@fault("F7", "frozen-past-the-lease", bound_s=240)
def frozen(bench: Bench) -> None:
    """Trainers frozen after a claim, in mid-step, before an fsync, before the rename and before the transaction, until
    others have taken over and finished; woken up again they publish nothing, and live on."""
    with bench.lab("postgres", checkpoint_s=1000) as lab:
        zombies = _armed(lab, PAUSES, "stop")
        ids = lab.submit(len(PAUSES), steps=20)
        with _ringing(lab):
            for trainer in zombies:
                trainer.wait_stopped(90)
        lab.sweeper()
        lab.trainer(slots=4)
        lab.wait_succeeded(ids, at_most_s=120)
        assert all(trainer.is_stopped for trainer in zombies)
        for trainer in zombies:
            trainer.wake()
        for trainer in zombies:
            wait_until("a zombie to notice", lambda one=trainer: one.said("ownership lost"), at_most_s=30)

        assert [lab.outcomes(job_id) for job_id in ids] == [["lost", "succeeded"]] * len(PAUSES)
        assert all(trainer.is_alive for trainer in zombies)
        [after] = lab.submit(steps=3, name="after")
        lab.wait_succeeded([after])


@fault("F22", "cancel-races-publish", fast=True)
def cancel_races(bench: Bench) -> None:
    """A cancel right before the transaction of a publication wins, and nothing is published; right after its COMMIT it
    is refused, and the adapter stays."""
    with bench.lab(lease_s=60.0) as lab:
        trainer = lab.trainer(failpoint="publish.before_commit:stop,publish.after_commit:stop")
        early, late = lab.submit(2, steps=3)
        trainer.wait_stopped()
        with db.write(lab.engine) as tx:
            jobs.request_cancel(tx, TENANT, early)
        trainer.wake()
        lab.wait_ended([early])
        trainer.wait_stopped()
        with pytest.raises(StateConflict), db.write(lab.engine) as tx:
            jobs.request_cancel(tx, TENANT, late)
        trainer.wake()

        assert lab.states([early, late]) == [JobState.CANCELLED, JobState.SUCCEEDED]
