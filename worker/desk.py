"""The desk of a generator: takes requests off the broker, has an engine answer them, and says how it is doing.

It knows no model: an engine is whatever answers requests with streams of chunks.
"""

import logging
import math
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from shared import ids
from shared.errors import InvalidRequest, LoradError, Unavailable
from shared.generators import PUBLISH_S, EngineReport, GeneratorReport, MeterReport
from shared.outbox import Delivery
from shared.queue import Queue, received_request
from shared.specs import GenerationRequest
from worker.inference.meter import Meter
from worker.inference.stream import ChunkStream

if TYPE_CHECKING:
    from worker.inference.engine import EngineState

log = logging.getLogger("lorad.generator")

CLOSE_S: Final = 3.0
"""How long engines may take to close when the process ends: a step, and freeing what they hold."""
GRACE_S: Final = 5.0
"""After its deadline an engine has this long to say so."""
SMOOTHING_S: Final = 10.0
"""Over how long the rate of finished requests is measured."""


class Engine(Protocol):
    """What answers the requests of one base model."""

    @property
    def meter(self) -> Meter: ...
    def submit(self, request: GenerationRequest) -> ChunkStream: ...
    def state(self) -> "EngineState": ...
    def seconds_since_turn(self) -> float: ...
    def close(self) -> None: ...


class Desk:
    """Answers requests over any number of base models, `seats` at once. Any thread may call it."""

    def __init__(self, broker: Queue, *, seats: int, load: Callable[[str], Engine]) -> None:
        """`load(base_model_id)` makes the engine of a base model, when the first request for it comes."""
        self.generator_id = ids.new_id(ids.GENERATOR)
        self._broker = broker
        self._outbox = broker.outbox()
        self._seats = seats
        self._load = load
        self._loading = threading.Lock()
        self._engines: dict[str, Engine] = {}
        self._counting = threading.Lock()
        self._outcomes: Counter[str] = Counter()
        self._rates: dict[str, _Rate] = {}
        self._started_unix_s = time.time()
        self._leaving = threading.Event()
        self._closed = threading.Event()

    def answer(self, payload: object) -> None:
        """Answer one message, unless another generator does or nobody listens; never raises for a bad request.

        Returns when the answer is on the broker to its end, or will not be.
        """
        try:
            request = received_request(payload)
        except InvalidRequest as error:
            log.warning("discarded a message: %s", error.message)
            return
        if request.deadline_unix_s < time.time():
            return
        with self._outbox.open(request.request_id, whole=request.whole) as delivery:
            try:
                if not self._broker.claims.take(request.request_id, self.generator_id):
                    return
            except Unavailable as error:
                log.warning("request %s was not taken: %s", request.request_id, error.message)
                return
            self._answer(request, delivery)
        with self._counting:
            self._outcomes[str(delivery.outcome)] += 1
        self._rate(request.base_model_id).add(1)

    def _answer(self, request: GenerationRequest, delivery: Delivery) -> None:
        stream: ChunkStream | None = None
        try:
            stream = self.engine(request.base_model_id).submit(request)
            stream.forward(delivery.put)
        except LoradError as error:
            delivery.put_error(error.error_code, error.message, error.param)
        except Exception:
            log.exception("request %s failed", request.request_id)
            delivery.put_error("internal_error", "The generator failed on this request.")
        if delivery.wait(max(0.0, request.deadline_unix_s - time.time()) + GRACE_S) is None:
            log.error("request %s had no end at its deadline", request.request_id)
        if stream is not None:
            stream.cancel()  # nobody reads on: frees the row; after the last chunk it does nothing

    def engine(self, base_model_id: str) -> Engine:
        """The engine of this base model, loaded with the first request for it."""
        if (engine := self._engines.get(base_model_id)) is not None:
            return engine
        with self._loading:
            if base_model_id not in self._engines:
                self._engines[base_model_id] = self._load(base_model_id)
            return self._engines[base_model_id]

    # -- how it is doing

    def report(self) -> GeneratorReport:
        """What others may know of this generator, now."""
        with self._counting:
            outcomes = dict(self._outcomes)
        return GeneratorReport(
            generator_id=self.generator_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            started_unix_s=self._started_unix_s,
            seats=0 if self._leaving.is_set() else self._seats,
            seats_taken=self._outbox.num_open,
            outcomes=outcomes,
            engines=[self._engine_report(*one) for one in list(self._engines.items())],
        )

    def _engine_report(self, base_model_id: str, engine: Engine) -> EngineReport:
        state = engine.state()
        return EngineReport(
            base_model_id=base_model_id,
            running=state.running,
            waiting=state.waiting,
            max_rows=state.max_rows,
            kv_tokens_used=state.kv_tokens_used,
            kv_tokens_total=state.kv_tokens_total,
            resident=list(state.resident),
            resident_bytes=state.resident_bytes,
            adapter_cache_bytes=state.adapter_cache_bytes,
            requests_per_s=self._rate(base_model_id).per_s(),
            meter=MeterReport.model_validate(engine.meter.snapshot()),
        )

    def _rate(self, base_model_id: str) -> "_Rate":
        return self._rates.setdefault(base_model_id, _Rate())

    def start_publishing(self) -> None:
        """Publish the report now, and every PUBLISH_S until `close`."""
        self._publish()
        threading.Thread(target=self._keep_publishing, daemon=True, name="publisher").start()

    def _keep_publishing(self) -> None:
        while not self._closed.wait(PUBLISH_S):
            self._publish()

    def _publish(self) -> None:
        try:
            self._broker.generators.publish(self.report())
        except Unavailable as error:
            log.warning("this generator could not say that it is alive: %s", error.message)
        except Exception:
            log.exception("this generator cannot say how it is doing")

    def overdue_s(self, *, floor_s: float) -> float | None:
        """How long the longest turn of an engine has lasted, if longer than `floor_s`."""
        longest_s = max((engine.seconds_since_turn() for engine in list(self._engines.values())), default=0.0)
        return longest_s if longest_s > floor_s else None

    # -- the end

    def leave(self, *, after_s: float) -> None:
        """Be nobody's first choice any more; what is not answered `after_s` later ends with an error."""
        self._leaving.set()
        self._closed.wait(after_s)
        self._close_engines()

    def end_all(self, message: str, *, timeout_s: float) -> None:
        """End every open answer with an error that says to try again, without the engines' help."""
        self._outbox.end_all(Unavailable.code, message, timeout_s=timeout_s)

    def close(self) -> None:
        """Send what there is to send, be known no more, and close the engines, waiting CLOSE_S for them at most.

        A thread that still computes while Python ends would abort the process.
        """
        self._closed.set()
        self._outbox.close()
        try:
            self._broker.generators.withdraw(self.generator_id)
        except Unavailable as error:
            log.warning("this generator could not say that it leaves: %s", error.message)
        closing = threading.Thread(target=self._close_engines, daemon=True, name="closing")
        closing.start()
        closing.join(CLOSE_S)
        if closing.is_alive():
            log.warning("the engines were not closed within %g s", CLOSE_S)

    def _close_engines(self) -> None:
        for engine in list(self._engines.values()):
            engine.close()


class _Rate:
    """Events per second, those of long ago counting less."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._weight = 0.0
        self._at_s = clock()

    def add(self, count: int) -> None:
        with self._lock:
            self._decay()
            self._weight += count

    def per_s(self) -> float:
        with self._lock:
            self._decay()
            return self._weight / SMOOTHING_S

    def _decay(self) -> None:
        now = self._clock()
        self._weight *= math.exp(-(now - self._at_s) / SMOOTHING_S)
        self._at_s = now
