"""The way back over the broker: typed pieces of one answer on a stream with an expiry, and a flag that stops it."""

import logging
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

import redis
from pydantic import ValidationError

from shared.errors import Unavailable
from shared.specs import Chunk, Inspection

log = logging.getLogger(__name__)

PREFIX: Final = "lorad:"
"""All keys on the broker begin with it."""
ANSWERS_EXPIRE_S: Final = 600
CANCELS: Final = f"{PREFIX}cancels"
"""A stream with the id of each request that was cancelled, for who listens to it; the flag is for who looks."""
MAX_CANCELS: Final = 4096
BLOCK_MS: Final = 250
"""A reader that waits looks up this often."""

Piece = TypeVar("Piece", Chunk, Inspection)


class AnswerWriter(Generic[Piece]):
    """Writes the pieces of one answer to where an `AnswerReader` reads them."""

    def __init__(self, client: "redis.Redis", request_id: str) -> None:
        self._client = client
        self._stream = chunks_key(request_id)
        self._cancelled = cancel_key(request_id)

    def write(self, piece: Piece) -> None:
        """Append a piece; raises Unavailable when the broker is down."""
        try:
            with self._client.pipeline() as batch:
                batch.xadd(self._stream, {"chunk": piece.model_dump_json(exclude_defaults=True)})
                batch.expire(self._stream, ANSWERS_EXPIRE_S)
                batch.execute()
        except redis.RedisError as error:
            raise Unavailable("the broker does not answer") from error

    def is_cancelled(self) -> bool:
        """True when nobody listens any more; raises Unavailable when the broker is down."""
        try:
            return bool(self._client.exists(self._cancelled))
        except redis.RedisError as error:
            raise Unavailable("the broker does not answer") from error


class AnswerReader(Generic[Piece]):
    """Reads the pieces of one answer, inside `with`. Leaving that before the last piece cancels the request."""

    def __init__(self, client: "redis.Redis", request_id: str, kind: type[Piece]) -> None:
        self._client = client
        self._request_id = request_id
        self._kind: type[Piece] = kind
        self._seen = "0"
        self._waiting: deque[Piece] = deque()
        self._is_whole = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._is_whole:
                self._client.delete(chunks_key(self._request_id))
            else:
                cancel(self._client, self._request_id)
        except redis.RedisError as failure:
            log.warning("request %s could not be ended on the broker: %s", self._request_id, failure)

    def next(self, *, until_unix_s: float, look_up: Callable[[], None] | None = None) -> Piece | None:
        """The next piece, as soon as it is there; None if none comes in time. Raises Unavailable.

        While nothing is there `look_up` is called every BLOCK_MS: what it raises ends the wait.
        """
        while not self._waiting:
            if look_up is not None:
                look_up()
            remaining_ms = int((until_unix_s - time.time()) * 1000)
            if remaining_ms <= 0:
                return None
            self._waiting += self._receive(min(remaining_ms, BLOCK_MS))
        piece = self._waiting.popleft()
        self._is_whole = piece.is_last
        return piece

    def _receive(self, block_ms: int) -> list[Piece]:
        try:
            answer: Any = self._client.xread({chunks_key(self._request_id): self._seen}, count=256, block=block_ms)
            entries = answer[0][1] if answer else []
            pieces = [self._kind.model_validate_json(fields["chunk"]) for _, fields in entries]
        except redis.RedisError as error:
            raise Unavailable("the broker went away in the middle of an answer") from error
        except (ValidationError, KeyError) as error:
            raise Unavailable("the answer on the broker is not one of ours") from error
        if entries:
            self._seen = entries[-1][0]
        return pieces


def cancel(client: "redis.Redis", request_id: str) -> None:
    """Tell whoever answers this request, now or later, that nobody listens. Raises RedisError."""
    with client.pipeline() as batch:
        batch.set(cancel_key(request_id), "1", ex=ANSWERS_EXPIRE_S)
        batch.xadd(CANCELS, {"request": request_id}, maxlen=MAX_CANCELS)
        batch.expire(CANCELS, ANSWERS_EXPIRE_S)
        batch.execute()


def chunks_key(request_id: str) -> str:
    return f"{PREFIX}chunks:{request_id}"


def cancel_key(request_id: str) -> str:
    return f"{PREFIX}cancel:{request_id}"
