"""Celery's Redis transport, which goes on after a message that is none.

Whoever can write to the broker can write anything. Kombu lets what is no JSON, or no envelope, end the worker that
takes it off the queue, and with a trainer all that it trains. Such a message is gone from the queue once it is taken:
here it is logged and forgotten. What is wrong inside a good envelope Celery and the tasks themselves discard.
"""

import logging
from queue import Empty
from typing import Any

from celery.worker import state
from kombu.transport import TRANSPORT_ALIASES, redis

log = logging.getLogger("lorad.broker")

_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""What reading a message raises that is none; errors of the connection are others, and Celery reconnects after them."""


class Channel(redis.Channel):  # type: ignore[misc]  # kombu has no types
    """One connection that takes messages."""

    def _brpop_read(self, **options: Any) -> Any:
        held = dict(self.qos._delivered)
        try:
            return super()._brpop_read(**options)
        except _MALFORMED as error:
            self._forget([message for tag, message in self.qos._delivered.items() if held.get(tag) is not message])
            log.warning("discarded a message that is none: %s", type(error).__name__)
            raise Empty from None

    def _forget(self, messages: list[Any]) -> None:
        """Work on them no more: else each would count, for ever, as one of the few that are worked on at once."""
        for message in messages:
            self.basic_ack(message.delivery_tag)
        for request in list(state.reserved_requests):
            if any(request.message is message for message in messages):
                state.task_ready(request)


class Transport(redis.Transport):  # type: ignore[misc]  # kombu has no types
    """What a worker reads the broker with."""

    Channel = Channel

    def _deliver(self, message: Any, queue: str) -> None:
        """Celery would refuse other content types itself, but without a word."""
        if message["content-type"] != "application/json":
            raise ValueError("not JSON")
        super()._deliver(message, queue)


def install() -> None:
    """From now on Celery applications of this process use it for redis://, rediss:// and unix sockets."""
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:Transport"
