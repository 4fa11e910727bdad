"""The programs of the service, one command each. All but the sweeper take this process's place (exec)."""

import importlib.util
import os
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

import click

import shared
from shared import db, logs
from shared.cli.startup import (
    PORT_PATIENCE_S,
    prepare_data_dir,
    refuse,
    refuse_network_sqlite,
    refuse_newer_schema,
    refuse_open_door,
    refuse_taken_port,
)
from shared.config import Settings, environment_for
from shared.errors import StartupError

CODE_DIR = Path(shared.__file__).parent.parent
"""Programs start here, so that `api` and `worker` are ours and not a directory of that name where the user stands."""

API_STOP_S = 5
"""Requests still being answered get this long when the API stops."""


def api_command(settings: Settings) -> list[str]:
    """The API's command line: one gunicorn worker process, a thread per request."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    options = {
        "--bind": f"{host}:{settings.port}",
        "--worker-class": "api.server.PatientWorker",
        "--workers": "1",  # whatever WEB_CONCURRENCY says: rates, metrics and seats are counted in one process
        "--threads": str(settings.api_threads),
        "--timeout": "60",  # of a worker whose main loop hangs; a request may take longer
        "--graceful-timeout": str(API_STOP_S),
        "--keep-alive": "15",
        "--log-level": "warning",
    }
    flat = [word for option in options.items() for word in option]
    # The control socket would lie in the home directory and be shared by every gunicorn of this user.
    return [sys.executable, "-m", "gunicorn", *flat, "--no-control-socket", "api.app:create_app_from_env()"]


def worker_command(program: str) -> list[str]:
    """The command line of worker.trainer, worker.generator or worker.importer."""
    return [sys.executable, "-m", f"worker.{program}"]


def require_installed(module: str, extra: str) -> None:
    """Raise StartupError, naming the extra to install, if the module is not there."""
    if importlib.util.find_spec(module) is None:
        raise StartupError(f"this needs the '{extra}' extra, which is not installed: pip install 'lorad[{extra}]'")


def become(command: list[str], settings: Settings, *, program: str = "") -> NoReturn:
    """Replace this process by `command`, which reads the same settings."""
    os.chdir(CODE_DIR)
    os.execve(command[0], command, environment_for(settings, program=program))  # noqa: S606  # a list of our own, no shell


@click.command()
def api() -> None:
    """Serve HTTP until stopped."""
    settings = Settings.from_env()
    require_installed("gunicorn", "api")
    refuse(settings)
    refuse_newer_schema(settings)
    refuse_open_door(settings)
    refuse_taken_port(settings, patience_s=PORT_PATIENCE_S)
    become(api_command(settings), settings, program="api")


@click.command()
def trainer() -> None:
    """Train queued jobs until stopped."""
    settings = Settings.from_env()
    require_installed("torch", "worker")
    refuse(settings)
    refuse_newer_schema(settings)
    become(worker_command("trainer"), settings, program="trainer")


@click.command()
def generator() -> None:
    """Answer generation requests until stopped."""
    settings = Settings.from_env()
    require_installed("torch", "worker")
    refuse(settings)
    refuse_newer_schema(settings)
    become(worker_command("generator"), settings, program="generator")


@click.command()
def sweeper() -> None:
    """Mend the ledger and clean the store until stopped; several may run."""
    from shared.queue import Queue
    from shared.store.layout import Layout
    from shared.sweeper import Sweeper

    settings = Settings.from_env()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    refuse(settings)
    layout = Layout(settings.data_dir)
    engine = db.open_engine(settings.database_url)
    db.check_schema(engine)
    logs.set_up(secrets=settings.secrets)
    queue = Queue(settings.resolved_broker_url)
    rules = Sweeper(
        lease_s=settings.lease_s,
        sweep_s=settings.sweep_s,
        max_job_s=settings.max_job_s,
        max_running=settings.max_running_jobs,
    )
    rules.run(engine, layout, queue, stop)
    queue.close()
    engine.dispose()


@click.command()
@click.option("--down-to", metavar="REVISION", help="Go back to an older schema instead, for an older lorad.")
def migrate(down_to: str | None) -> None:
    """Bring the database to this code's schema; needed once after each update, `lorad up` does it by itself.

    With --down-to stop every program first; what only newer schemas know is lost.
    """
    settings = Settings.from_env()
    if settings.database_url.startswith("sqlite"):
        refuse_network_sqlite(settings)
        prepare_data_dir(settings)
    if down_to is None:
        db.migrate(settings.database_url)
    else:
        db.downgrade(settings.database_url, down_to)


COMMANDS = (api, trainer, generator, sweeper, migrate)
