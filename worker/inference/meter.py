"""Meter: what an engine has done since it began, counted as it happens and told as one JSON-able snapshot."""

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

from shared.specs import AdapterShare

FIRST_TOKEN_S: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
NEXT_TOKEN_S: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
LOAD_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
STEP_S: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
NAMED_ADAPTERS: Final = 20
"""Adapters with figures of their own; those with the most tokens have them, the rest is one."""
RANKED_ADAPTERS: Final = 5000
"""Adapters whose tokens are remembered, to find those with the most."""
COMPARED_EVERY: Final = 16
REASONS: Final = 16
"""Different reasons why choices end that are told apart."""
OTHER: Final = "other"


class _Prompt(Protocol):
    @property
    def ids(self) -> Sequence[int]: ...


class Metered(Protocol):
    """What the meter reads of a choice."""

    @property
    def adapters(self) -> tuple[AdapterShare, ...]: ...
    @property
    def prompt(self) -> _Prompt: ...


class Histogram:
    """How many values fell into which bucket. `bounds` are upper limits, included; one bucket more has the rest."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def snapshot(self) -> dict[str, Any]:
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.total}


@dataclass
class _Times:
    arrived_s: float
    last_token_s: float | None = None


class Meter:
    """Counters and histograms of one engine. Any thread may call it. `clock` counts seconds.

    Figures only grow. Those by adapter are of the NAMED_ADAPTERS with the most tokens, each
    counted from when it came among them, and of all others together.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._times: WeakKeyDictionary[Metered, _Times] = WeakKeyDictionary()
        self._counts: Counter[str] = Counter()
        self._ended: Counter[str] = Counter()
        self._first_token_s = Histogram(FIRST_TOKEN_S)
        self._next_token_s = Histogram(NEXT_TOKEN_S)
        self._load_s = Histogram(LOAD_S)
        self._step_s = Histogram(STEP_S)
        self._adapters = _Ranking()

    def arrived(self, choice: Metered) -> None:
        """It waits from now on."""
        with self._lock:
            self._counts["arrived"] += 1
            self._times[choice] = _Times(self._clock())

    def admitted(self, choice: Metered) -> None:
        """It has a row; its prompt is being read."""
        with self._lock:
            self._counts["admitted"] += 1
            self._counts["prompt_tokens"] += len(choice.prompt.ids)

    def emitted(self, choice: Metered, is_first: bool) -> None:
        """It got a token. The first counts from the arrival, every other from the one before."""
        with self._lock:
            now = self._clock()
            self._counts["generated_tokens"] += 1
            times = self._times.get(choice)
            if times is not None:
                if is_first:
                    self._first_token_s.add(now - times.arrived_s)
                elif times.last_token_s is not None:
                    self._next_token_s.add(now - times.last_token_s)
                times.last_token_s = now
            for share in choice.adapters:
                self._adapters.add(share.version_id)

    def ended(self, choice: Metered, reason: str) -> None:
        """It needs its row no more."""
        with self._lock:
            known = reason in self._ended or len(self._ended) < REASONS
            self._ended[reason if known else OTHER] += 1
            self._times.pop(choice, None)

    def adapter_loaded(self, version_id: str, seconds: float, size_bytes: int) -> None:
        """An adapter came into memory, `seconds` after somebody asked for it."""
        with self._lock:
            self._counts["adapter_loads"] += 1
            self._counts["adapter_bytes"] += size_bytes
            self._load_s.add(seconds)

    def adapter_evicted(self, version_id: str) -> None:
        """An adapter left the memory."""
        with self._lock:
            self._counts["adapter_evictions"] += 1

    def step(self, seconds: float, num_decode_rows: int, num_prefill_tokens: int) -> None:
        """The model ran once."""
        with self._lock:
            self._step_s.add(seconds)
            self._counts["decoded_rows"] += num_decode_rows
            self._counts["prefilled_tokens"] += num_prefill_tokens

    def snapshot(self) -> dict[str, Any]:
        """Everything at this moment; `shared.generators.MeterReport` says what it looks like."""
        with self._lock:
            return {
                "counts": {name: self._counts[name] for name in COUNTS},
                "ended": dict(self._ended),
                "histograms": {
                    "first_token_seconds": self._first_token_s.snapshot(),
                    "next_token_seconds": self._next_token_s.snapshot(),
                    "adapter_load_seconds": self._load_s.snapshot(),
                    "step_seconds": self._step_s.snapshot(),
                },
                "adapter_tokens": self._adapters.snapshot(),
            }


COUNTS: Final = (
    "arrived",
    "admitted",
    "prompt_tokens",
    "generated_tokens",
    "adapter_loads",
    "adapter_bytes",
    "adapter_evictions",
    "decoded_rows",
    "prefilled_tokens",
)


class _Ranking:
    """Tokens by adapter, such that every figure only grows although the named ones change.

    What an adapter had before it was named stays with the others; what it has as a named one is its own, and kept for
    the time when it is named again.
    """

    def __init__(self) -> None:
        self._totals: dict[str, int] = {}
        self._own: dict[str, int] = {}
        self._named: set[str] = set()
        self._others = 0

    def add(self, version_id: str) -> None:
        total = self._totals[version_id] = self._totals.get(version_id, 0) + 1
        if version_id in self._named or self._may_be_named(version_id, total):
            self._own[version_id] = self._own.get(version_id, 0) + 1
        else:
            self._others += 1
        if len(self._totals) > RANKED_ADAPTERS:
            self._forget()

    def snapshot(self) -> dict[str, int]:
        return {version_id: self._own[version_id] for version_id in sorted(self._named)} | {OTHER: self._others}

    def _may_be_named(self, version_id: str, total: int) -> bool:
        """True if there is room, or, looked at now and then, if it has twice the tokens of the least named one."""
        if len(self._named) == NAMED_ADAPTERS:
            if total % COMPARED_EVERY:
                return False
            least = min(self._named, key=self._totals.__getitem__)
            if total < 2 * self._totals[least]:
                return False
            self._named.remove(least)
        self._named.add(version_id)
        return True

    def _forget(self) -> None:
        """Let go of the lower half of those that are not named."""
        unnamed = sorted(self._totals.keys() - self._named, key=self._totals.__getitem__)
        for version_id in unnamed[: len(unnamed) // 2]:
            del self._totals[version_id]
            self._own.pop(version_id, None)
