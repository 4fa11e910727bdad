"""Doorbells for trainers and requests for generators, over Celery on Redis or Valkey. Hides both.

The ledger is the database; a message that is lost, repeated or late does no harm. Hence early acknowledgement, no
result backend, no prefetch, and a publisher that gives up after 2 s instead of waiting for the broker.
"""

import logging
import time
from collections.abc import Iterator
from typing import Any, Final

import redis
from celery import Celery
from kombu.exceptions import OperationalError
from pydantic import ValidationError
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared import ids
from shared.errors import GenerationTimeout, InvalidRequest, QueueFull, Unavailable
from shared.specs import Chunk, GenerationRequest

log = logging.getLogger(__name__)

TRAIN_TASK: Final = "lorad.train"
GENERATE_TASK: Final = "lorad.generate"
TRAIN_QUEUE: Final = "train"
PREFIX: Final = "lorad:"
TIMEOUT_S: Final = 2.0
MAX_DOORBELLS: Final = 100
"""No more than these wait at once: each only says 'look'."""
MAX_WAITING: Final = 1000
"""Generation requests that may wait for one base model."""
CHUNKS_EXPIRE_S: Final = 600
MAX_CONNECTIONS: Final = 32
"""Messages that one process publishes at the same moment."""
BLOCK_MS: Final = 1000


def generate_queue(base_model_id: str) -> str:
    """The name of the queue that generators of one base model read."""
    return f"generate.{base_model_id}"


def celery_app(broker_url: str, *, timeout_s: float = 30.0) -> Celery:
    """The Celery application for a redis://, rediss:// or unix:// broker, for a worker; `timeout_s` is per answer."""
    app = Celery("lorad", broker=broker_url.replace("unix://", "redis+socket://", 1), set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        result_backend=None,
        task_acks_late=False,
        task_create_missing_queues=True,
        task_default_queue=TRAIN_QUEUE,
        task_publish_retry=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_pool="threads",
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": 3600,
            "socket_timeout": timeout_s,
            "socket_connect_timeout": TIMEOUT_S,
            "socket_keepalive": True,
            "global_keyprefix": PREFIX,
        },
    )
    return app


def received_request(payload: object) -> GenerationRequest:
    """The request in a message's payload, validated again: anybody on the broker can write messages."""
    try:
        request = GenerationRequest.model_validate(payload)
    except ValidationError as error:
        raise InvalidRequest(f"not a generation request: {error.error_count()} problems") from error
    if not ids.is_id(request.request_id, ids.REQUEST):
        raise InvalidRequest("not a generation request: request_id is not an id")
    return request


class ChunkWriter:
    """Writes the chunks of one answer to where `Queue.generate` reads them."""

    def __init__(self, client: "redis.Redis", request_id: str) -> None:
        self._client = client
        self._stream = _stream_key(request_id)
        self._cancelled = _cancel_key(request_id)

    def write(self, chunk: Chunk) -> None:
        """Append a chunk; raises Unavailable when the broker is down."""
        try:
            with self._client.pipeline() as batch:
                batch.xadd(self._stream, {"chunk": chunk.model_dump_json(exclude_defaults=True)})
                batch.expire(self._stream, CHUNKS_EXPIRE_S)
                batch.execute()
        except redis.RedisError as error:
            raise Unavailable("the broker does not answer") from error

    def is_cancelled(self) -> bool:
        """True when nobody listens any more; raises Unavailable when the broker is down."""
        try:
            return bool(self._client.exists(self._cancelled))
        except redis.RedisError as error:
            raise Unavailable("the broker does not answer") from error


