"""The list of faults, and how one is tried."""

import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Final

from tests.chaos.bench import Bench

Breaks = Callable[[Bench], None]


@dataclass(frozen=True)
class Fault:
    """One way to break the service. `run` returns if it was survived; its docstring says what must hold."""

    number: str
    name: str
    run: Breaks
    bound_s: int
    is_fast: bool


@dataclass(frozen=True)
class Outcome:
    """What became of a fault. `why` is None if it was survived."""

    fault: Fault
    seconds: float
    why: str | None = None
    details: str = ""
    was_tried: bool = True


class NotTried(Exception):
    """This machine has not what the fault needs."""


FAULTS: Final[dict[str, Fault]] = {}


def fault(number: str, name: str, *, bound_s: int = 120, fast: bool = False) -> Callable[[Breaks], Breaks]:
    """Adds the decorated function to the campaign. `fast` ones are part of `make test` too."""

    def add(run: Breaks) -> Breaks:
        assert name not in FAULTS
        assert run.__doc__
        FAULTS[name] = Fault(number, name, run, bound_s, fast)
        return run

    return add


def attempt(one: Fault, bench: Bench) -> Outcome:
    """Try it, for `bound_s` at most."""
    began_s = time.monotonic()
    try:
        with _bounded(one.bound_s):
            one.run(bench)
    except NotTried as error:
        return Outcome(one, 0.0, str(error), was_tried=False)
    except Exception as error:
        why = str(error).strip().splitlines() or [""]
        details = "".join(traceback.format_exception(error))
        return Outcome(one, time.monotonic() - began_s, f"{type(error).__name__}: {why[0]}", details)
    return Outcome(one, time.monotonic() - began_s)


@contextmanager
def _bounded(seconds: int) -> Iterator[None]:
    """TimeoutError in the block once it takes longer. On the main thread only."""

    def give_up(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"not over after {seconds} s")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
