"""How a worker process runs: one Celery worker with the threads pool, until a signal ends it."""

import sys
from collections.abc import Callable, Sequence

from celery import Celery
from celery.signals import setup_logging

from shared.errors import LoradError


def run_worker(
    app: Celery, *, queues: Sequence[str], threads: int, while_running: Callable[..., object] | None = None
) -> None:
    """Consume `queues` with `threads` tasks at once and exit the process with the worker's code.

    Not prefork: a MemoryError in a task ends such a worker, its children may have no children, and CUDA does not
    survive a fork. `while_running(worker)` is called once before the start, for who adds queues later.
    """
    setup_logging.connect(_leave_logging_alone, weak=False)
    worker = app.Worker(
        pool="threads",
        concurrency=threads,
        queues=list(queues),
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    if while_running is not None:
        while_running(worker)
    worker.start()
    sys.exit(worker.exitcode or 0)


def _leave_logging_alone(**_: object) -> None:
    """Programs have set it up with `shared.logs`; a receiver, whatever it does, keeps Celery from doing so."""


def exit_with_one_line(program: Callable[[], None]) -> None:
    """Run a program's main; a LoradError becomes one line on stderr and exit code 2."""
    try:
        program()
    except LoradError as error:
        print(f"lorad: {error.message}", file=sys.stderr)
        sys.exit(2)
