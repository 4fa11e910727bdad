"""The loads that a server meets: which adapter each request wants, when it arrives, and what its caller saw."""

import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from benchmarks.serve.plan import Plan
from benchmarks.stats import percentile


def zipf(count: int, *, size: int, exponent: float, seed: int) -> list[int]:
    """`count` draws from 0..size-1, where number k comes up in proportion to 1 / (k + 1) ** exponent."""
    dice = random.Random(seed)
    cumulative = list(accumulate(1 / (k + 1) ** exponent for k in range(size)))
    return [bisect_left(cumulative, dice.random() * cumulative[-1]) for _ in range(count)]


def poisson_arrivals(rate: float, *, seconds: float, seed: int) -> list[float]:
    """The times, in seconds from the start and below `seconds`, of a Poisson process of `rate` a second.

    At least one, so that there is something to measure.
    """
    dice = random.Random(seed)
    arrivals = [min(dice.expovariate(rate), seconds / 2)]
    while (next_s := arrivals[-1] + dice.expovariate(rate)) < seconds:
        arrivals.append(next_s)
    return arrivals


@dataclass
class Heard:
    """What one caller saw: when it asked, and when each piece of the answer came. In seconds of one clock.

    A piece is a token, or what a server sent at once. An open load's request asks when it was to arrive, so that a
    server that takes it late gains nothing by it.
    """

    asked_s: float
    came_s: list[float] = field(default_factory=list)
    num_tokens: int = 0

    @property
    def first_s(self) -> float:
        """Time to the first token."""
        return self.came_s[0] - self.asked_s

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.came_s, self.came_s[1:], strict=False)]


def timed(run: Callable[[], float], plan: Plan) -> list[float]:
    """The seconds that each of the plan's repeats took; at least one."""
    seconds = [run()]
    while len(seconds) < plan.repeats and sum(seconds) < plan.enough_s:
        seconds.append(run())
    return seconds


def latencies(heard: Sequence[Heard]) -> dict[str, Any]:
    """All times to first token and between tokens in ms, and tokens per second from the first arrival to the end."""
    end_s, start_s = max(one.came_s[-1] for one in heard), min(one.asked_s for one in heard)
    return {
        "first_ms": [round(1e3 * one.first_s, 2) for one in heard],
        "gaps_ms": [round(1e3 * gap, 2) for one in heard for gap in one.gaps_s],
        "tokens_per_second": sum(one.num_tokens for one in heard) / (end_s - start_s),
    }


def has_fallen_behind(found: dict[str, Any]) -> bool:
    """Whether half of the requests waited for more than two seconds: a higher rate would only make a longer queue."""
    return summary(found["first_ms"])[0] > 2000


def summary(values_ms: Sequence[float]) -> tuple[float, float]:
    """(p50, p99)."""
    return percentile(values_ms, 0.5), percentile(values_ms, 0.99)
