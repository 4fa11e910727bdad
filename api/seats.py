"""A bound on how many threads wait at once."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Seats:
    """How many requests may wait for something at once, so that waiting never takes all threads from answering."""

    def __init__(self, seats: int) -> None:
        self._seats = max(1, seats)
        self._lock = threading.Lock()
        self.taken_now = 0

    def take(self) -> bool:
        """True if there was a free seat, which is now ours to give back."""
        with self._lock:
            free = self.taken_now < self._seats
            self.taken_now += free
        return free

    def give_back(self) -> None:
        with self._lock:
            self.taken_now -= 1

    @contextmanager
    def taken(self) -> Iterator[bool]:
        """True inside the block if there was a free seat."""
        seated = self.take()
        try:
            yield seated
        finally:
            if seated:
                self.give_back()
