"""The way out of a generator: one thread sends what all its open answers have to say, a step's worth in one round trip.

A second thread listens to cancellations. Nothing is asked per token, and no thread wakes up for one but the sender.
"""

import logging
import queue
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Final, Self

import redis

from shared import ids
from shared.answers import ANSWERS_EXPIRE_S, CANCELS, chunks_key
from shared.specs import Chunk, ChunkError

log = logging.getLogger(__name__)

MAX_BATCH: Final = 512
"""Pieces that are sent at once."""
LISTEN_MS: Final = 1000
PAUSE_S: Final = 1.0
"""Before a broker that was away is asked for cancellations again."""

ANSWERED: Final = "ok"
CANCELLED: Final = "cancelled"
LOST: Final = "lost"

# One command and one answer however many pieces: most of a pipeline's cost in redis-py is per command.
_SEND: Final = """
for number, key in ipairs(KEYS) do
  redis.call('XADD', key, '*', 'chunk', ARGV[number + 1])
  redis.call('EXPIRE', key, ARGV[1])
end
"""


class Delivery:
    """One open answer, inside `with`. It ends when its last chunk is sent, when nobody listens, or with the broker.

    `outcome` is None until then: ANSWERED, CANCELLED, LOST, or the code of the error that was sent.
    """

    def __init__(self, outbox: "Outbox", request_id: str, *, whole: bool) -> None:
        self.request_id = request_id
        self.outcome: str | None = None
        self.held: dict[int, Chunk] | None = None
        """What waits for the end, by choice, where nobody reads before it; None before the first piece."""
        self.is_whole = whole
        self._outbox = outbox
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(LOST)
        self._outbox.close_delivery(self)

    def put(self, chunk: Chunk) -> None:
        """Send a chunk behind those before it; returns at once. After the end it does nothing."""
        if self.outcome is None:
            self._outbox.put(self, chunk)

    def put_error(self, code: str, message: str, param: str | None = None) -> None:
        """End the answer with an error."""
        self.put(Chunk(error=ChunkError(code=code, message=message, param=param)))

    def end(self, outcome: str) -> None:
        """The first outcome counts."""
        if self.outcome is None:
            self.outcome = outcome
            self._ended.set()

    def wait(self, timeout_s: float) -> str | None:
        """The outcome; None if there is none in time."""
        self._ended.wait(timeout_s)
        return self.outcome


