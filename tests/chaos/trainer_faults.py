"""Trainers killed, frozen, terminated, out of memory; jobs that kill them."""

import random
import signal
from typing import Final

from shared.tables import JobState
from tests.chaos.bench import Bench
from tests.chaos.faults import fault
from tests.chaos.lab import PATIENCE_S
from tests.chaos.programs import wait_until

NUM_JOBS: Final = 30
NUM_KILLS: Final = 8


@fault("F6", "kill-loop", bound_s=420)
def kill_loop(bench: Bench) -> None:
    """kill -9 of a random trainer again and again under 30 jobs: all end, each well unless its trainer was killed in
    every attempt, and none goes back behind its last checkpoint."""
    draw = random.Random(6)
    with bench.lab("postgres") as lab:
        lab.sweeper()
        ids = lab.submit(NUM_JOBS, steps=120, every=20)
        with lab.kept_alive(2, lambda: lab.trainer(slots=3)) as trainers:
            for _ in range(NUM_KILLS):
                ended = sum(state.is_terminal for state in lab.states(ids))
                wait_until(
                    "jobs at work", lambda: JobState.RUNNING in lab.states(ids) or _all_over(lab.states(ids)),
                    at_most_s=PATIENCE_S,
                )  # fmt: skip
                wait_until(
                    "a job to end", lambda before=ended: sum(s.is_terminal for s in lab.states(ids)) > before
                    or _all_over(lab.states(ids)), at_most_s=PATIENCE_S,
                )  # fmt: skip
                draw.choice(trainers).kill()
            lab.wait_ended(ids, at_most_s=300)

        lost = {job_id: lab.outcomes(job_id).count("lost") for job_id in ids}
        assert sum(lost.values()) >= 1, "no kill met a job"
        for job_id in ids:
            assert lab.row(job_id).state == JobState.SUCCEEDED or lost[job_id] == 3, lab.row(job_id).error


def _all_over(states: list[JobState]) -> bool:
    return all(state.is_terminal for state in states)


@fault("F8", "trainer-killed-mid-step")
def killed_mid_step(bench: Bench) -> None:
    """SIGKILL as the OOM killer sends it: the attempt is lost, another trainer goes on from the newest checkpoint."""
    with bench.lab() as lab:
        dying = lab.trainer(failpoint="train.step:kill:35")
        lab.sweeper()
        [job_id] = lab.submit(steps=50, every=10)
        dying.wait_dead()
        lab.trainer()

        lab.wait_succeeded([job_id])

        assert dying.code == -signal.SIGKILL
        assert lab.outcomes(job_id) == ["lost", "succeeded"]
        assert any(message.startswith("Resuming from step") for message in lab.messages(job_id))


@fault("F9", "memory-error")
def memory_error(bench: Bench) -> None:
    """MemoryError in a training and in the task itself: the process lives, the one job fails with the reason, the other
    is taken up again, and the next job runs."""
    with bench.lab() as lab:
        trainer = lab.trainer(failpoint="train.step:memory:3,job.claimed:memory:2")
        lab.sweeper()
        first, second, third = lab.submit(3, steps=10)

        lab.wait_ended([first, second, third])

        assert trainer.is_alive
        assert lab.row(first).state == JobState.FAILED
        assert (lab.row(first).error or {})["code"] == "out_of_memory"
        assert lab.outcomes(second)[-1] == lab.outcomes(third)[-1] == "succeeded"
        assert {attempt for job_id in (second, third) for attempt in lab.outcomes(job_id)[:-1]} == {"lost"}


@fault("F10", "poison-job", bound_s=240)
def poison(bench: Bench) -> None:
    """A job that kills its trainer at the start: after three attempts it has failed, and all other jobs succeed."""
    with bench.lab() as lab:
        lab.sweeper()
        with lab.kept_alive(1, lambda: lab.trainer(slots=2, poison="poison")):
            before = lab.submit(2, seconds=3, name="before")
            [bad] = lab.submit(name="poison")
            after = lab.submit(2, steps=20, name="after")

            lab.wait_succeeded([*before, *after], at_most_s=120)
            lab.wait_ended([bad], at_most_s=120)

        assert lab.outcomes(bad) == ["lost"] * 3
        assert (lab.row(bad).error or {})["code"] == "attempts_exhausted"


@fault("F31", "terminated-while-training")
def terminated(bench: Bench) -> None:
    """SIGTERM, as a deployment sends it: within 30 s checkpoints are written, leases given back and nothing is charged;
    the next trainer goes on where the first one was, without a step made twice."""
    with bench.lab() as lab:
        lab.sweeper()
        leaving = lab.trainer(slots=3)
        ids = lab.submit(3, seconds=5)
        for job_id in ids:
            lab.wait_for_step(job_id, 5)
        leaving.send(signal.SIGTERM)
        leaving.wait_dead(30)

        assert leaving.code == 0
        assert {(lab.row(job_id).state, lab.row(job_id).attempt) for job_id in ids} == {(JobState.QUEUED, 0)}
        lab.trainer(slots=3)
        lab.wait_succeeded(ids)

        assert {lab.row(job_id).attempt for job_id in ids} == {1}
        for job_id in ids:
            steps = lab.steps(job_id)
            assert steps == list(range(1, len(steps) + 1)), f"steps were made twice: {steps}"
