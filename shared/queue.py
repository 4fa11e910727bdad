"""Doorbells and inspections for trainers, requests for generators, over Celery on Redis or Valkey. Hides both.

The ledger is the database; a message that is lost, repeated or late does no harm. Hence early acknowledgement, no
result backend, no prefetch, and a publisher that gives up after 2 s instead of waiting for the broker.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import redis
from celery import Celery
from kombu import Exchange
from kombu import Queue as BrokerQueue
from kombu.exceptions import OperationalError
from pydantic import ValidationError
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared import broker_transport, ids
from shared.answers import PREFIX, AnswerReader, AnswerWriter
from shared.claims import Claims
from shared.errand import Errand
from shared.errors import DeadlineExceeded, InvalidRequest, QueueFull, Unavailable
from shared.generators import Generators
from shared.outbox import Outbox
from shared.specs import Chunk, GenerationRequest, Inspection, InspectionRequest

log = logging.getLogger(__name__)

TRAIN_TASK: Final = "lorad.train"
GENERATE_TASK: Final = "lorad.generate"
TRAIN_QUEUE: Final = "train"
INSPECT_TASK: Final = "lorad.inspect"
INSPECT_QUEUE: Final = "inspect"
TIMEOUT_S: Final = 2.0
MAX_DOORBELLS: Final = 100
"""No more than these wait at once: each only says 'look'."""
MAX_WAITING: Final = 1000
"""Generation requests that may wait for one base model, unless a setting says otherwise."""
RETRY_AFTER_S: Final = 5
"""When to try again where nobody has measured how fast requests are answered."""
LONGEST_RETRY_AFTER_S: Final = 60
OWN_QUEUE_S: Final = 60
"""How long requests stay in the queue of a generator that takes none: others have them long before."""
MAX_INSPECTIONS: Final = 32
"""Inspections that may wait for a trainer."""
TAKEN_S: Final = 10
"""How long an inspection waits for a trainer to begin with it."""
MAX_CONNECTIONS: Final = 32
"""Messages that one process publishes at the same moment."""

ChunkWriter = AnswerWriter[Chunk]
R = TypeVar("R", GenerationRequest, InspectionRequest)


def generate_queue(base_model_id: str) -> str:
    """The name of the queue that generators of one base model read."""
    return f"generate.{base_model_id}"


def own_queue(base_model_id: str, generator_id: str) -> str:
    """The name of the queue that one generator alone reads, for requests whose adapters it holds."""
    return f"{generate_queue(base_model_id)}.{generator_id}"


def listen(app: Celery, base_model_id: str, generator_id: str) -> list[str]:
    """The names of the queues that a generator of this base model reads, made known to its Celery application."""
    own = _own_queue(base_model_id, generator_id)
    app.amqp.queues.add(own)
    return [generate_queue(base_model_id), own.name]


def _own_queue(base_model_id: str, generator_id: str) -> BrokerQueue:
    # Without an exchange the broker keeps nothing of a queue but its messages: generators come and go.
    name = own_queue(base_model_id, generator_id)
    return BrokerQueue(name, Exchange(""), routing_key=name)


def celery_app(broker_url: str, *, timeout_s: float = 30.0) -> Celery:
    """The Celery application for a redis://, rediss:// or unix:// broker, for a worker; `timeout_s` is per answer."""
    broker_transport.install()
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
        worker_enable_remote_control=False,  # anybody on the broker could say 'shutdown'
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
    return _received(payload, GenerationRequest)


def received_inspection(payload: object) -> InspectionRequest:
    """The request in a message's payload, validated again: anybody on the broker can write messages."""
    return _received(payload, InspectionRequest)


def _received(payload: object, kind: type[R]) -> R:
    try:
        request = kind.model_validate(payload)
    except ValidationError as error:
        raise InvalidRequest(f"not a {kind.__name__}: {error.error_count()} problems") from error
    if not ids.is_id(request.request_id, ids.REQUEST):
        raise InvalidRequest(f"not a {kind.__name__}: request_id is not an id")
    return request


