"""An engine without a model: rows, a waiting line and steps of a settable length, for tests of what stands around one.

Run as a program it is a generator over such an engine: broker URL, base model, name, adapters it holds.
"""

import sys
import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from shared import generators
from shared.queue import GENERATE_TASK, Queue, celery_app, listen
from shared.specs import Chunk, GenerationRequest, Usage
from worker.celery_program import run_worker
from worker.desk import Desk
from worker.inference.meter import Meter
from worker.inference.stream import ChunkStream


@dataclass
class FakeEngine:
    """Answers with `max_tokens` times `word`, a step apart, `max_rows` at a time, first come first served."""

    max_rows: int = 2
    step_s: float = 0.02
    word: str = "x"
    resident: tuple[str, ...] = ()
    steps: int = 0
    begun: list[str] = field(default_factory=list)
    left_at_step: dict[str, int] = field(default_factory=dict)
    failing: Exception | None = None
    stuck: bool = False
    meter: Meter = field(default_factory=Meter)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[GenerationRequest, ChunkStream]] = []
        self._rows: list[tuple[GenerationRequest, ChunkStream, int]] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> ChunkStream:
        if self.failing is not None:
            raise self.failing
        stream = ChunkStream(lambda: None)
        with self._lock:
            self._waiting.append((request, stream))
        return stream

    def state(self) -> Any:
        return SimpleNamespace(
            running=len(self._rows), waiting=len(self._waiting), max_rows=self.max_rows, kv_tokens_used=1,
            kv_tokens_total=100, resident=self.resident, resident_bytes=10, adapter_cache_bytes=1000,
        )  # fmt: skip

    def seconds_since_turn(self) -> float:
        return 3600.0 if self.stuck else 0.0

    def close(self) -> None:
        self._closing = True
        self._thread.join()
        for *_, stream in [*self._waiting, *((request, stream) for request, stream, _ in self._rows)]:
            stream.fail(RuntimeError("closed"))

    def _run(self) -> None:
        while not self._closing:
            time.sleep(self.step_s)
            if not self.stuck:
                with self._lock:
                    self._step()

    def _step(self) -> None:
        self.steps += 1
        for request, stream in [entry for entry in self._waiting if entry[1].is_cancelled]:
            self._waiting.remove((request, stream))
            self.left_at_step[request.request_id] = self.steps
        while self._waiting and len(self._rows) < self.max_rows:
            request, stream = self._waiting.pop(0)
            self.begun.append(request.request_id)
            self._rows.append((request, stream, 0))
        self._rows = [row for row in map(self._advance, self._rows) if row is not None]

    def _advance(
        self, row: tuple[GenerationRequest, ChunkStream, int]
    ) -> tuple[GenerationRequest, ChunkStream, int] | None:
        request, stream, done = row
        ends = done + 1 == (request.max_tokens or 3)
        if stream.is_cancelled:
            self.left_at_step[request.request_id] = self.steps
            return None
        if not ends:
            stream.write(Chunk(text=self.word))
            return request, stream, done + 1
        usage = Usage(prompt_tokens=1, completion_tokens=done + 1)
        stream.write(Chunk(text=self.word, finish_reason="length", usage=usage))
        self.left_at_step[request.request_id] = self.steps
        return None


def main(broker_url: str, base_model_id: str, word: str, step_s: str, *resident: str) -> None:
    """A generator over one fake engine, until a signal; first says its id. It counts as dead after 2 s of silence."""
    generators.ALIVE_S = 2  # type: ignore[misc]  # a test would wait long for the real one
    engine = FakeEngine(word=word, step_s=float(step_s), resident=resident)
    desk = Desk(Queue(broker_url), seats=4, load=lambda _: engine)
    desk.engine(base_model_id)
    app = celery_app(broker_url)
    app.task(name=GENERATE_TASK)(desk.answer)
    desk.start_publishing()
    print(desk.generator_id, flush=True)
    run_worker(app, queues=listen(app, base_model_id, desk.generator_id), threads=4)


if __name__ == "__main__":
    main(*sys.argv[1:])
