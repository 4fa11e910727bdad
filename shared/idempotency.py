"""Answers kept for requests that come twice, so that what they ask for is made once.

A key's row is inserted and filled in the transaction that makes the object, so there is never one without the other.
Nothing says "in flight" but that open transaction, which ends with its process: a crash leaves nothing to clear up.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError, OperationalError

from shared import limits
from shared.db import Tx, now_ms
from shared.errors import IdempotencyMismatch, RequestInFlight
from shared.tables import IdempotencyKey

IN_FLIGHT_WAIT_MS: Final = 2000
"""How long Postgres waits for the transaction of a request with the same key. SQLite's writers queue anyway."""
_TRIES: Final = 5
_LOCK_NOT_AVAILABLE: Final = "55P03"  # PostgreSQL's error code of lock_timeout


@dataclass(frozen=True, kw_only=True)
class Request:
    """What may come twice. `request_sha256` is of all that matters in it; `retry_count` is how often its client says
    to have sent it before, None if the key alone decides."""

    tenant: str
    key: str
    request_sha256: str
    kept_s: int = limits.IDEMPOTENCY_KEY_S
    retry_count: int | None = None


@dataclass(frozen=True)
class Kept:
    """An answer as it was given: the body byte for byte, since JSON read and written again need not look the same."""

    status: int
    body: str


def take(tx: Tx, request: Request) -> Kept | None:
    """The answer that is kept for this request; None if the key is now ours, to `keep` an answer in this transaction.

    A kept answer counts for `kept_s` by the database's clock and, if the client counts its retries, only for a later
    try than the one it was given to: an earlier or equal count is a request of its own. Raises IdempotencyMismatch if
    the key came with another request, RequestInFlight if one that holds it does not end within `IN_FLIGHT_WAIT_MS`.
    """
    with _bounded_wait(tx):
        for _ in range(_TRIES):  # the row that was in the way may be gone when we look: the sweeper deletes old ones
            if _insert(tx, request):
                return None
            if (row := _locked(tx, request)) is None:
                continue
            if _is_spent(tx, row, request):
                _renew(tx, request)
                return None
            if row.request_sha256 != request.request_sha256:
                raise IdempotencyMismatch
            return Kept(cast(int, row.status), cast(dict[str, Any], row.response)["body"])
    raise RequestInFlight


def keep(tx: Tx, request: Request, answer: Kept) -> None:
    """Keep the answer under the key that `take` took in this transaction."""
    response = {"body": answer.body, "retry_count": request.retry_count}
    tx.execute(_of(request, update(IdempotencyKey)).values(status=answer.status, response=response), **_PLAIN)


def forget_old(tx: Tx, *, max_age_s: float = limits.IDEMPOTENCY_KEY_S) -> None:
    """Delete the kept answers that count no more."""
    old = delete(IdempotencyKey).where(IdempotencyKey.created_at < now_ms(tx) - int(max_age_s * 1000))
    tx.execute(old, **_PLAIN)


_PLAIN: Final[dict[str, Any]] = {"execution_options": {"synchronize_session": False}}


def _of(request: Request, statement: Any) -> Any:
    return statement.where(IdempotencyKey.tenant == request.tenant, IdempotencyKey.key == request.key)


def _insert(tx: Tx, request: Request) -> bool:
    """True if no row was in the way. On Postgres it waits for a transaction that has inserted the same key."""
    row = insert(IdempotencyKey).values(
        tenant=request.tenant, key=request.key, request_sha256=request.request_sha256, created_at=now_ms(tx)
    )
    try:
        with tx.begin_nested():
            tx.execute(row)
    except IntegrityError:
        return False
    return True


def _locked(tx: Tx, request: Request) -> IdempotencyKey | None:
    query = _of(request, select(IdempotencyKey)).with_for_update()
    return cast(IdempotencyKey | None, tx.scalars(query).one_or_none())


def _is_spent(tx: Tx, row: IdempotencyKey, request: Request) -> bool:
    """True if the row answers no request like this one any more."""
    if row.response is None or row.created_at < cast(int, tx.scalar(select(now_ms(tx)))) - request.kept_s * 1000:
        return True
    return request.retry_count is not None and request.retry_count <= row.response["retry_count"]


def _renew(tx: Tx, request: Request) -> None:
    fresh = {"request_sha256": request.request_sha256, "status": None, "response": None, "created_at": now_ms(tx)}
    tx.execute(_of(request, update(IdempotencyKey)).values(fresh), **_PLAIN)


@contextmanager
def _bounded_wait(tx: Tx) -> Iterator[None]:
    """Inside, Postgres waits for a lock for at most `IN_FLIGHT_WAIT_MS`; afterwards for as long as before."""
    if tx.get_bind().dialect.name != "postgresql":
        yield
        return
    before = tx.scalar(select(func.current_setting("lock_timeout")))
    tx.execute(select(func.set_config("lock_timeout", f"{IN_FLIGHT_WAIT_MS}ms", True)))
    try:
        yield
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) == _LOCK_NOT_AVAILABLE:
            raise RequestInFlight from None
        raise
    tx.execute(select(func.set_config("lock_timeout", before, True)))
