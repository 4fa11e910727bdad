"""Wrong clocks, many writers, several sweepers, greedy tenants."""

import itertools
from typing import Final

from shared import db, jobs
from shared.specs import TrainSpec
from shared.tables import JobState
from tests.chaos.bench import Bench, Database
from tests.chaos.faults import fault
from tests.chaos.lab import Lab
from tests.chaos.programs import wait_until

HOUR_S: Final = 3600.0
_NUMBERS: Final = itertools.count()


@fault("F23", "clocks-an-hour-off")
def clocks_off(bench: Bench) -> None:
    """Trainers, sweepers and the API each live in another hour: nothing changes, since only the database's counts.

    What is moved is Python's clock in each program. SQLite would ask the system for the time, so this is Postgres.
    """
    with bench.lab("postgres") as lab:
        for skew_s in (HOUR_S, -HOUR_S):
            lab.sweeper(skew_s=skew_s)
            lab.trainer(slots=2, skew_s=skew_s)
        ids = lab.submit(4, seconds=6)
        for skew_s in (HOUR_S, -HOUR_S):
            api = lab.api(skew_s=skew_s)
            answer = api.submit(api.upload(), key="the-same")
            assert answer.status_code in (200, 422), answer.text
        ids += [row.id for row in lab.rows() if row.id not in ids]

        lab.wait_succeeded(ids)

        assert len(ids) == 5, "another data set under the same key is another request, whatever the hour"
        assert [lab.outcomes(job_id) for job_id in ids] == [["succeeded"]] * 5


@fault("F26", "sqlite-eight-writers")
def eight_writers(bench: Bench) -> None:
    """Eight processes submit, claim, report, cancel, publish and read on one SQLite file: none ever sees 'locked'."""
    with bench.lab(all_ended=False) as lab:
        call = "tests.chaos.crowd:use_ledger"
        place = [lab.database_url, str(lab.layout.root), lab.base_id, lab.file_id]
        crowd = [lab.start("crowd", call=call, arguments=[*place, number, 15.0]) for number in range(8)]
        for process in crowd:
            process.wait_dead(90)

        told = {process.name: process.log.read_text() for process in crowd}
        assert [process.code for process in crowd] == [0] * 8, told
        assert not any("locked" in text for text in told.values())
        ended = [int(text.split()[1]) for text in told.values()]
        assert sum(ended) == sum(JobState(row.state).is_terminal and row.fence > 0 for row in lab.rows())
        assert min(ended) > 0


@fault("F28", "sweepers-compete")
def sweepers_compete(bench: Bench) -> None:
    """Two sweepers find the same lost jobs and one of them is killed: each job is lost once, and all go on."""
    with bench.lab("postgres") as lab:
        sweepers = [lab.sweeper() for _ in range(2)]
        trainer = lab.trainer(slots=4)
        ids = lab.submit(4, seconds=3)
        for job_id in ids:
            lab.wait_for_step(job_id, 1)
        trainer.kill()
        wait_until("a lost job", lambda: JobState.QUEUED in lab.states(ids), at_most_s=60)
        sweepers[0].kill()
        lab.trainer(slots=4)

        lab.wait_succeeded(ids, at_most_s=90)

        assert [lab.outcomes(job_id) for job_id in ids] == [["lost", "succeeded"]] * 4
        for job_id in ids:
            assert sum(message.startswith("The trainer was lost") for message in lab.messages(job_id)) == 1


@fault("F32", "greedy-tenant")
def greedy_tenant(bench: Bench) -> None:
    """A thousand jobs of one tenant and then one of another: that one starts after at most one more of the first."""
    for database in ("sqlite", "postgres"):
        _fair(bench, database)


def _fair(bench: Bench, database: Database) -> None:
    with bench.lab(database, all_ended=False) as lab:
        _queue(lab, "greedy", 1000)
        _claim(lab)
        [modest] = _queue(lab, "modest", 1)

        claimed = [_claim(lab) for _ in range(2)]

        assert modest in claimed, f"on {database}, two jobs of the greedy tenant came first"


def _queue(lab: Lab, tenant: str, count: int) -> list[str]:
    new = jobs.NewJob(
        tenant=tenant, base_model_id=lab.base_id, training_file_id=lab.file_id, adapter_name="fair", spec=TrainSpec()
    )
    with db.write(lab.engine) as tx:
        return [jobs.submit(tx, new, max_queued=10_000).id for _ in range(count)]


def _claim(lab: Lab) -> str:
    """The job that a fresh trainer would get now."""
    with db.write(lab.engine) as tx:
        claim = jobs.claim_next(tx, trainer=f"trainer-{next(_NUMBERS)}", lease_s=60.0)
    assert claim is not None
    return claim.job_id
