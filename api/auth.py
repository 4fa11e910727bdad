"""From a request to its Caller: an API key once one exists, before that only this machine and no browser's page."""

import hashlib
import ipaddress
import re
import threading
import time
from collections.abc import Callable
from typing import Final, Literal

from flask import Request, g
from sqlalchemy import Engine

from api.call import Caller
from api.rates import Buckets, network_of
from shared import db, keys
from shared.errors import Forbidden, RateLimited, Unauthenticated

Scope = Literal[
    "files:read", "files:write", "jobs:read", "jobs:write", "adapters:read", "adapters:write", "generate", "admin",
    "any",  # any key will do
    "public",  # no key at all
]  # fmt: skip

NOBODY = Caller("", frozenset())
STANDING: Final = "standing"
"""Where flask.g holds how the caller stands with its rate limit, for the answer's headers."""
KEYLESS = Caller("default", frozenset(keys.SCOPES))
_FRESH_S = 4.0
_MAX_CACHED = 10_000
_OUR_HOST = re.compile(r"(?:localhost|127\.0\.0\.1|\[::1\])(?::[0-9]{1,5})?", re.ASCII | re.IGNORECASE)
_OUR_ORIGIN = re.compile(rf"https?://{_OUR_HOST.pattern}", re.ASCII | re.IGNORECASE)


class Gate:
    """Admits requests. What it learned from the database counts for 4 s, so that a revoked key is dead within 5."""

    def __init__(
        self,
        engine: Engine,
        *,
        requests_per_minute: int = 0,
        failed_logins_per_minute: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """At most so many requests with one key, or without keys from one address; wrong keys from one address. 0: any
        number."""
        self._engine = engine
        self._requests = Buckets(requests_per_minute, clock=clock) if requests_per_minute else None
        self._failures = Buckets(failed_logins_per_minute, clock=clock) if failed_logins_per_minute else None
        self._lock = threading.Lock()
        self._keys_exist_until = (False, 0.0)
        self._callers: dict[bytes, tuple[Caller, float]] = {}

    def admit(self, request: Request, scope: Scope) -> Caller:
        """Who asks, whatever the key may do: see `require`. Raises Unauthenticated, RateLimited, and Forbidden for a
        keyless request that is not from here."""
        if scope == "public":
            return NOBODY
        if not self._keys_exist():
            _check_local(request)
            self._charge(network_of(request.remote_addr), "from this address")
            return KEYLESS
        caller = self._login(request)
        self._charge(caller.key_id or "", "with this API key")
        return caller

    def _login(self, request: Request) -> Caller:
        """Who presents a key. Too many wrong ones from an address are refused as such, right ones never."""
        presented = _bearer(request)
        try:
            return self._caller(presented)
        except Unauthenticated:
            self._count_failure(network_of(request.remote_addr))
            raise

    def _count_failure(self, address: str) -> None:
        if self._failures is None:
            return
        standing = self._failures.take(address)
        if standing.retry_after_s:
            raise RateLimited(
                f"More than {standing.limit} wrong API keys a minute came from this address.",
                retry_after_s=standing.retry_after_s,
            ) from None

    def _charge(self, name: str, whence: str) -> None:
        if self._requests is None:
            return
        standing = self._requests.take(name)
        setattr(g, STANDING, standing)
        if standing.retry_after_s:
            raise RateLimited(
                f"More than {standing.limit} requests a minute came {whence}.", retry_after_s=standing.retry_after_s
            )

    def _keys_exist(self) -> bool:
        known, until = self._keys_exist_until
        if time.monotonic() >= until:
            with db.read(self._engine) as tx:
                known = keys.any_exist(tx)
            self._keys_exist_until = (known, time.monotonic() + _FRESH_S)
        return known

    def _caller(self, presented: str) -> Caller:
        fingerprint = hashlib.sha256(presented.encode("utf-8", "replace")).digest()
        caller, until = self._callers.get(fingerprint, (NOBODY, 0.0))
        if time.monotonic() < until:
            return caller
        with db.read(self._engine) as tx:
            key = keys.authenticate(tx, presented)
        caller = Caller(key.tenant, frozenset(key.scopes), key.id)
        with self._lock:
            if len(self._callers) >= _MAX_CACHED:
                self._callers.clear()
            self._callers[fingerprint] = (caller, time.monotonic() + _FRESH_S)
        return caller


def require(caller: Caller, scope: Scope) -> None:
    """Raise Forbidden if the caller's key lacks `scope`."""
    if scope not in ("any", "public") and scope not in caller.scopes:
        raise Forbidden(f"This API key lacks the scope {scope!r}; it has: {', '.join(sorted(caller.scopes))}.")


def _bearer(request: Request) -> str:
    scheme, _, presented = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not presented.strip():
        raise Unauthenticated
    return presented.strip()


def _check_local(request: Request) -> None:
    """Keyless: the peer is this machine, and no rebound name or foreign page speaks through its browser."""
    peer = request.remote_addr
    if peer and not ipaddress.ip_address(peer).is_loopback:
        raise Unauthenticated("No API key exists yet, so only this machine is served: run 'lorad keys create'.")
    if not _OUR_HOST.fullmatch(request.headers.get("Host", "")):
        raise Forbidden("Without API keys the Host must be localhost, 127.0.0.1 or [::1].", code="host_not_allowed")
    origin = request.headers.get("Origin")
    if origin is not None and not _OUR_ORIGIN.fullmatch(origin):
        raise Forbidden("Without API keys, pages of other sites are not served.", code="origin_not_allowed")
