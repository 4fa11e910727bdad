"""The sweeper process: mends the ledger, rings for what waits, and cleans the store, again and again."""

import threading

from sqlalchemy import Engine

from shared.queue import Queue
from shared.store.layout import Layout


class Sweeper:
    """Runs all rules every `sweep_s`; expires leases only after it has itself seen the database for one lease time."""

    def __init__(self, *, lease_s: float, sweep_s: float) -> None:
        self.lease_s = lease_s
        self.sweep_s = sweep_s

    def run(self, engine: Engine, layout: Layout, queue: Queue, stop: threading.Event) -> None:
        """Sweep until `stop` is set; a database or broker that is away is waited for."""
        raise NotImplementedError
