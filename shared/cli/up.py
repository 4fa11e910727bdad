"""`lorad up`: the whole service on this machine, from an empty directory to the line that says it is ready."""

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TextIO
from urllib.parse import urlsplit

import click

from shared import db
from shared.cli import broker
from shared.cli.servers import (
    API_STOP_S,
    CODE_DIR,
    api_command,
    require_installed,
    worker_command,
)
from shared.cli.startup import refuse, refuse_open_door, refuse_taken_port
from shared.cli.supervisor import Program, Supervisor
from shared.config import Settings, environment_for
from shared.errors import StartupError

START_S = 120.0
TRAINER_STOP_S = 30.0
"""A stopping trainer writes a checkpoint."""
TRIES_TO_START = 3


@click.command("up")
@click.option("--trainer/--no-trainer", default=True, help="Train jobs on this machine.")
@click.option("--generator/--no-generator", default=True, help="Generate on this machine.")
def command(trainer: bool, generator: bool) -> None:
    """Run the whole service on this machine until Ctrl-C."""
    settings = Settings.from_env()
    workers = [name for name, wanted in (("trainer", trainer), ("generator", generator)) if wanted]
    require_installed("gunicorn", "api")
    if workers:
        require_installed("torch", "worker")
    refuse(settings)
    with _only_one(settings.data_dir):
        refuse_taken_port(settings)
        db.migrate(settings.database_url)
        refuse_open_door(settings)
        with _broker_socket(settings), Supervisor(sys.stderr.buffer) as supervisor:
            _run(settings, supervisor, workers)


def _run(settings: Settings, supervisor: Supervisor, workers: list[str]) -> None:
    """Start everything, say so, watch until a signal, stop everything: who asks first, who is asked last."""
    env = environment_for(settings, program="server")
    if settings.broker_url is None:
        supervisor.start(Program("valkey", broker.broker_command(settings), env, CODE_DIR))
        _wait(supervisor, "the broker", lambda: broker.answers(settings.embedded_broker_socket), at_most_s=START_S)
    supervisor.start(Program("api", api_command(settings), env, CODE_DIR, stop_s=API_STOP_S + 5))
    supervisor.start(Program("sweeper", [sys.executable, "-m", "shared.cli", "sweeper"], env, CODE_DIR))
    for name in workers:
        stop_s = TRAINER_STOP_S if name == "trainer" else 10.0
        supervisor.start(
            Program(name, worker_command(name), environment_for(settings, program=name), CODE_DIR, stop_s=stop_s)
        )
    _wait(supervisor, "the API", lambda: _is_ready(settings), at_most_s=START_S)
    if not supervisor.is_stopping:
        print(f"lorad is ready: {_url(settings)} (data in {settings.data_dir})", flush=True)
    while not supervisor.is_stopping:
        supervisor.tick(3600)
    supervisor.stop("api")
    supervisor.stop("sweeper", *workers)


def _wait(supervisor: Supervisor, what: str, condition: Callable[[], bool], *, at_most_s: float) -> None:
    """Return once `condition` holds or a signal came; StartupError if a program cannot start or time is up."""
    until = time.monotonic() + at_most_s
    while not supervisor.is_stopping and not condition():
        for ended in supervisor.tick(0.1):
            # Exit code 2 means what it means for every command here: the user must mend something.
            if ended.code == 2 or ended.count >= TRIES_TO_START:
                raise StartupError(f"{ended.name} does not start (exit code {ended.code}); its lines above say why")
        if time.monotonic() > until:
            raise StartupError(f"{what} was not ready after {at_most_s:g} s; the lines above may say why")


@contextmanager
def _only_one(data_dir: Path) -> Iterator[None]:
    """Hold the data directory's lock; StartupError if another `lorad up` has it. The kernel frees it if we die."""
    path = data_dir / "up.lock"
    with _locked(path) as lock:
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> TextIO:
    while True:
        try:
            lock = path.open("a+")
        except OSError as error:
            raise StartupError(f"cannot write to the data directory {path.parent}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with lock:
                lock.seek(0)
                holder = lock.read().strip() or "?"
            raise StartupError(f"another 'lorad up' (process {holder}) uses {path.parent}") from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        lock.close()  # its holder removed it between our open and our lock


@contextmanager
def _broker_socket(settings: Settings) -> Iterator[None]:
    """A place for the embedded broker's socket, empty before and gone afterwards."""
    if settings.broker_url is not None:
        yield
        return
    broker.prepare_socket(settings.embedded_broker_socket)
    try:
        yield
    finally:
        broker.remove_socket(settings)


def _url(settings: Settings) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104  # compared, not bound
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def _is_ready(settings: Settings) -> bool:
    address = urlsplit(_url(settings))
    with closing(HTTPConnection(address.hostname or "", address.port, timeout=2)) as connection:
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False


COMMANDS = (command,)
