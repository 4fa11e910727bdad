"""One request on its way to a generator and back: offered to the one that holds its adapter, then to all.

A request is in the queue of the generator that is preferred for it, or in the one that all generators of its base model
read. Who does not take it in TAKEOVER_S shares it with the others; claims let it run once. If its taker dies before the
first chunk, it is sent again under another id; whoever still answers the old one is told that nobody listens.
"""

import time
from collections.abc import Callable, Iterator
from typing import Final

import redis

from shared import ids
from shared.answers import AnswerReader
from shared.claims import UNKNOWN, Claims
from shared.errors import GenerationTimeout, Unavailable
from shared.generators import Generators
from shared.specs import Chunk, GenerationRequest

TAKEOVER_S: Final = 0.1
LOOK_S: Final = 1.0
"""Between looks at the taker of a request that has nothing to say."""
MISSED: Final = 5
"""Looks in a row at a request that nobody took and that is in no queue, until it counts as lost."""
MAX_SENDS: Final = 3

Send = Callable[[GenerationRequest, str | None], None]


class _Lost(Exception):
    """The request has not begun, and nobody is going to answer it."""


class Errand:
    """The answer to one request, wherever it comes from."""

    def __init__(
        self,
        request: GenerationRequest,
        *,
        client: "redis.Redis",
        generators: Generators,
        send: Send,
        num_waiting: Callable[[], int],
        look_up: Callable[[], None] | None,
    ) -> None:
        """`send(request, generator)` puts it into that generator's queue, or with None into the one for all.

        `num_waiting()` is how many requests are in the latter. `look_up` is called while nothing comes, and may raise.
        """
        self._request = request
        self._client = client
        self._generators = generators
        self._claims = Claims(client)
        self._send = send
        self._num_waiting = num_waiting
        self._look_up = look_up or (lambda: None)

    def begin(self) -> None:
        """Send it for the first time. Raises Unavailable."""
        request = self._request
        self._preferred = self._generators.holder(
            request.base_model_id, [share.version_id for share in request.adapters]
        )  # fmt: skip
        if self._preferred is not None:
            self._generators.note_sent(self._preferred, self)
        self._send(request, self._preferred)

    def chunks(self) -> Iterator[Chunk]:
        """The chunks as they come. Leaves the cancel flag behind unless the last chunk was reached.

        Raises GenerationTimeout after the request's deadline, Unavailable, and what `look_up` raises.
        """
        for attempt in range(1, MAX_SENDS + 1):
            try:
                with AnswerReader(self._client, self._request.request_id, Chunk) as answer:
                    yield from self._read(answer)
                return
            except _Lost:
                if attempt == MAX_SENDS:
                    raise Unavailable("each generator that took the request has gone") from None
            self._request = self._request.model_copy(update={"request_id": ids.new_id(ids.REQUEST)})
            self._preferred = None
            self._send(self._request, None)

    def _read(self, answer: AnswerReader[Chunk]) -> Iterator[Chunk]:
        chunk = None if self._preferred is None else self._offer(answer, self._preferred)
        taker = _Taker(self._request.request_id, self._claims, self._generators, self._num_waiting)

        def look() -> None:
            self._look_up()
            taker.look()

        while True:
            if chunk is None:
                chunk = answer.next(until_unix_s=self._request.deadline_unix_s, look_up=look)
            if chunk is None:
                raise GenerationTimeout
            taker.has_begun = True
            yield chunk
            if chunk.is_last:
                return
            chunk = None

    def _offer(self, answer: AnswerReader[Chunk], preferred: str) -> Chunk | None:
        """Give the preferred generator its moment; if it does not take the request, all may."""
        until_unix_s = min(time.time() + TAKEOVER_S, self._request.deadline_unix_s)
        chunk = answer.next(until_unix_s=until_unix_s, look_up=self._look_up)
        if chunk is None and self._claims.taker(self._request.request_id) is None:
            self._generators.note_lost(preferred, self)
            self._send(self._request, None)
        return chunk


class _Taker:
    """Whoever took a request, and whether it is still there."""

    def __init__(self, request_id: str, claims: Claims, generators: Generators, num_waiting: Callable[[], int]) -> None:
        self.has_begun = False
        self._request_id = request_id
        self._claims = claims
        self._generators = generators
        self._num_waiting = num_waiting
        self._taker: str | None = None
        self._missed = 0
        self._look_at_s = time.monotonic() + LOOK_S

    def look(self) -> None:
        """Now and then; raises _Lost or, if its answer has begun, Unavailable when nobody goes on with it."""
        if time.monotonic() < self._look_at_s:
            return
        self._look_at_s = time.monotonic() + LOOK_S
        if self._taker is None:
            self._taker = self._claims.taker(self._request_id)
        if self._taker is None:
            self._missed = self._missed + 1 if not self.has_begun and self._num_waiting() == 0 else 0
            if self._missed == MISSED:
                raise _Lost
        elif self._taker != UNKNOWN and not self._generators.is_alive(self._taker):
            if self.has_begun:
                raise Unavailable("the generator that was answering has gone")
            raise _Lost
