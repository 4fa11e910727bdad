"""Doorbells for trainers and requests for generators, over Celery on Redis or Valkey. Hides both.

A message is never the only copy of anything that matters: jobs are rows, and a lost doorbell is rung again by the
sweeper. So publishing never retries and never waits longer than `PUBLISH_S`.
"""

import time
from collections.abc import Iterator
from typing import Any, Final, Self

from celery import Celery
from kombu.exceptions import OperationalError
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from shared.errors import GenerationTimeout, Unavailable
from shared.specs import Chunk, GenerationRequest

TRAIN_TASK: Final = "lorad.train"
GENERATE_TASK: Final = "lorad.generate"
TRAIN_QUEUE: Final = "train"

PREFIX: Final = "lorad:"
PUBLISH_S: Final = 2.0
DOORBELL_EXPIRES_S: Final = 60.0
"""A trainer that ends a job looks for the next one by itself, so an old bell says nothing new."""
ANSWER_EXPIRES_S: Final = 300
"""How long chunks that nobody fetches are kept."""
_READ_BLOCK_MS: Final = 1000


def generate_queue(base_model_id: str) -> str:
    """The name of the queue that generators of one base model read."""
    return f"generate.{base_model_id}"


def celery_app(broker_url: str, *, socket_timeout_s: float = 30.0) -> Celery:
    """The Celery application for a redis://, rediss:// or unix:// broker.

    Acknowledged early, no results, nothing prefetched: with late acknowledgement Redis hands a message out again after
    its visibility timeout, which a training exceeds, and every copy would run.
    """
    app = Celery("lorad", broker=_kombu_url(broker_url), set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_acks_late=False,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        task_publish_retry=False,
        broker_connection_timeout=PUBLISH_S,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "global_keyprefix": PREFIX,
            "socket_timeout": socket_timeout_s,
            "socket_connect_timeout": PUBLISH_S,
            "socket_keepalive": True,
            # For whoever publishes; a worker's own consumer follows broker_connection_max_retries.
            "max_retries": 1,
            "interval_start": 0,
            "interval_step": 0,
            "interval_max": 0,
        },
    )
    return app


def _kombu_url(broker_url: str) -> str:
    if broker_url.startswith("unix://"):
        return "redis+socket://" + broker_url.removeprefix("unix://")
    return broker_url


class Queue:
    """The broker as the API, the sweeper and the workers see it. Connects on first use; threads may share it."""

    def __init__(self, broker_url: str) -> None:
        self._app = celery_app(broker_url, socket_timeout_s=PUBLISH_S)
        self._redis = Redis.from_url(
            broker_url, socket_connect_timeout=PUBLISH_S, socket_timeout=2 * PUBLISH_S, retry=Retry(NoBackoff(), 1)
        )

    def ring_trainers(self) -> bool:
        """Tell trainers to look; False within a few seconds when the broker is down. Never raises."""
        try:
            self._app.send_task(TRAIN_TASK, queue=TRAIN_QUEUE, expires=DOORBELL_EXPIRES_S, retry=False)
        except (OperationalError, RedisError, OSError):
            return False
        return True

    def generate(self, request: GenerationRequest) -> "Answer":
        """The chunks of one answer, the last with finish_reason or error. Raises Unavailable if the broker is down."""
        try:
            self._app.send_task(
                GENERATE_TASK,
                args=[request.model_dump(mode="json")],
                queue=generate_queue(request.base_model_id),
                expires=max(1.0, request.deadline_unix_s - time.time()),
                retry=False,
            )
        except (OperationalError, RedisError, OSError) as error:
            raise Unavailable("The message broker does not answer; try again.") from error
        return Answer(self._redis, request.request_id, request.deadline_unix_s)

    def writer(self, request_id: str) -> "ChunkWriter":
        """Where a generator writes the answer to this request."""
        return ChunkWriter(self._redis, request_id)

    def ping(self) -> bool:
        """True if the broker answers within a few seconds."""
        try:
            return bool(self._redis.ping())
        except (RedisError, OSError):
            return False

    def close(self) -> None:
        self._redis.close()
        self._app.close()


class Answer(Iterator[Chunk]):
    """The chunks of one request as they come. Closing it before the last chunk cancels the request.

    Iteration raises GenerationTimeout once the deadline has passed, and Unavailable if the broker goes down.
    """

    def __init__(self, redis: "Redis", request_id: str, deadline_unix_s: float) -> None:
        self._redis = redis
        self._request_id = request_id
        self._deadline_unix_s = deadline_unix_s
        self._last_id = b"0"
        self._waiting: list[Chunk] = []
        self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        if self._ended:
            raise StopIteration
        while not self._waiting:
            self._receive()
        chunk = self._waiting.pop(0)
        if chunk.is_last:
            self._ended = True
        return chunk

    def _receive(self) -> None:
        left_s = self._deadline_unix_s - time.time()
        if left_s <= 0:
            self.close()
            raise GenerationTimeout
        block_ms = max(1, min(_READ_BLOCK_MS, int(left_s * 1000)))
        try:
            # redis-py's type covers every protocol and decoding; ours are lists or dicts of bytes.
            streams: Any = self._redis.xread({_chunks_key(self._request_id): self._last_id}, block=block_ms)
        except (RedisError, OSError) as error:
            raise Unavailable("The message broker does not answer; try again.") from error
        for _, entries in streams.items() if isinstance(streams, dict) else streams:
            for entry_id, fields in entries:
                self._last_id = entry_id
                self._waiting.append(Chunk.model_validate_json(fields[b"chunk"]))

    def close(self) -> None:
        """Tell the generator to stop, unless it has said its last word."""
        if self._ended:
            return
        self._ended = True
        try:
            self._redis.set(_cancel_key(self._request_id), b"1", ex=ANSWER_EXPIRES_S)
        except (RedisError, OSError):
            return  # the request's deadline ends it


class ChunkWriter:
    """Writes the chunks of one answer to where `Queue.generate` reads them."""

    def __init__(self, redis: "Redis", request_id: str) -> None:
        self._redis = redis
        self._request_id = request_id
        self._cancelled = False

    def write(self, chunk: Chunk) -> None:
        """Append a chunk; raises Unavailable when the broker is down."""
        key = _chunks_key(self._request_id)
        try:
            with self._redis.pipeline(transaction=False) as pipe:
                pipe.xadd(key, {b"chunk": chunk.model_dump_json(exclude_defaults=True).encode()})
                pipe.expire(key, ANSWER_EXPIRES_S)
                pipe.exists(_cancel_key(self._request_id))
                self._cancelled = bool(pipe.execute()[2])
        except (RedisError, OSError) as error:
            raise Unavailable("The message broker does not answer.") from error

    def is_cancelled(self) -> bool:
        """True if nobody listened any more when the last chunk was written."""
        return self._cancelled


def _chunks_key(request_id: str) -> str:
    return f"{PREFIX}chunks:{request_id}"


def _cancel_key(request_id: str) -> str:
    return f"{PREFIX}cancel:{request_id}"
