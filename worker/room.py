"""Whether the disk has room for another job."""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

log = logging.getLogger("lorad.trainer")

TELL_EVERY_S: Final = 300.0


class Room:
    """The free space of the file system that holds the data directory, against a mark.

    Checkpoints and adapters of the jobs that run need what is left; a job that is not begun loses nothing by waiting.
    """

    def __init__(self, directory: Path, *, min_free_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`min_free_bytes` 0 is no mark."""
        self._directory = directory
        self._min_free_bytes = min_free_bytes
        self._clock = clock
        self._told_at: float | None = None

    def is_there(self) -> bool:
        """Whether the mark is met; the log hears at once when it is missed, then every five minutes, and when it is met
        again. A directory that cannot be looked at has no room."""
        if not self._min_free_bytes:
            return True
        try:
            free = shutil.disk_usage(self._directory).free
        except OSError as error:
            log.warning("%s cannot be looked at: %s", self._directory, error.strerror)
            return False
        if free >= self._min_free_bytes:
            if self._told_at is not None:
                log.info("%s has %d bytes free: jobs are claimed again", self._directory, free)
            self._told_at = None
            return True
        if self._told_at is None or self._clock() - self._told_at >= TELL_EVERY_S:
            self._told_at = self._clock()
            log.warning(
                "%s has %d bytes free, and LORAD_MIN_FREE_BYTES=%d: no job is claimed",
                self._directory, free, self._min_free_bytes,
            )  # fmt: skip
        return False