class Outbox:
    """Sends the chunks of many answers in order, and ends those that nobody listens to. Any thread may call it."""

    def __init__(self, client: "redis.Redis") -> None:
        """`client` must not retry, decodes answers, and gives up in few seconds."""
        self._client = client
        self._send_script = client.register_script(_SEND)
        self._inbox: queue.SimpleQueue[tuple[Delivery, Chunk] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: dict[str, Delivery] = {}
        self._closing = threading.Event()
        self._sender = threading.Thread(target=self._send_all, name="outbox", daemon=True)
        self._sender.start()
        threading.Thread(target=self._listen, name="cancellations", daemon=True).start()

    def open(self, request_id: str, *, whole: bool = False) -> Delivery:
        """An answer to be sent. From now on a cancellation of its request ends it.

        With `whole` its first piece is sent at once, and what follows when the end is there.
        """
        delivery = Delivery(self, request_id, whole=whole)
        with self._lock:
            self._open.setdefault(request_id, delivery)  # a message that comes twice takes nothing from the first
        return delivery

    @property
    def num_open(self) -> int:
        return len(self._open)

    def end_all(self, code: str, message: str, *, timeout_s: float) -> None:
        """End every open answer with an error, as far as the broker takes that in time."""
        with self._lock:
            open_now = list(self._open.values())
        for delivery in open_now:
            delivery.put_error(code, message)
        until_s = time.monotonic() + timeout_s
        for delivery in open_now:
            delivery.wait(max(0.0, until_s - time.monotonic()))

    def close(self) -> None:
        """Send what waits, and stop; cancellations are heard for up to LISTEN_MS more."""
        self._closing.set()
        self._inbox.put(None)
        self._sender.join()

    def put(self, delivery: Delivery, chunk: Chunk) -> None:
        self._inbox.put((delivery, chunk))

    def close_delivery(self, delivery: Delivery) -> None:
        with self._lock:
            if self._open.get(delivery.request_id) is delivery:
                del self._open[delivery.request_id]

    # -- the sending thread

    def _send_all(self) -> None:
        while (batch := self._waiting()) is not None:
            try:
                self._send(batch)
            except Exception as error:  # the thread must outlive whatever one batch does to it
                if not isinstance(error, redis.RedisError):
                    log.exception("chunks could not be sent")
                for delivery in {delivery for delivery, _ in batch}:
                    log.warning("request %s was lost: the broker does not answer: %s", delivery.request_id, error)
                    delivery.end(LOST)

    def _waiting(self) -> list[tuple[Delivery, Chunk]] | None:
        """What waits to be sent, at least one piece; None when closing. Texts that follow each other become one."""
        first = self._inbox.get()
        if first is None:
            return None
        batch = [first]
        while len(batch) < MAX_BATCH:
            try:
                following = self._inbox.get_nowait()
            except queue.Empty:
                break
            if following is None:
                self._inbox.put(None)
                break
            batch.append(following)
        due = [due for delivery, chunk in batch if delivery.outcome is None for due in _due(delivery, chunk)]
        return joined(due)

    def _send(self, batch: list[tuple[Delivery, Chunk]]) -> None:
        if not batch:
            return
        keys = [chunks_key(delivery.request_id) for delivery, _ in batch]
        pieces = [chunk.model_dump_json(exclude_defaults=True) for _, chunk in batch]
        self._send_script(keys=keys, args=[ANSWERS_EXPIRE_S, *pieces])
        for delivery, chunk in batch:
            if chunk.is_last:
                delivery.end(chunk.error.code if chunk.error is not None else ANSWERED)

    # -- the listening thread

    def _listen(self) -> None:
        seen = "0"
        while not self._closing.is_set():
            try:
                answer: Any = self._client.xread({CANCELS: seen}, count=256, block=LISTEN_MS)
            except Exception as error:  # not only RedisError: redis-py raises ValueError for a connection just closed
                if self._closing.is_set():
                    return
                log.warning("cancellations are not heard: %s", error)
                self._closing.wait(PAUSE_S)
                continue
            for entry_id, fields in answer[0][1] if answer else []:
                seen = entry_id
                self._cancel(fields.get("request"))

    def _cancel(self, request_id: object) -> None:
        if not isinstance(request_id, str) or not ids.is_id(request_id, ids.REQUEST):
            return
        with self._lock:
            delivery = self._open.get(request_id)
        if delivery is not None:
            delivery.end(CANCELLED)


def _due(delivery: Delivery, chunk: Chunk) -> list[tuple[Delivery, Chunk]]:
    """What is to be sent now that this piece has come."""
    if not delivery.is_whole:
        return [(delivery, chunk)]
    if delivery.held is None:
        delivery.held = {}
        return [(delivery, chunk)]
    if chunk.error is not None:
        return [(delivery, chunk)]
    held = delivery.held.pop(chunk.index, None)
    delivery.held[chunk.index] = chunk if held is None else _join(held, chunk)  # the newest is the last
    return [(delivery, piece) for piece in delivery.held.values()] if chunk.is_last else []


def joined(batch: Iterable[tuple[Delivery, Chunk]]) -> list[tuple[Delivery, Chunk]]:
    """The same with pieces of one choice that follow each other in an answer made one; nothing is reordered."""
    pieces: list[tuple[Delivery, Chunk]] = []
    place: dict[Delivery, int] = {}
    for delivery, chunk in batch:
        at = place.get(delivery)
        before = None if at is None else pieces[at][1]
        if at is None or before is None or not _may_join(before, chunk):
            place[delivery] = len(pieces)
            pieces.append((delivery, chunk))
        else:
            pieces[at] = (delivery, _join(before, chunk))
    return pieces


def _may_join(before: Chunk, after: Chunk) -> bool:
    ends = before.finish_reason is not None or before.is_last or after.error is not None
    return before.index == after.index and not ends


def _join(before: Chunk, after: Chunk) -> Chunk:
    logprobs = None
    if before.logprobs is not None or after.logprobs is not None:
        logprobs = [*(before.logprobs or []), *(after.logprobs or [])]
    told = {
        "text": before.text + after.text,
        "logprobs": logprobs,
        "fingerprint": after.fingerprint or before.fingerprint,
    }
    return after.model_copy(update=told)
