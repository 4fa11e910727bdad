"""Disks that fill up and disks that fail."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from shared.tables import JobState
from tests.chaos.bench import Bench
from tests.chaos.faults import NotTried, fault
from tests.chaos.lab import Lab
from tests.chaos.programs import wait_until

FAILURES: Final = (
    "checkpoint.written:eio", "publish.before_fsync:eio:1", "publish.before_fsync:eio:4",
    "publish.before_fsync_dir:eio", "publish.before_rename:eio:1", "publish.after_rename:eio:1",
    "adapter.before_fsync:eio", "adapter.before_rename:eio", "adapter.published:eio",
)  # fmt: skip
FULL: Final = ("checkpoint.written:enospc", "adapter.before_fsync:enospc", "adapter.before_rename:enospc")
DISK_BYTES: Final = 24 << 20


@fault("F16", "disk-errors", bound_s=240)
def disk_errors(bench: Bench) -> None:
    """EIO at the first and at a later fsync, at the rename and after it, of checkpoints and adapters: what is half
    there is never ready, nothing is charged, and the job succeeds, in another attempt if need be."""
    with bench.lab() as lab:
        _each_once(lab, FAILURES)


@fault("F15", "disk-full-by-failpoint")
def disk_full_at_a_point(bench: Bench) -> None:
    """ENOSPC at a checkpoint and at an adapter: the job says so, and succeeds once there is space again."""
    with bench.lab() as lab:
        _each_once(lab, FULL)


def _each_once(lab: Lab, failpoints: tuple[str, ...]) -> None:
    """A job and a trainer for each point, one after the other; then a trainer whose disk works, for what waits."""
    lab.sweeper()
    ids = []
    for number, failpoint in enumerate(failpoints):
        trainer = lab.trainer(failpoint=failpoint)
        [job_id] = lab.submit(steps=10, every=4, name=f"job-{number}")
        ids.append(job_id)
        wait_until("the job to end or to wait again", lambda one=job_id: _is_through(lab, one), at_most_s=60)
        assert trainer.is_alive
        told = [text for text in lab.messages(job_id) if "Input/output error" in text or "No space left" in text]
        assert told, f"{failpoint}: nobody was told of it: {lab.messages(job_id)}"
        trainer.kill()
    lab.trainer(slots=4)
    lab.wait_succeeded(ids, at_most_s=120)
    assert {lab.row(job_id).attempt for job_id in ids} == {1}, "what the disk has ended was charged"


def _is_through(lab: Lab, job_id: str) -> bool:
    row = lab.row(job_id)
    return JobState(row.state).is_terminal or (row.state == JobState.QUEUED and row.fence > 0)


@fault("F15", "disk-full", bound_s=180)
def disk_full(bench: Bench) -> None:
    """A file system without a free byte under store, database and write-ahead log: no job is lost, and once there is
    space again all of them succeed."""
    directory = bench.directory / "small-disk"
    directory.mkdir()
    with _small_disk(directory), bench.lab(data_dir=directory / "data") as lab:
        trainer = lab.trainer(slots=2)
        sweeper = lab.sweeper()
        ids = lab.submit(2, seconds=15)
        for job_id in ids:
            lab.wait_for_step(job_id, 1)
        filler = directory / "filler"
        _fill(filler)
        wait_until(
            "somebody to notice",
            lambda: any(p.said("No space left") or p.said("is full") for p in (trainer, sweeper)),
            at_most_s=60,
        )
        filler.unlink()

        lab.wait_succeeded(ids, at_most_s=120)


@contextmanager
def _small_disk(directory: Path) -> Iterator[None]:
    """A file system of DISK_BYTES at `directory`."""
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={DISK_BYTES}".encode()
    if os.geteuid() != 0 or libc.mount(b"tmpfs", os.fsencode(directory), b"tmpfs", 0, options) != 0:
        raise NotTried("only root can mount a small file system")
    try:
        yield
    finally:
        libc.umount2(os.fsencode(directory), 2)  # MNT_DETACH


def _fill(path: Path) -> None:
    """Write until nothing more fits, down to the last bytes."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
