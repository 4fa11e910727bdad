"""The sweeper as the program that it is: its settings reach its rules, and a restart of it does no harm."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import text

from shared.db import write
from shared.tables import JobState
from tests.shared.conftest import World

TIMEOUT_S = 60.0


@contextmanager
def sweeping(world: World, broker_url: str, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """`lorad sweeper` over this world, with short times; stopped by SIGTERM, be it that it has not quite begun.

    Half a lease is the gap in its own sweeping that it forgives, so it must be longer than a busy machine takes.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("LORAD_")} | {
        "LORAD_DATA_DIR": str(world.layout.root),
        "LORAD_DATABASE_URL": world.engine.url.render_as_string(hide_password=False),
        "LORAD_BROKER_URL": broker_url,
        "LORAD_SWEEP_S": "0.2",
        "LORAD_HEARTBEAT_S": "1",
        "LORAD_LEASE_S": "4",
        **settings,
    }
    with subprocess.Popen([sys.executable, "-m", "shared.cli", "sweeper"], env=env) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(TIMEOUT_S)
    assert code in (0, -signal.SIGTERM)


def wait_until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_the_time_limit_comes_from_the_settings(world: World, broker_url: str) -> None:
    """LORAD_MAX_JOB_S stops a job that has run for two hours; one that has run for a moment goes on."""
    old = world.running()
    with write(world.engine) as tx:
        tx.execute(text("UPDATE job_attempts SET started_at = started_at - 7200000"))
    young = world.running()
    for claim in (old, young):
        world.edit(claim.job_id, "lease_expires_at = lease_expires_at + 600000")
    with sweeping(world, broker_url, LORAD_MAX_JOB_S="3600"):
        wait_until(lambda: world.job(old.job_id).cancel_requested_at)

    assert (world.job(old.job_id).error or {}).get("code") == "time_limit"
    assert (world.job(young.job_id).cancel_requested_at, world.job(young.job_id).error) == (None, None)


def test_sweepers_that_restart_requeue_a_lost_job_once(world: World, broker_url: str) -> None:
    """Two at once, and a third after both were stopped: one loss, one event, and no attempt is taken twice."""
    claim = world.running()
    world.lose(claim)
    with sweeping(world, broker_url), sweeping(world, broker_url):
        wait_until(lambda: world.state(claim.job_id) == JobState.QUEUED)
    with sweeping(world, broker_url):
        wait_until(lambda: world.job(claim.job_id).rung_at)
    job = world.job(claim.job_id)

    assert (job.state, job.attempt, job.fence) == (JobState.QUEUED, 1, 1)
    assert sum(message.startswith("The trainer was lost") for message in world.messages(claim.job_id)) == 1
