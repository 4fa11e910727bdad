"""The sweeper process: mends the ledger, rings for what waits, and cleans the store, again and again."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from sqlalchemy import Engine, select
from sqlalchemy.exc import DBAPIError

from shared import audit, db, idempotency, jobs
from shared.queue import Queue
from shared.store import adapters, garbage
from shared.store.layout import Layout

log = logging.getLogger(__name__)

CLEAN_EVERY_S: Final = 600.0
SCRUB_SAMPLE: Final = 4
MAX_RINGS: Final = 16


class _HungMeanwhile(Exception):
    """The sweep took so long that leases ran out while nobody could renew them; it is undone."""

    def __str__(self) -> str:
        return "it hung during a sweep"


class Sweeper:
    """Runs all rules every `sweep_s`.

    It takes jobs from trainers only after it has itself seen the database without a break for one lease time: when the
    database was away nobody could renew a lease, and every trainer must first get the chance.
    """

    def __init__(
        self,
        *,
        lease_s: float,
        sweep_s: float,
        max_job_s: float | None = None,
        max_running: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lease_s = lease_s
        self._sweep_s = sweep_s
        self._max_job_s = max_job_s
        self._max_running = max_running
        self._clock = clock
        self._seen_since: float | None = None
        self._seen_last = -float("inf")
        self._cleaned_at = -float("inf")
        self._unheeded: frozenset[str] = frozenset()

    def run(self, engine: Engine, layout: Layout, queue: Queue, stop: threading.Event) -> None:
        """Sweep until `stop` is set; a database or broker that is away is waited for."""
        while True:
            self.sweep_once(engine, queue)
            self.clean_if_due(engine, layout)
            if stop.wait(self._sweep_s):
                return

    def sweep_once(self, engine: Engine, queue: Queue) -> jobs.Swept | None:
        """What one sweep of the ledger did; None if the database does not answer."""
        try:
            with db.write(engine) as tx:
                tx.execute(select(1))  # what hung until now has let nobody renew a lease either
                may_expire, began = self._note_sight(), self._clock()
                swept = jobs.sweep(
                    tx,
                    may_expire=may_expire,
                    lease_s=self._lease_s,
                    max_job_s=self._max_job_s,
                    max_running=self._max_running,
                )
                if self._clock() - began > self._lease_s / 2:
                    raise _HungMeanwhile
            self._seen_last = self._clock()
            self._warn_of(frozenset(swept.unheeded))
            if swept.ring:
                self._ring(engine, queue, swept.waiting)
        except (DBAPIError, _HungMeanwhile) as error:
            log.warning("the database does not answer: %s", error)
            self._seen_since = None
            return None
        return swept

    def clean_if_due(self, engine: Engine, layout: Layout) -> None:
        """Every ten minutes: remove what nobody needs from the store, and look at a few adapters for damage."""
        if self._clock() - self._cleaned_at < CLEAN_EVERY_S:
            return
        self._cleaned_at = self._clock()
        try:
            removed = garbage.remove_old_staging(layout)
            with db.read(engine) as tx:
                removed += garbage.remove_orphans(tx, layout) + garbage.remove_deleted(tx, layout)
                corrupt = garbage.corrupt_versions(tx, layout, sample=SCRUB_SAMPLE)
            with db.write(engine) as tx:
                idempotency.forget_old(tx)
                audit.forget_old(tx)
                for version in corrupt:
                    log.error("adapter version %s no longer matches its checksums", version.id)
                    adapters.mark_corrupt(tx, version.id)
        except (DBAPIError, OSError) as error:
            log.warning("the store was not cleaned: %s", error)
            return
        if removed:
            log.info("removed %d entries from the store", removed)

    def _note_sight(self) -> bool:
        """True if the database has been in sight long enough to let leases expire. A gap in our own sweeping, as when
        this machine slept, counts as not having looked."""
        now = self._clock()
        if self._seen_since is None or now - self._seen_last > self._sweep_s + self._lease_s / 2:
            self._seen_since = now
        return now - self._seen_since >= self._lease_s

    def _warn_of(self, unheeded: frozenset[str]) -> None:
        """Log, once for each job, that its trainer is alive and does not stop."""
        for job_id in sorted(unheeded - self._unheeded):
            log.warning("%s: cancel was asked over a minute ago, its trainer is alive and has not stopped it", job_id)
        self._unheeded = unheeded

    def _ring(self, engine: Engine, queue: Queue, waiting: int) -> None:
        """One ring for each waiting job, up to a limit; noted only if the broker took them."""
        if all(queue.ring_trainers() for _ in range(min(waiting, MAX_RINGS))):
            with db.write(engine) as tx:
                jobs.mark_rung(tx)