class Queue:
    """The broker as the API, the sweeper and the workers see it. Connects on first use; threads may share it."""

    def __init__(self, broker_url: str, *, max_waiting: int = MAX_WAITING) -> None:
        """`max_waiting` generation requests may wait for one base model."""
        self._max_waiting = max_waiting
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
        self.generators = Generators(self._client)
        self.claims = Claims(self._client)

    def ring_trainers(self) -> bool:
        """Tell trainers to look; False within about 2 s when the broker is down. Never raises."""
        try:
            if self._waiting(TRAIN_QUEUE) < MAX_DOORBELLS:
                self._send(TRAIN_TASK, TRAIN_QUEUE, [])
        except Unavailable as error:
            log.warning("the doorbell did not ring: %s", error)
            return False
        return True

    def generate(self, request: GenerationRequest, *, look_up: Callable[[], None] | None = None) -> Iterator[Chunk]:
        """The chunks of one answer, the last with usage or error.

        Raises on the call: Unavailable (broker down), QueueFull. Raises on iteration: GenerationTimeout after
        `deadline_unix_s`, Unavailable, and what `look_up` raises, which is called between chunks and several times a
        second. Closing the iterator before its end, and any error but the generator's own, cancels the request.
        """
        if not ids.is_id(request.request_id, ids.REQUEST):
            raise InvalidRequest("request_id is not an id")
        queue = generate_queue(request.base_model_id)
        num_waiting = self._waiting(queue)
        if num_waiting >= self._max_waiting:
            raise QueueFull(retry_after_s=self._retry_after_s(request.base_model_id, num_waiting))
        errand = Errand(
            request,
            client=self._client,
            generators=self.generators,
            send=self._send_request,
            num_waiting=lambda: self._waiting(queue),
            look_up=look_up,
        )
        errand.begin()
        return errand.chunks()

    def num_waiting(self, base_model_id: str) -> int:
        """Requests in the queue that all generators of a base model read. Raises Unavailable."""
        return self._waiting(generate_queue(base_model_id))

    def num_doorbells(self) -> int:
        """Doorbells that no trainer has answered. Raises Unavailable."""
        return self._waiting(TRAIN_QUEUE)

    def num_inspections(self) -> int:
        """Inspections that no trainer has taken. Raises Unavailable."""
        return self._waiting(INSPECT_QUEUE)

    def outbox(self) -> Outbox:
        """A way for a generator to answer many requests at once."""
        return Outbox(self._client)

    def writer(self, request_id: str) -> ChunkWriter:
        """Where a generator writes the answer to this request."""
        return AnswerWriter(self._client, request_id)

    def inspect(self, request: InspectionRequest) -> Inspection:
        """The last piece of a trainer's answer; waits for it until `deadline_unix_s`.

        Raises Unavailable (broker down; no trainer began within TAKEN_S), QueueFull, DeadlineExceeded.
        """
        if not ids.is_id(request.request_id, ids.REQUEST):
            raise InvalidRequest("request_id is not an id")
        if self._waiting(INSPECT_QUEUE) >= MAX_INSPECTIONS:
            raise QueueFull
        taken_by = min(request.deadline_unix_s, time.time() + TAKEN_S)
        self._send(INSPECT_TASK, INSPECT_QUEUE, [request.model_dump(mode="json")], expires=taken_by - time.time())
        self._forget_later(INSPECT_QUEUE, TAKEN_S)
        with AnswerReader(self._client, request.request_id, Inspection) as answer:
            piece = answer.next(until_unix_s=taken_by)
            if piece is None:
                raise Unavailable("no trainer took the request: none is running, or each is busy with another data set")
            while not piece.is_last:
                piece = answer.next(until_unix_s=request.deadline_unix_s)
                if piece is None:
                    raise DeadlineExceeded("a trainer is reading the data set, but did not get through it in time")
        return piece

    def inspection_writer(self, request_id: str) -> AnswerWriter[Inspection]:
        """Where a trainer writes the answer to this inspection."""
        return AnswerWriter(self._client, request_id)

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

    def _retry_after_s(self, base_model_id: str, num_waiting: int) -> int:
        """In how many whole seconds the queue is likely to be empty."""
        requests_per_s = self.generators.requests_per_s(base_model_id)
        if not requests_per_s:
            return RETRY_AFTER_S
        return min(LONGEST_RETRY_AFTER_S, math.ceil(num_waiting / requests_per_s))

    def _send_request(self, request: GenerationRequest, generator_id: str | None) -> None:
        remaining_s = max(request.deadline_unix_s - time.time(), 0.0)
        arguments = [request.model_dump(mode="json")]
        base_model_id = request.base_model_id
        if generator_id is None:
            self._send(GENERATE_TASK, generate_queue(base_model_id), arguments, expires=remaining_s)
            return
        queue = _own_queue(base_model_id, generator_id)
        self._send(GENERATE_TASK, queue, arguments, expires=remaining_s)
        self._forget_later(queue.name, OWN_QUEUE_S)

    def _forget_later(self, queue: str, seconds: int) -> None:
        """Let the messages of a queue go once the newest is too old: if nobody takes them, nobody else removes them."""
        try:
            self._client.expire(PREFIX + queue, seconds)
        except redis.RedisError as error:
            raise Unavailable("the broker does not answer") from error

    def _send(self, task: str, queue: str | BrokerQueue, arguments: list[Any], *, expires: float | None = None) -> None:
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
