"""The client commands of `lorad`: they speak HTTP to LORAD_BASE_URL and know nothing else of the service."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from shared import limits
from shared.cli.client_chat import Question, ask_once, chat_options, converse
from shared.cli.client_output import Output
from shared.cli.client_pull import RemoteFile, files_of, find_version, pull
from shared.cli.client_report import file_id_of, report, show_estimate
from shared.cli.client_train import job_settings, training_options
from shared.cli.client_usage import OneLineCommand
from shared.cli.client_watch import display_for, follow, job_path
from shared.cli.http import Json, Service, ServiceError, new_idempotency_key
from shared.config import Settings
from shared.errors import LoradError, SettingsError

COMMANDS: list[click.Command] = []

DETACHED = 130
"""Exit status after Ctrl-C, as of a program that SIGINT ended: what the caller waited for is not there."""

_HISTORY = 20


def _client_command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """Registers a command that gets a Service and an Output, with --json; every error ends it in one line.

    Exit status: 0 done, 1 the service or the job said no, 2 wrong usage or settings.
    """

    def register(run: Callable[..., None]) -> click.Command:
        @functools.wraps(run)
        def with_service(as_json: bool, **arguments: Any) -> None:
            out = Output(as_json=as_json)
            try:
                settings = Settings.from_env()
                with Service(settings.base_url, settings.api_key) as service:
                    run(service, out, **arguments)
            except LoradError as error:
                out.fail(error)
                sys.exit(2 if isinstance(error, SettingsError) else 1)
            except OSError as error:
                out.fail(LoradError(str(error)))
                sys.exit(1)

        json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
        command = click.command(name, cls=OneLineCommand)(json_option(with_service))
        COMMANDS.append(command)
        return command

    return register


@_client_command("train")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--base", required=True, help="The base model, as `lorad base list` names it.")
@click.option("--name", "adapter", required=True, help="The adapter's name; training it again makes its next version.")
@training_options
@click.option("--detach", is_flag=True, help="Return as soon as the job is queued.")
@click.option("--dry-run", is_flag=True, help="Upload and estimate: steps, tokens, memory, time. No job is made.")
def train(
    service: Service, out: Output, *, file: Path, base: str, adapter: str, detach: bool, dry_run: bool, **settings: Any
) -> None:
    """Train an adapter on FILE: upload it, submit the job and watch it.

    Ctrl-C stops the watching, not the job.
    """
    body = {"model": base, "suffix": adapter} | job_settings(settings)
    for param, data in {"training_file": file, "validation_file": settings["validation"]}.items():
        if data is not None:
            body[param] = _upload(service, data)
    if dry_run:
        show_estimate(out, service.post("/fine_tuning/jobs", body | {"dry_run": True}))
        return
    job = service.post("/fine_tuning/jobs", body, idempotency_key=new_idempotency_key())
    if detach:
        out.record(job, f"{job['id']} is {job['status']}; watch it with: lorad watch {job['id']}")
        return
    out.record(job, f"job {job['id']}")
    _watch(service, out, job["id"], history=None)


@_client_command("report")
@click.argument("file_or_id", metavar="FILE_OR_ID")
@click.option("--base", help="Show the tokens that training on this base model would see, too.")
@click.option("--max-seq-len", type=click.IntRange(8, limits.MAX_SEQ_LEN), help="Cut samples at so many tokens.")
def report_command(
    service: Service, out: Output, *, file_or_id: str, base: str | None, max_seq_len: int | None
) -> None:
    """Check a data set: a local FILE, which is uploaded, or the ID of one that was.

    Shows what is wrong with its lines and, with --base, what training would see of it.
    """
    if max_seq_len is not None and base is None:
        raise click.UsageError("--max-seq-len counts tokens: it needs --base")
    report(service, out, file_id_of(service, file_or_id), base=base, max_seq_len=max_seq_len)


@_client_command("watch")
@click.argument("job_id", metavar="ID")
def watch(service: Service, out: Output, *, job_id: str) -> None:
    """Follow a job until it is over. Ctrl-C stops the watching, not the job."""
    _watch(service, out, job_id, history=None if out.as_json else _HISTORY)


@_client_command("jobs")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True)
def jobs(service: Service, out: Output, *, limit: int) -> None:
    """List the newest jobs."""
    found = service.every("/fine_tuning/jobs", {"limit": min(limit, 100)}, at_most=limit)
    columns = {
        "JOB": ("id",),
        "STATUS": ("status",),
        "STEP": ("step",),
        "OF": ("total_steps",),
        "BASE": ("model",),
        "ADAPTER": ("fine_tuned_model", "adapter"),
        "CREATED": ("created_at",),
    }
    out.table(found, columns, empty="no jobs yet; start one with: lorad train FILE --base NAME --name ADAPTER")


@_client_command("cancel")
@click.argument("job_id", metavar="ID")
def cancel(service: Service, out: Output, *, job_id: str) -> None:
    """Ask a job to stop; a running one stops at its next heartbeat."""
    job = service.post(job_path(job_id, "cancel"))
    asked = "is cancelled" if job["status"] == "cancelled" else f"is {job['status']} and was asked to stop"
    out.record(job, f"{job['id']} {asked}")


@_client_command("adapters")
def adapters(service: Service, out: Output) -> None:
    """List the trained adapters."""
    columns = {"ADAPTER": ("name",), "LATEST": ("latest_version",), "BASE": ("base_model",), "CREATED": ("created_at",)}
    out.table(service.every("/adapters"), columns, empty="no adapters yet")


@_client_command("pull")
@click.argument("reference", metavar="NAME[@VERSION]")
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
def pull_command(service: Service, out: Output, *, reference: str, directory: Path) -> None:
    """Download an adapter's files to DIR, checked against their SHA-256.

    An interrupted pull goes on where it stopped. VERSION is a number, an alias or, as without it, latest.
    """
    version = find_version(service, reference)
    files = files_of(version)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=out.console, disable=out.as_json or not out.console.is_terminal) as progress:
        bars = {f.filename: progress.add_task(f.filename, total=f.size_bytes) for f in files}

        def received(file: RemoteFile, size_bytes: int) -> None:
            progress.update(bars[file.filename], completed=size_bytes)

        pulled = pull(service, files, directory, received)
    for file in pulled:
        verb = "was there" if file.reused else "pulled"
        out.record(file.to_json(), f"{verb}  {file.path}  sha256 {file.sha256}")


@_client_command("chat")
@click.argument("model", metavar="NAME[@VERSION]")
@click.argument("prompt", required=False)
@chat_options
def chat(service: Service, out: Output, *, prompt: str | None, **question: Any) -> None:
    """Ask an adapter, a base model or a mix of adapters: once with PROMPT, else line by line until the input ends."""
    if prompt is not None:
        ask_once(service, out, Question(**question), prompt)
    else:
        converse(service, out, Question(**question))


def _upload(service: Service, file: Path) -> str:
    """The id of the data set that `file` is on the service now."""
    uploaded = service.upload(file)
    if uploaded["status"] == "error":
        raise ServiceError(f"{file.name} cannot be trained on: {uploaded['status_details']}")
    return str(uploaded["id"])


def _watch(service: Service, out: Output, job_id: str, *, history: int | None) -> None:
    """Follow a job; exits with 1 if it failed or was cancelled, and with DETACHED on Ctrl-C."""
    try:
        with display_for(out) as display:
            job = follow(service, job_id, display, history=history)
    except KeyboardInterrupt:
        out.note(f"the job goes on without you; watch it again with: lorad watch {job_id}")
        sys.exit(DETACHED)
    if job["status"] == "succeeded":
        model = job["fine_tuned_model"]
        out.record(job, f"{model} is ready; ask it with: lorad chat {model}")
        return
    if out.as_json:
        out.json_line(job)
    raise ServiceError(_why(job), code=job["status"])


def _why(job: Json) -> str:
    error = job.get("error")
    return f"job {job['id']} {job['status']}" + (f": {error['message']} ({error['code']})" if error else "")
