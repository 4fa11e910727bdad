"""The database frozen, cut off, cut off for one trainer only, and a COMMIT whose answer never comes."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

import psutil

from shared.tables import JobState
from tests.chaos.bench import Bench
from tests.chaos.faults import fault
from tests.chaos.lab import Lab
from tests.chaos.programs import wait_until
from tests.chaos.proxy import Proxy

LEASE_S: Final = 4.0
OUTAGE_S: Final = 3 * LEASE_S
"""As long, in leases, as three minutes are with the lease of a minute that lorad has unless told otherwise."""


@fault("F12", "postgres-frozen", bound_s=150)
def postgres_frozen(bench: Bench) -> None:
    """Postgres answers nothing for three leases, connections open: no job is taken from its trainer."""

    @contextmanager
    def frozen() -> Iterator[None]:
        server = psutil.Process(bench.postgres.pid)
        family = [server, *server.children(recursive=True)]
        for process in family:
            process.suspend()
        try:
            yield
        finally:
            for process in family:
                process.resume()

    with bench.lab("postgres", lease_s=LEASE_S) as lab:
        _outage(lab, lab.database_url, frozen)


@fault("F12", "postgres-away", bound_s=150)
def postgres_away(bench: Bench) -> None:
    """Postgres is gone for three leases, every connection lost and each new one refused: the same."""
    with bench.lab("postgres", lease_s=LEASE_S) as lab, Proxy(bench.postgres.port) as proxy:

        @contextmanager
        def cut() -> Iterator[None]:
            proxy.cut()
            try:
                yield
            finally:
                proxy.heal()

        _outage(lab, _through(lab, bench, proxy), cut)


def _outage(lab: Lab, database_url: str, broken: Callable[[], AbstractContextManager[None]]) -> None:
    lab.trainer(slots=4, database_url=database_url)
    for _ in range(2):
        lab.sweeper(database_url=database_url)
    during = lab.submit(2, seconds=6, name="ends-during")
    after = lab.submit(2, seconds=24, name="ends-after")
    for job_id in [*during, *after]:
        lab.wait_for_step(job_id, 1)
    # A sweeper must have watched for a lease before the outage: only then would it dare to take jobs away.
    time.sleep(LEASE_S)
    with broken():
        time.sleep(OUTAGE_S)

    lab.wait_succeeded([*during, *after], at_most_s=60)

    assert [lab.outcomes(job_id) for job_id in [*during, *after]] == [["succeeded"]] * 4


@fault("F13", "database-cut-for-one-trainer", bound_s=180)
def cut_for_one(bench: Bench) -> None:
    """One trainer alone loses the database: another takes its job over and ends it; the first one notices within 20 s
    of its return, and publishes nothing."""
    with bench.lab("postgres", lease_s=LEASE_S) as lab, Proxy(bench.postgres.port) as proxy:
        alone = lab.trainer(database_url=_through(lab, bench, proxy))
        [job_id] = lab.submit(seconds=30)
        lab.wait_for_step(job_id, 5)
        proxy.cut()
        lab.sweeper()
        lab.trainer()
        wait_until("a takeover", lambda: lab.row(job_id).attempt == 2, at_most_s=60)
        assert not alone.said("ownership lost")
        proxy.heal()

        wait_until("the first trainer to notice", lambda: alone.said("ownership lost"), at_most_s=20)
        lab.wait_succeeded([job_id], at_most_s=90)
        assert lab.outcomes(job_id) == ["lost", "succeeded"]
        assert alone.is_alive


@fault("F14", "commit-answer-lost", fast=True)
def commit_answer_lost(bench: Bench) -> None:
    """The connection breaks at the COMMIT of a publication, once after it was carried out and once before it arrived:
    the trainer looks, and there is exactly one version, in the first attempt."""
    with bench.lab("postgres", lease_s=60.0) as lab, Proxy(bench.postgres.port) as proxy:
        lab.trainer(database_url=_through(lab, bench, proxy))
        for lost in ("answer", "request"):
            proxy.lose(lost, of=b"COMMIT", after=b"INSERT INTO adapter_versions")
            [job_id] = lab.submit(steps=3, name=lost)

            lab.wait_succeeded([job_id])

            assert proxy.sprung.is_set(), "the COMMIT was not caught"
            assert (lab.row(job_id).state, lab.outcomes(job_id)) == (JobState.SUCCEEDED, ["succeeded"])


def _through(lab: Lab, bench: Bench, proxy: Proxy) -> str:
    """The lab's database by way of the proxy."""
    return lab.database_url.replace(f":{bench.postgres.port}/", f":{proxy.port}/")
