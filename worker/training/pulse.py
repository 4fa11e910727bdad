"""Whether the engine's thread still gets on: a turn that takes far longer than turns do is taken for hung."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

REMEMBERED: Final = 100
TIMES_MEDIAN: Final = 20


class Pulse:
    """Times the engine's turns. Written by its thread, read by any. `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._durations_s: deque[float] = deque(maxlen=REMEMBERED)
        self._began_s: float | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Around one forward and backward."""
        began_s = self._began_s = self._clock()
        try:
            yield
        finally:
            self._began_s = None
            self._durations_s.append(self._clock() - began_s)

    def overdue_s(self, *, floor_s: float) -> float | None:
        """How long the turn under way has taken if that is more than max(floor_s, 20 medians of the last turns).

        None while it is not, or none is under way. `floor_s` in seconds.
        """
        began_s, durations_s = self._began_s, list(self._durations_s)
        if began_s is None:
            return None
        taken_s = self._clock() - began_s
        allowed_s = max(floor_s, TIMES_MEDIAN * statistics.median(durations_s)) if durations_s else floor_s
        return taken_s if taken_s > allowed_s else None
