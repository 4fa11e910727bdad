"""From a request to its Caller: an API key once one exists, before that only this machine and no browser's page."""

import hashlib
import ipaddress
import re
import threading
import time
from typing import Literal

from flask import Request
from sqlalchemy import Engine

from api.call import Caller
from shared import db, keys
from shared.errors import Forbidden, Unauthenticated

Scope = Literal[
    "files:read", "files:write", "jobs:read", "jobs:write", "adapters:read", "adapters:write", "generate", "admin",
    "any",  # any key will do
    "public",  # no key at all
]  # fmt: skip

NOBODY = Caller("", frozenset())
KEYLESS = Caller("default", frozenset(keys.SCOPES))
_FRESH_S = 4.0
_MAX_CACHED = 10_000
_OUR_HOST = re.compile(r"(?:localhost|127\.0\.0\.1|\[::1\])(?::[0-9]{1,5})?", re.ASCII | re.IGNORECASE)
_OUR_ORIGIN = re.compile(rf"https?://{_OUR_HOST.pattern}", re.ASCII | re.IGNORECASE)


class Gate:
    """Admits requests. What it learned from the database counts for 4 s, so that a revoked key is dead within 5."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._keys_exist_until = (False, 0.0)
        self._callers: dict[bytes, tuple[Caller, float]] = {}

    def admit(self, request: Request, scope: Scope) -> Caller:
        """Who asks; raises Unauthenticated, or Forbidden if the key lacks `scope`."""
        if scope == "public":
            return NOBODY
        if not self._keys_exist():
            _check_local(request)
            return KEYLESS
        caller = self._caller(_bearer(request))
        if scope != "any" and scope not in caller.scopes:
            raise Forbidden(f"This API key lacks the scope {scope!r}; it has: {', '.join(sorted(caller.scopes))}.")
        return caller

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
