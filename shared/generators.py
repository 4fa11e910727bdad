"""What generators publish about themselves: who is alive, what each holds and has done. Validated when read."""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Annotated, Final
from weakref import WeakSet

import redis
from pydantic import Field, ValidationError, model_validator

from shared import ids
from shared.answers import PREFIX
from shared.errors import Unavailable
from shared.specs import Spec, VersionId

log = logging.getLogger(__name__)

PUBLISH_S: Final = 1.0
ALIVE_S: Final = 10
"""A generator that has not published for so long is taken for dead."""
CACHED_S: Final = 0.5
"""Reports that one process has read are good for so long."""
MAX_GENERATORS: Final = 1000
_LISTED: Final = f"{PREFIX}generators"
_LISTED_S: Final = 3600.0

GeneratorId = Annotated[str, Field(pattern=r"^gen-[0-9a-f]{32}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Seconds = Annotated[float, Field(ge=0)]


class HistogramReport(Spec):
    """How many values were at most each of `bounds`, but above the bound before; the last count has the rest."""

    bounds: Annotated[list[float], Field(max_length=32)]
    counts: Annotated[list[Count], Field(max_length=33)]
    sum: Seconds

    @model_validator(mode="after")
    def _one_count_more(self) -> "HistogramReport":
        if len(self.counts) != len(self.bounds) + 1 or self.bounds != sorted(set(self.bounds)):
            raise ValueError("bounds must rise, and there is one count more than bounds")
        return self


class MeterReport(Spec):
    """What an engine has done since it began. `adapter_tokens` is by adapter version, and "other"."""

    counts: Annotated[dict[Name, Count], Field(max_length=32)] = {}
    ended: Annotated[dict[Name, Count], Field(max_length=32)] = {}
    histograms: Annotated[dict[Name, HistogramReport], Field(max_length=16)] = {}
    adapter_tokens: Annotated[
        dict[VersionId | Annotated[str, Field(pattern="^other$")], Count], Field(max_length=64)
    ] = {}


class EngineReport(Spec):
    """One base model in one generator, now. `resident` are the adapter versions in its memory."""

    base_model_id: Annotated[str, Field(pattern=r"^base-[0-9a-f]{32}$")]
    running: Count
    waiting: Count
    max_rows: Count
    kv_tokens_used: Count
    kv_tokens_total: Count
    resident: Annotated[list[VersionId], Field(max_length=20_000)] = []
    resident_bytes: Count = 0
    adapter_cache_bytes: Count = 0
    requests_per_s: Seconds = 0.0
    meter: MeterReport = MeterReport()


class GeneratorReport(Spec):
    """One generator, now. It takes `seats` requests at once, rows and waiting room, of which `seats_taken` are open.

    One without seats is about to leave. `outcomes` counts requests since it began.
    """

    generator_id: GeneratorId
    host: Annotated[str, Field(max_length=255)]
    pid: Count
    started_unix_s: Seconds
    seats: Count
    seats_taken: Count
    outcomes: Annotated[dict[Name, Count], Field(max_length=64)] = {}
    engines: Annotated[list[EngineReport], Field(max_length=100)] = []


class Generators:
    """The generators of this service, as they published themselves on the broker. Threads may share it."""

    def __init__(self, client: "redis.Redis") -> None:
        self._client = client
        self._lock = threading.Lock()
        self._alive: dict[str, GeneratorReport] = {}
        self._present: set[str] = set()
        self._read_at_s = -CACHED_S
        self._sent: dict[str, WeakSet[object]] = {}

    def publish(self, report: GeneratorReport) -> None:
        """Be alive for ALIVE_S from now on, and say this. Raises Unavailable."""
        now = time.time()
        try:
            with self._client.pipeline() as batch:
                batch.set(_report_key(report.generator_id), report.model_dump_json(exclude_defaults=True), ex=ALIVE_S)
                batch.zadd(_LISTED, {report.generator_id: now})
                batch.zremrangebyscore(_LISTED, "-inf", now - _LISTED_S)
                batch.expire(_LISTED, int(_LISTED_S))
                batch.execute()
        except redis.RedisError as error:
            raise Unavailable("the broker does not answer") from error

    def withdraw(self, generator_id: str) -> None:
        """Be alive no more. Raises Unavailable."""
        try:
            with self._client.pipeline() as batch:
                batch.delete(_report_key(generator_id))
                batch.zrem(_LISTED, generator_id)
                batch.execute()
        except redis.RedisError as error:
            raise Unavailable("the broker does not answer") from error

    def alive(self, *, max_age_s: float = CACHED_S) -> list[GeneratorReport]:
        """What the generators that are alive said last, at most `max_age_s` ago. Raises Unavailable."""
        with self._lock:
            if time.monotonic() - self._read_at_s >= max_age_s:
                self._alive = self._read()
                self._read_at_s = time.monotonic()
                self._sent = {one: sent for one, sent in self._sent.items() if one in self._alive}
            return list(self._alive.values())

    def is_alive(self, generator_id: str) -> bool:
        """True if it has published anything of late, also what we cannot read: it may be of another release."""
        self.alive()
        return generator_id in self._present

    def holder(self, base_model_id: str, version_ids: Sequence[str]) -> str | None:
        """A generator with a free row, of several the one with most, that has all these adapters; None without one.

        None too where no choice is to be made: for the bare base, and with one generator. Raises Unavailable.
        """
        alive = self.alive()
        if not version_ids or len(alive) < 2:
            return None
        with self._lock:
            free = {one.generator_id: self._free_rows(one, base_model_id, set(version_ids)) for one in alive}
        best = max(free, key=free.__getitem__)
        return best if free[best] > 0 else None

    def note_sent(self, generator_id: str, errand: object) -> None:
        """This process has sent it something to do, which occupies a row of it as long as the `errand` is kept."""
        with self._lock:
            self._sent.setdefault(generator_id, WeakSet()).add(errand)

    def note_lost(self, generator_id: str, errand: object) -> None:
        """It did not take it."""
        with self._lock:
            self._sent.setdefault(generator_id, WeakSet()).discard(errand)

    def _free_rows(self, report: GeneratorReport, base_model_id: str, version_ids: set[str]) -> int:
        """Rows free for a request with these adapters; 0 if it would have to load one, or the generator is leaving."""
        for engine in report.engines:
            if engine.base_model_id == base_model_id and version_ids.issubset(engine.resident) and report.seats:
                sent = len(self._sent.get(report.generator_id, ()))
                return engine.max_rows - max(sent, engine.running + engine.waiting)
        return 0

    def requests_per_s(self, base_model_id: str) -> float:
        """How many requests of this base model are finished per second, all generators together. Raises Unavailable."""
        engines = [engine for report in self.alive() for engine in report.engines]
        return sum(engine.requests_per_s for engine in engines if engine.base_model_id == base_model_id)

    def _read(self) -> dict[str, GeneratorReport]:
        try:
            listed = self._client.zrange(_LISTED, 0, MAX_GENERATORS - 1, desc=True)
            known = [one for one in listed if isinstance(one, str) and ids.is_id(one, ids.GENERATOR)]
            texts = self._client.mget([_report_key(one) for one in known]) if known else []
        except redis.RedisError as error:
            raise Unavailable("the broker does not answer") from error
        self._present = {one for one, text in zip(known, texts, strict=True) if text is not None}
        found: dict[str, GeneratorReport] = {}
        for generator_id, text in zip(known, texts, strict=True):
            if text is None:
                continue
            try:
                report = GeneratorReport.model_validate_json(text)
            except ValidationError as error:
                log.warning("the report of %s is not one of ours: %d problems", generator_id, error.error_count())
                continue
            if report.generator_id == generator_id:
                found[generator_id] = report
        return found


def _report_key(generator_id: str) -> str:
    return f"{PREFIX}generator:{generator_id}"
