"""What ends a program that gets on no more, so that its supervisor starts it anew."""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Final, NoReturn

log = logging.getLogger("lorad.watchdog")

BROKEN_EXIT: Final = 70
"""Exit status of a program that found itself or its device of no more use: EX_SOFTWARE of sysexits.h."""
LOOKS: Final = 10
LONGEST_S: Final = 10.0


def watch(
    overdue_s: Callable[[], float | None], *, floor_s: float, on_hung: Callable[[float], object]
) -> threading.Thread:
    """A started daemon thread that calls `on_hung(seconds)` once `overdue_s()` is not None, and ends then.

    It looks LOOKS times in `floor_s`, the least that counts as hung, and at least every LONGEST_S.
    """

    def look() -> None:
        while True:
            time.sleep(min(floor_s / LOOKS, LONGEST_S))
            if (taken_s := overdue_s()) is not None:
                on_hung(taken_s)
                return

    thread = threading.Thread(target=look, name="watchdog", daemon=True)
    thread.start()
    return thread


def give_up(program: str, why: str) -> NoReturn:
    """End the process at once, whatever its threads do."""
    log.critical("%s: this %s ends", why, program)
    logging.shutdown()
    os._exit(BROKEN_EXIT)
