"""Refused requests in the audit log, few enough that nobody can fill the disk by being refused."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from flask import g, request
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnection

from api.call import Caller, Intent
from api.errors import answer_for
from api.rates import Buckets
from shared import audit, db, keys, limits
from shared.errors import LoradError

log = logging.getLogger("lorad.api")

_ALWAYS = frozenset({401, 403})
_OF_CHANGES = frozenset({404, 409})


class Refusals:
    """Writes down who was refused: 401 and 403 anywhere, 404 and 409 where something was to be changed.

    At most `per_minute` in a minute; the others are counted, and the number is logged with the next that is written.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        per_minute: int = limits.REFUSALS_KEPT_PER_MINUTE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._bucket = Buckets(per_minute, clock=clock)
        self._lock = threading.Lock()
        self.num_dropped = 0

    def note(self, error: LoradError, caller: Caller, intent: Intent, *, is_change: bool) -> None:
        """Write the current request's refusal down, if it is one; never raises because of the database."""
        status = answer_for(error).status
        if status not in _ALWAYS and not (is_change and status in _OF_CHANGES):
            return
        if self._bucket.take("").retry_after_s:
            with self._lock:
                self.num_dropped += 1
            return
        self._say_dropped()
        deed = intent.by(caller, status)
        if not caller.tenant and (claimed := keys.claimed_id(request.headers.get("Authorization", ""))):
            deed = replace(deed, actor=f"claimed:{claimed}")
        try:
            with db.write(self._engine) as tx:
                audit.record(tx, deed)
        except (DBAPIError, NoConnection) as failure:
            log.warning("%s: a refusal was not written down: %s", g.request_id, getattr(failure, "orig", failure))

    def _say_dropped(self) -> None:
        with self._lock:
            dropped, self.num_dropped = self.num_dropped, 0
        if dropped:
            log.warning("%d refused requests are not in the audit log: they came too fast", dropped)
