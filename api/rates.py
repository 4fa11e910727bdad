"""How often something may be done: a bucket of tokens for each name, in the memory of this process.

The API is one process with a thread per request (`shared.cli.servers.api_command`), so this memory is all there is to
know; a restart fills every bucket. A bucket is kept as the one time at which it will be full again (the generic cell
rate algorithm), so a full one needs no entry, and whoever is idle is forgotten.
"""

import ipaddress
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

MINUTE_S: Final = 60.0
MAX_NAMES: Final = 10_000
_ROUNDING_S: Final = 1e-6


@dataclass(frozen=True)
class Standing:
    """How a name stands after it asked for a token; `retry_after_s` is 0 if it got one."""

    limit: int
    remaining: int
    full_in_s: float
    retry_after_s: float = 0.0

    def headers(self) -> dict[str, str]:
        """What OpenAI's clients read; a reset is given in whole seconds."""
        return {
            "x-ratelimit-limit-requests": str(self.limit),
            "x-ratelimit-remaining-requests": str(self.remaining),
            "x-ratelimit-reset-requests": f"{math.ceil(self.full_in_s)}s",
        }


class Buckets:
    """A bucket of `per_minute` tokens for each name, filled evenly: so many at once, and so many in each minute after.

    Beyond `max_names` busy names the half that is nearest to full is forgotten, which lets some ask again too early.
    """

    def __init__(
        self, per_minute: int, *, clock: Callable[[], float] = time.monotonic, max_names: int = MAX_NAMES
    ) -> None:
        self._limit = per_minute
        self._token_s = MINUTE_S / per_minute
        self._clock = clock
        self._max_names = max_names
        self._lock = threading.Lock()
        self._full_at: dict[str, float] = {}

    def __len__(self) -> int:
        """Names that are remembered."""
        return len(self._full_at)

    def take(self, name: str) -> Standing:
        """Take a token if there is one; being refused costs nothing."""
        with self._lock:
            now = self._clock()
            missing_s = max(self._full_at.get(name, now) - now, 0.0)
            wait_s = missing_s + self._token_s - MINUTE_S
            if wait_s > _ROUNDING_S:
                return Standing(self._limit, 0, missing_s, wait_s)
            missing_s += self._token_s
            if name not in self._full_at and len(self._full_at) >= self._max_names:
                self._make_room(now)
            self._full_at[name] = now + missing_s
        return Standing(self._limit, int((MINUTE_S - missing_s + _ROUNDING_S) / self._token_s), missing_s)

    def _make_room(self, now: float) -> None:
        busy = sorted(((full_at, name) for name, full_at in self._full_at.items() if full_at > now), reverse=True)
        self._full_at = {name: full_at for full_at, name in busy[: self._max_names // 2]}


def network_of(address: str | None) -> str:
    """The name under which failures of an address are counted: itself, or for IPv6 its /64, which one user has."""
    try:
        ip = ipaddress.ip_address(address or "")
    except ValueError:
        return "unknown"
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))
