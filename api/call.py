"""What a handler is given: who asks, and the database, store and queue to answer from."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from sqlalchemy import Engine

from api.seats import Seats
from shared import audit, db
from shared.queue import Queue
from shared.store.layout import Layout


@dataclass(frozen=True)
class Caller:
    """Whose objects a request may see, and what it may do with them. `key_id` None: nobody has made a key yet."""

    tenant: str
    scopes: frozenset[str]
    key_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Services:
    """What the whole application shares."""

    engine: Engine
    layout: Layout
    queue: Queue
    max_queued_jobs: int
    waiters: Seats


@dataclass
class Intent:
    """What a request is about to do, for the audit log. `object_id` is what its path names, or what it made."""

    action: str
    object_id: str | None = None
    request_id: str | None = None
    remote_addr: str | None = None
    is_repeat: bool = False
    """True once it is known to have been answered before: then it changes nothing."""

    def by(self, caller: Caller, status: int) -> audit.Deed:
        """The same as an event of the audit log: this caller did it, and was answered `status`."""
        who = caller.key_id or (audit.LOCAL if caller.tenant else audit.UNKNOWN)
        return audit.Deed(
            actor=who, action=self.action, tenant=caller.tenant or None, object_id=self.object_id, status=status,
            request_id=self.request_id, remote_addr=self.remote_addr,
        )  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One admitted request."""

    caller: Caller
    services: Services
    intent: Intent

    @property
    def tenant(self) -> str:
        return self.caller.tenant

    @property
    def layout(self) -> Layout:
        return self.services.layout

    @property
    def queue(self) -> Queue:
        return self.services.queue

    def read(self) -> AbstractContextManager[db.Tx]:
        return db.read(self.services.engine)

    @contextmanager
    def write(self) -> Iterator[db.Tx]:
        """A write transaction, at whose end stands in the audit log what it did and for whom."""
        with db.write(self.services.engine) as tx:
            yield tx
            if not self.intent.is_repeat:
                audit.record(tx, self.intent.by(self.caller, 200))
