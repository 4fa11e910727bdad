"""Claims on requests: a message may reach two generators, or one twice, and is answered once."""

from typing import Final

import redis

from shared import ids
from shared.answers import ANSWERS_EXPIRE_S, PREFIX, cancel_key
from shared.errors import Unavailable

UNKNOWN: Final = "(unknown)"
"""Who took a request whose claim is not one of ours."""


class Claims:
    """Who answers which request, on the broker. Threads may share it."""

    def __init__(self, client: "redis.Redis") -> None:
        self._client = client

    def take(self, request_id: str, generator_id: str) -> bool:
        """True if this request is ours to answer: nobody has taken it, and somebody listens. Raises Unavailable."""
        try:
            with self._client.pipeline() as batch:
                batch.set(_claim_key(request_id), generator_id, nx=True, ex=ANSWERS_EXPIRE_S)
                batch.exists(cancel_key(request_id))
                taken, cancelled = batch.execute()
        except redis.RedisError as error:
            raise Unavailable("the broker does not answer") from error
        return bool(taken) and not cancelled

    def taker(self, request_id: str) -> str | None:
        """The generator that took it; None if none has. Raises Unavailable."""
        try:
            taker = self._client.get(_claim_key(request_id))
        except redis.RedisError as error:
            raise Unavailable("the broker does not answer") from error
        if taker is None:
            return None
        return taker if isinstance(taker, str) and ids.is_id(taker, ids.GENERATOR) else UNKNOWN


def _claim_key(request_id: str) -> str:
    return f"{PREFIX}claim:{request_id}"
