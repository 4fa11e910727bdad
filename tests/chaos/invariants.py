"""What holds whatever happened: read from the database and the store, every violation as a sentence."""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Engine, select

from shared import ids
from shared.db import read
from shared.store.adapter_files import MANIFEST, WEIGHTS, rehash
from shared.store.durable import inventory
from shared.store.layout import Layout
from shared.tables import AdapterVersion, Checkpoint, Job, JobAttempt, JobEvent, JobState

Row = TypeVar("Row", JobAttempt, JobEvent)


def violations(engine: Engine, layout: Layout, *, all_ended: bool = True, spared: Collection[str] = ()) -> list[str]:
    """Every invariant that does not hold; empty is good. With `all_ended` a job that has not ended is one, too.

    The files of versions in `spared` were damaged on purpose: they only may not be called ready.
    """
    with read(engine) as tx:
        jobs = list(tx.scalars(select(Job)))
        attempts = _by_job(tx.scalars(select(JobAttempt).order_by(JobAttempt.fence)))
        events = _by_job(tx.scalars(select(JobEvent).order_by(JobEvent.job_id, JobEvent.seq)))
        versions = list(tx.scalars(select(AdapterVersion)))
        old = tx.scalars(select(Checkpoint).where(Checkpoint.deleted_at.is_not(None)))
        forgotten = {layout.checkpoint(row.job_id, row.step, row.fence) for row in old}
    found = [f"{job.id} is stuck: {job.state}" for job in jobs if all_ended and not JobState(job.state).is_terminal]
    for job in jobs:
        own = [version for version in versions if version.job_id == job.id]
        problems = [
            *_of_publication(job, own), *_of_attempts(job, attempts[job.id]), *of_steps(events[job.id]),
            *_of_order(events[job.id]),
        ]  # fmt: skip
        found += [f"{job.id} ({job.adapter_name}): {problem}" for problem in problems]
    found += [problem for version in versions for problem in _of_files(layout, version)]
    return found + list(half_adapters(layout, spared)) + list(_half_checkpoints(layout, forgotten))


def half_adapters(layout: Layout, spared: Collection[str] = ()) -> Iterator[str]:
    """Directories at an adapter version's final place that are not whole; `spared` were damaged on purpose."""
    for directory in _entries(layout.root / "adapters"):
        if not ids.is_id(directory.name, ids.ADAPTER_VERSION):
            yield f"adapters/{directory.name} is no version's place"
        elif directory.name not in spared and (why := _incomplete(directory)) is not None:
            yield f"adapters/{directory.name} {why}"


def _half_checkpoints(layout: Layout, forgotten: Collection[Path]) -> Iterator[str]:
    """The same of checkpoints; who removed a forgotten one may have been killed on the way."""
    for job in _entries(layout.root / "checkpoints"):
        for directory in _entries(job):
            if directory not in forgotten and (why := _incomplete(directory)) is not None:
                yield f"checkpoints/{job.name}/{directory.name} {why}"


def of_steps(events: Sequence[JobEvent]) -> Iterator[str]:
    """Each attempt goes on where its checkpoint was, the newest one, and reports every step once and in order."""
    saved = resumed = last = 0
    seen: set[int] = set()
    for event in events:
        data = event.data or {}
        if event.message.startswith(("Training started", "Training continues")):
            resumed = last = 0
        elif event.message.startswith("Resuming from step"):
            resumed = last = int(data["step"])
            if resumed < saved:
                yield f"went on from step {resumed}, although step {saved} was saved"
        elif event.message.startswith("Checkpoint saved at step"):
            saved = int(data["step"])
        elif event.type == "metrics":
            step = int(data["step"])
            if step != last + 1:
                yield f"reported step {step} after step {last} of the attempt that began at step {resumed}"
            elif step <= saved:
                yield f"made step {step} again, although step {saved} was saved"
            last = step
            seen.add(step)
    if seen and seen != set(range(1, max(seen) + 1)):
        yield f"never reported the steps {sorted(set(range(1, max(seen) + 1)) - seen)}"


def _of_publication(job: Job, versions: Sequence[AdapterVersion]) -> Iterator[str]:
    wanted = int(job.state == JobState.SUCCEEDED)
    if len(versions) != wanted:
        yield f"{job.state} with {len(versions)} versions"
    for version in versions:
        if version.manifest["job_id"] != job.id:
            yield f"version {version.id} says that it is of {version.manifest['job_id']}"


def _of_attempts(job: Job, attempts: Sequence[JobAttempt]) -> Iterator[str]:
    if job.attempt > job.max_attempts:
        yield f"attempt {job.attempt} of {job.max_attempts}"
    if [attempt.fence for attempt in attempts] != list(range(1, job.fence + 1)):
        yield f"fence {job.fence}, but attempts under {[attempt.fence for attempt in attempts]}"
    still_open = [attempt.fence for attempt in attempts if attempt.ended_at is None]
    if still_open != ([job.fence] if job.state == JobState.RUNNING else []):
        yield f"{job.state} with open attempts {still_open}"


def _of_order(events: Sequence[JobEvent]) -> Iterator[str]:
    if [event.seq for event in events] != list(range(1, len(events) + 1)):
        yield "the numbers of its events have gaps"


def _of_files(layout: Layout, version: AdapterVersion) -> Iterator[str]:
    if version.state != "ready":
        return
    if not rehash(layout, version):
        yield f"version {version.id} is ready and its files are not what its row says"
    if version.sha256 != version.manifest["files"][WEIGHTS]["sha256"]:
        yield f"version {version.id} has two checksums"


def _incomplete(directory: Path) -> str | None:
    """Why a published directory is not whole; None if it is, or was removed meanwhile."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        found = inventory(directory)
    except FileNotFoundError:
        return "has no manifest" if directory.is_dir() and any(directory.iterdir()) else None
    except ValueError:
        return "has half a manifest"
    found.pop(MANIFEST, None)
    return None if found == manifest["files"] else "does not match its manifest"


def _entries(directory: Path) -> Iterator[Path]:
    yield from sorted(directory.iterdir()) if directory.is_dir() else ()


def _by_job(rows: Iterable[Row]) -> defaultdict[str, list[Row]]:
    grouped: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row.job_id].append(row)
    return grouped
