"""Watches rows and files while a fault happens: what may never be seen, not even for a moment."""

import threading
from types import TracebackType
from typing import Any, Final, Self

from sqlalchemy import Engine, select
from sqlalchemy.exc import DBAPIError

from shared.db import read
from shared.store.layout import Layout
from shared.tables import AdapterVersion, Job, JobState
from tests.chaos.invariants import half_adapters

EVERY_S: Final = 0.1


class Recorder:
    """Inside `with`, reads again and again; `violations` is what it has seen that must never be."""

    def __init__(self, engine: Engine, layout: Layout) -> None:
        self.violations: list[str] = []
        self.spared: set[str] = set()
        """Versions whose files are damaged on purpose."""
        self._engine = engine
        self._layout = layout
        self._ended: dict[str, tuple[Any, ...]] = {}
        self._fences: dict[str, int] = {}
        self._versions: dict[str, tuple[Any, ...]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="recorder", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """See no more; `look` still may."""
        self._stopping.set()
        self._thread.join(30)

    def look(self) -> None:
        """Compare what is with what was."""
        with read(self._engine) as tx:
            jobs = list(tx.scalars(select(Job)))
            versions = list(tx.scalars(select(AdapterVersion)))
        for job in jobs:
            row = tuple(getattr(job, column.key) for column in Job.__table__.columns)
            before = self._ended.get(job.id)
            if before is not None and before != row:
                self._say(f"{job.id} changed after its end: {before} became {row}")
            if before is None and JobState(job.state).is_terminal:
                self._ended[job.id] = row
            if job.fence < self._fences.get(job.id, 0):
                self._say(f"the fence of {job.id} fell from {self._fences[job.id]} to {job.fence}")
            self._fences[job.id] = job.fence
        for version in versions:
            fixed = (version.job_id, version.sha256, version.version, version.adapter_id)
            if self._versions.setdefault(version.id, fixed) != fixed:
                self._say(f"version {version.id} changed: {self._versions[version.id]} became {fixed}")
        for problem in half_adapters(self._layout, self.spared):
            self._say(problem)

    def _watch(self) -> None:
        while not self._stopping.wait(EVERY_S):
            try:
                self.look()
            except DBAPIError:
                continue  # the database is what is broken right now
            except Exception as error:
                self._say(f"the recorder failed: {error!r}")
                return

    def _say(self, problem: str) -> None:
        if problem not in self.violations:
            self.violations.append(problem)
