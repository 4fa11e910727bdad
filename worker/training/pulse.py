"""Whether the engine's thread still gets on: a turn that takes far longer than turns do is taken for hung."""

import statistics
import threading
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


def watch(
    pulses: Callable[[], Iterator[Pulse]], *, floor_s: float, on_hung: Callable[[float], object]
) -> threading.Thread:
    """A started daemon thread that calls `on_hung(seconds)` once a pulse is overdue, and ends then."""

    def look() -> None:
        while True:
            time.sleep(min(floor_s / 10, 10.0))
            for pulse in pulses():
                if (taken_s := pulse.overdue_s(floor_s=floor_s)) is not None:
                    on_hung(taken_s)
                    return

    thread = threading.Thread(target=look, name="watchdog", daemon=True)
    thread.start()
    return thread