class Queue:
    """The broker as the API, the sweeper and the workers see it. Connects on first use; threads may share it."""

    def __init__(self, broker_url: str) -> None:
        self._celery = celery_app(broker_url, timeout_s=TIMEOUT_S)
        # Kombu retries a refused connection for seconds, whatever the publisher's own retry policy says.
        self._celery.conf.broker_transport_options |= {"max_retries": 0}
        # A pool of our own: Celery's is shared by all applications of the process, and closing it closes theirs.
        self._connections = self._celery.connection_for_write().Pool(limit=MAX_CONNECTIONS)
        self._client: redis.Redis = redis.Redis.from_url(
            broker_url,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
            protocol=2,
        )

    def ring_trainers(self) -> bool:
        """Tell trainers to look; False within about 2 s when the broker is down. Never raises."""
        try:
            if self._waiting(TRAIN_QUEUE) < MAX_DOORBELLS:
                self._send(TRAIN_TASK, TRAIN_QUEUE, [])
        except Unavailable as error:
            log.warning("the doorbell did not ring: %s", error)
            return False
        return True

    def generate(self, request: GenerationRequest) -> Iterator[Chunk]:
        """The chunks of one answer, the last with finish_reason or error.

        Raises on the call: Unavailable (broker down), QueueFull. Raises on iteration: GenerationTimeout after
        `deadline_unix_s`, Unavailable. Closing the iterator before its end cancels the request.
        """
        if not ids.is_id(request.request_id, ids.REQUEST):
            raise InvalidRequest("request_id is not an id")
        queue = generate_queue(request.base_model_id)
        if self._waiting(queue) >= MAX_WAITING:
            raise QueueFull
        remaining_s = max(request.deadline_unix_s - time.time(), 0.0)
        self._send(GENERATE_TASK, queue, [request.model_dump(mode="json")], expires=remaining_s)
        return self._read(request)

    def writer(self, request_id: str) -> ChunkWriter:
        """Where a generator writes the answer to this request."""
        return ChunkWriter(self._client, request_id)

    def ping(self) -> bool:
        """True if the broker answers within 2 s."""
        try:
            return bool(self._client.ping())
        except redis.RedisError:
            return False

    def close(self) -> None:
        """Close all connections; the next use opens new ones."""
        self._connections.force_close_all(close_pool=False)
        self._client.close()

    def _waiting(self, queue: str) -> int:
        try:
            return int(self._client.llen(PREFIX + queue))
        except redis.RedisError as error:
            raise Unavailable("the broker does not answer") from error

    def _send(self, task: str, queue: str, arguments: list[Any], *, expires: float | None = None) -> None:
        try:
            with self._connections.acquire(block=True) as connection:
                self._celery.send_task(
                    task,
                    arguments,
                    queue=queue,
                    expires=expires,
                    retry=False,
                    ignore_result=True,
                    connection=connection,
                )
        except (OperationalError, redis.RedisError, OSError) as error:
            raise Unavailable("the broker does not answer") from error

    def _read(self, request: GenerationRequest) -> Iterator[Chunk]:
        """The chunks as they come. Leaves the cancel flag behind unless the last chunk was reached."""
        stream, seen, is_whole = _stream_key(request.request_id), "0", False
        try:
            while True:
                remaining_ms = int((request.deadline_unix_s - time.time()) * 1000)
                if remaining_ms <= 0:
                    raise GenerationTimeout
                for key, chunk in self._next_chunks(stream, seen, min(remaining_ms, BLOCK_MS)):
                    seen, is_whole = key, chunk.is_last
                    yield chunk
                    if is_whole:
                        return
        finally:
            self._end(request.request_id, is_whole=is_whole)

    def _next_chunks(self, stream: str, seen: str, block_ms: int) -> list[tuple[str, Chunk]]:
        try:
            answer: Any = self._client.xread({stream: seen}, count=256, block=block_ms)
            entries = answer[0][1] if answer else []
            return [(key, Chunk.model_validate_json(fields["chunk"])) for key, fields in entries]
        except redis.RedisError as error:
            raise Unavailable("the broker went away in the middle of an answer") from error
        except (ValidationError, KeyError) as error:
            raise Unavailable("the answer on the broker is not one of ours") from error

    def _end(self, request_id: str, *, is_whole: bool) -> None:
        try:
            if is_whole:
                self._client.delete(_stream_key(request_id))
            else:
                self._client.set(_cancel_key(request_id), "1", ex=CHUNKS_EXPIRE_S)
        except redis.RedisError as error:
            log.warning("request %s could not be ended on the broker: %s", request_id, error)


def _stream_key(request_id: str) -> str:
    return f"{PREFIX}chunks:{request_id}"


def _cancel_key(request_id: str) -> str:
    return f"{PREFIX}cancel:{request_id}"
