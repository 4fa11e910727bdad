"""Doorbells for trainers and requests for generators, over Celery on Redis or Valkey. Hides both."""

from collections.abc import Iterator
from typing import Final

from celery import Celery

from shared.specs import Chunk, GenerationRequest

TRAIN_TASK: Final = "lorad.train"
GENERATE_TASK: Final = "lorad.generate"
TRAIN_QUEUE: Final = "train"


def generate_queue(base_model_id: str) -> str:
    """The name of the queue that generators of one base model read."""
    return f"generate.{base_model_id}"


def celery_app(broker_url: str) -> Celery:
    """The Celery application for a redis://, rediss:// or unix:// broker."""
    raise NotImplementedError


class ChunkWriter:
    """Writes the chunks of one answer to where `Queue.generate` reads them."""

    def write(self, chunk: Chunk) -> None:
        """Append a chunk; raises Unavailable when the broker is down."""
        raise NotImplementedError

    def is_cancelled(self) -> bool:
        """True when nobody listens any more."""
        raise NotImplementedError


class Queue:
    """The broker as the API, the sweeper and the workers see it. Connects on first use; threads may share it."""

    def __init__(self, broker_url: str) -> None:
        self._url = broker_url

    def ring_trainers(self) -> bool:
        """Tell trainers to look; False within 2 s when the broker is down. Never raises."""
        raise NotImplementedError

    def generate(self, request: GenerationRequest) -> Iterator[Chunk]:
        """The chunks of one answer, the last with finish_reason or error.

        Raises Unavailable (broker down) on the call, and GenerationTimeout after `deadline_unix_s` on iteration;
        closing the iterator early cancels the request.
        """
        raise NotImplementedError

    def writer(self, request_id: str) -> ChunkWriter:
        raise NotImplementedError

    def ping(self) -> bool:
        """True if the broker answers within 2 s."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
