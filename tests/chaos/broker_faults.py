"""The broker lost, hung, flushed, slow; messages lost and repeated. The database has the jobs."""

import time

from sqlalchemy import select

from shared import db
from shared.tables import Job, JobState
from tests.chaos.bench import Bench
from tests.chaos.client import Client
from tests.chaos.faults import fault
from tests.chaos.lab import PATIENCE_S, Lab
from tests.chaos.programs import wait_until
from tests.chaos.proxy import Proxy

ANSWERED_IN_S = 3.0


@fault("F3", "broker-flushed", bound_s=150, fast=True)
def flushed(bench: Bench) -> None:
    """FLUSHALL with 20 jobs queued for which the doorbell has rung: all run within 60 s."""
    with bench.lab() as lab:
        ids = lab.submit(20, steps=2)
        lab.sweeper()
        wait_until("the doorbell", lambda: _unheard(lab) == 0, at_most_s=30)
        lab.broker.client.flushall()
        flushed_s = time.monotonic()

        lab.trainer(slots=4)
        lab.wait_succeeded(ids, at_most_s=PATIENCE_S - (time.monotonic() - flushed_s))

        assert [lab.outcomes(job_id) for job_id in ids] == [["succeeded"]] * 20


def _unheard(lab: Lab) -> int:
    with db.read(lab.engine) as tx:
        return len(list(tx.scalars(select(Job.id).where(Job.state == JobState.QUEUED, Job.rung_at.is_(None)))))


@fault("F3", "broker-killed")
def killed(bench: Bench) -> None:
    """kill -9 of the broker and an empty one in its place, 2 jobs running and 20 queued: the two never notice, the
    others run within 60 s."""
    with bench.lab() as lab:
        lab.sweeper()
        lab.trainer(slots=2)
        running = lab.submit(2, seconds=5)
        for job_id in running:
            lab.wait_for_step(job_id, 1)
        queued = lab.submit(20, steps=2, name="queued")
        lab.kill_broker()
        lab.start_broker()

        lab.wait_succeeded([*running, *queued])

        assert [lab.outcomes(job_id) for job_id in [*running, *queued]] == [["succeeded"]] * 22


@fault("F4", "broker-down")
def down(bench: Bench) -> None:
    """No broker: jobs are taken within 3 s each, and run within 60 s of its return."""
    with bench.lab() as lab:
        api, file_id = _started(lab)
        lab.kill_broker()
        wait_until("the broker's end", lambda: not lab.queue.ping(), at_most_s=10)

        _submits_in_time(api, file_id)
        lab.start_broker()

        lab.wait_succeeded([row.id for row in lab.rows()])


@fault("F5", "broker-hung")
def hung(bench: Bench) -> None:
    """A broker that answers nothing, with its connections open: the same."""
    with bench.lab() as lab:
        api, file_id = _started(lab)
        lab.broker.hang()
        try:
            _submits_in_time(api, file_id)
        finally:
            lab.broker.wake()

        lab.wait_succeeded([row.id for row in lab.rows()])


def _started(lab: Lab) -> tuple[Client, str]:
    """An API with a data set, a trainer that has trained, and a sweeper."""
    lab.trainer()
    lab.sweeper()
    api = lab.api()
    file_id = api.upload()
    api.submit(file_id)
    lab.wait_succeeded([row.id for row in lab.rows()])
    return api, file_id


def _submits_in_time(api: Client, file_id: str) -> None:
    for _ in range(3):
        began_s = time.monotonic()
        answer = api.submit(file_id)
        took_s = time.monotonic() - began_s
        assert answer.status_code in (200, 202), answer.text
        assert took_s < ANSWERED_IN_S, f"a submit took {took_s:.1f} s"


@fault("F11", "doorbell-fifty-times", fast=True)
def fifty_times(bench: Bench) -> None:
    """The same message fifty times to two trainers: each job is claimed once and trained once."""
    with bench.lab() as lab:
        for _ in range(2):
            lab.trainer(slots=2)
        ids = lab.submit(4, steps=5, ring=False)
        for _ in range(50):
            assert lab.queue.ring_trainers()

        lab.wait_succeeded(ids)
        wait_until("all messages to be taken", lambda: lab.queue.num_doorbells() == 0, at_most_s=30)

        assert [(lab.row(job_id).fence, lab.row(job_id).attempt) for job_id in ids] == [(1, 1)] * 4


@fault("F30", "slow-and-reset", bound_s=240)
def slow_and_reset(bench: Bench) -> None:
    """The ways to database and broker are slow, and their connections are reset time and again: jobs take longer,
    nothing else."""
    with (
        bench.lab("postgres", lease_s=10.0) as lab,
        Proxy(bench.postgres.port) as to_database,
        Proxy(_port(lab.broker.url)) as to_broker,
    ):
        to_database.latency_s = to_broker.latency_s = 0.02
        way = {
            "database_url": lab.database_url.replace(f":{bench.postgres.port}/", f":{to_database.port}/"),
            "broker_url": f"redis://127.0.0.1:{to_broker.port}/0",
        }
        lab.trainer(slots=2, **way)
        lab.sweeper(**way)
        ids = lab.submit(4, seconds=8)
        lab.wait_for_step(ids[0], 1)
        for proxy in (to_database, to_broker) * 4:
            before = _standing(lab)
            proxy.reset_all()
            wait_until("progress", lambda then=before: _standing(lab) != then, at_most_s=PATIENCE_S)

        lab.wait_succeeded(ids, at_most_s=150)
        assert {lab.row(job_id).attempt for job_id in ids} == {1}


def _standing(lab: Lab) -> list[tuple[str, int]]:
    return [(row.state, row.step) for row in lab.rows()]


def _port(url: str) -> int:
    return int(url.removesuffix("/0").rpartition(":")[2])
