"""Follow a training job over HTTP until it is over, and show how it goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Protocol

from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from shared.cli.client_output import Output
from shared.cli.http import Json, Service, path_of

OVER = frozenset({"succeeded", "failed", "cancelled"})

_POLL_S = 0.5
_OUTAGE_S = 60.0
_PAGE = 20
_LINE_EVERY_S = 2.0


class Display(Protocol):
    """Where a job's progress is shown."""

    def event(self, event: Json) -> None: ...
    def status(self, job: Json) -> None: ...


def follow(service: Service, job_id: str, display: Display, *, history: int | None = None) -> Json:
    """Shows each event once, oldest first, until the job is over; then its final object.

    Of the events before the first look, only the newest `history` are shown (None: all). Survives a service that is
    away for up to a minute. Stopping to follow does nothing to the job.
    """
    newest_seen: str | None = None
    while True:
        # The job before its events: once it reads as over, no event can still be missing.
        job = service.get(job_path(job_id))
        service.patience_s = _OUTAGE_S
        for event in _events_after(service, job_id, newest_seen, at_most=history if newest_seen is None else None):
            display.event(event)
            newest_seen = event["id"]
        display.status(job)
        if job["status"] in OVER:
            return job
        time.sleep(_POLL_S)


def job_path(job_id: str, *more: str) -> str:
    return "/fine_tuning/jobs" + path_of(job_id, *more)


@contextmanager
def display_for(out: Output) -> Iterator[Display]:
    """JSON lines for programs, a bar on a terminal, lines of text in a log."""
    if out.as_json:
        yield JsonDisplay(out)
    elif out.console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[figures]}"))
        with Progress(*columns, console=out.console) as progress:
            yield BarDisplay(progress)
    else:
        yield LineDisplay(out)


class JsonDisplay:
    """Every event, as the service gave it, one per line."""

    def __init__(self, out: Output) -> None:
        self._out = out

    def event(self, event: Json) -> None:
        self._out.json_line(event)

    def status(self, job: Json) -> None:
        """Nothing: the events say it all, and the caller prints the job that is over."""


class BarDisplay:
    """A bar that fills with the steps, under the messages that came."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bar: TaskID = progress.add_task("waiting", total=None, figures="")

    def event(self, event: Json) -> None:
        if event.get("type") != "metrics":
            self._progress.console.print(Text(_sentence(event)))
            return
        data = event["data"]
        self._progress.update(
            self._bar, total=data["total_steps"], completed=data["step"], figures=f"{_steps(data)}  {_figures(data)}"
        )

    def status(self, job: Json) -> None:
        self._progress.update(self._bar, description=job["status"])


class LineDisplay:
    """Messages as they come, and a line of figures for the first and last step and every two seconds between."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._next_line_at = 0.0

    def event(self, event: Json) -> None:
        if event.get("type") != "metrics":
            self._out.note(_sentence(event))
            return
        data = event["data"]
        if time.monotonic() >= self._next_line_at or data["step"] == data["total_steps"]:
            self._out.note(f"step {_steps(data)}  {_figures(data)}")
            self._next_line_at = time.monotonic() + _LINE_EVERY_S

    def status(self, job: Json) -> None:
        """Nothing: a change of status comes with a message."""


def _events_after(service: Service, job_id: str, newest_seen: str | None, *, at_most: int | None) -> list[Json]:
    """The events later than `newest_seen`, oldest first. The service lists the newest first."""
    newest_first = service.every(job_path(job_id, "events"), {"limit": _PAGE}, at_most=at_most)
    return list(takewhile(lambda event: event["id"] != newest_seen, newest_first))[::-1]


def _sentence(event: Json) -> str:
    level = "" if event["level"] == "info" else f"{event['level']}: "
    return f"{level}{event['message']}"


def _steps(data: Json) -> str:
    return f"{data['step']}/{data['total_steps']}"


def _figures(data: Json) -> str:
    figures = [f"loss {data['train_loss']:.4f}"]
    if data.get("valid_loss") is not None:
        figures.append(f"validation loss {data['valid_loss']:.4f}")
    if data.get("tokens_per_second") is not None:
        figures.append(f"{data['tokens_per_second']:.0f} tokens/s")
    if data.get("eta_seconds") is not None:
        figures.append(f"{_duration(data['eta_seconds'])} left")
    return "  ".join(figures)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
