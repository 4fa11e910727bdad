"""InferenceEngine: many requests, one model, one thread that owns it."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from shared.errors import GenerationTimeout, LoradError, Unavailable
from shared.specs import GenerationRequest
from worker.base_model import BaseModel
from worker.inference.adapters import Readiness, ResidentAdapters
from worker.inference.answer import Answer, fingerprint
from worker.inference.forward import RowForward
from worker.inference.prompt import PromptReader
from worker.inference.sampling import choose_all
from worker.inference.stream import ChunkStream
from worker.inference.text import Detokeniser
from worker.lora.manager import AdapterManager

log = logging.getLogger("lorad.inference")


class InferenceEngine:
    """Answers requests over one base model and any number of its adapters, `max_rows` at a time.

    Continuous batching: a waiting request gets a row as soon as one is free and its adapter is in memory; its prompt is
    read in one forward, then every step gives every row its next token. A request that fails, fails alone; if a whole
    step fails, its rows do, and the engine goes on.

    `locate(version_id)` gives an adapter's directory, verified; what it raises is that request's answer. The engine is
    the only user of the model until `close`.
    """

    def __init__(
        self, base: BaseModel, *, locate: Callable[[str], Path], adapter_cache_bytes: int, max_rows: int
    ) -> None:
        self._base = base
        self._max_rows = max_rows
        self._prompts = PromptReader(base)
        manager = AdapterManager(base.model)
        self._forward = RowForward(base, manager, max_rows=max_rows)
        self._adapters = ResidentAdapters(
            manager, locate=locate, budget_bytes=adapter_cache_bytes, on_read=self._wake
        )  # fmt: skip
        self._inbox: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._waiting: list[Answer] = []
        self._rows: list[Answer] = []
        self._may_admit = False
        self._closing = threading.Event()
        self._door = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"inference-{base.name}", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> ChunkStream:
        """The answer as it comes. Whatever is wrong with the request is said by the stream; Unavailable once closed."""
        stream = ChunkStream(self._wake)
        try:
            prompt = self._prompts.read(request)
            answer = Answer(
                request,
                prompt=prompt,
                stream=stream,
                detokeniser=Detokeniser(self._base.tokenizer, prompt.ids),
                eos_token_ids=self._base.eos_token_ids,
            )
        except Exception as error:
            _fail(stream, error)
            return stream
        with self._door:
            if self._closing.is_set():
                raise Unavailable("the inference engine is closed")
            self._inbox.put(answer)
        return stream

    def close(self) -> None:
        """Finish the step that runs, end every open answer with an error, and free the model."""
        with self._door:
            self._closing.set()
        self._wake()
        self._thread.join()

    # -- the engine's thread

    def _run(self) -> None:
        try:
            while self._receive():
                try:
                    self._drop_the_gone()
                    if (answer := self._admit()) is not None:
                        self._prefill(answer)
                    self._decode()
                except Exception as error:
                    self._end_all(error)
        finally:
            self._shut()

    def _receive(self) -> bool:
        """Take in what was submitted, waiting for something if there is nothing to do; False once closing."""
        timeout_s: float | None = 0.0
        if not self._rows and not self._may_admit:
            timeout_s = self._seconds_to_next_deadline()
        with contextlib.suppress(queue.Empty):
            while True:
                arrived = self._inbox.get(timeout=timeout_s)
                timeout_s = 0.0
                if arrived is not None:
                    self._waiting.append(arrived)
        return not self._closing.is_set()

    def _drop_the_gone(self) -> None:
        """Free the places of answers nobody waits for: cancelled ones, and those past their deadline."""
        for row in reversed(range(len(self._rows))):
            if _is_gone(self._rows[row]):
                self._leave(row)
        self._waiting = [answer for answer in self._waiting if not _is_gone(answer)]
        self._adapters.forget_reads_except({answer.adapter for answer in self._waiting if answer.adapter})

    def _admit(self) -> Answer | None:
        """Take one waiting answer whose adapter is ready, first come first served; its adapter is pinned.

        One whose adapter is still being read lets others pass. One whose adapter lacks only room does not: the adapters
        in use would otherwise stay in use.
        """
        self._may_admit = False
        if len(self._rows) == self._max_rows:
            return None
        for answer in list(self._waiting):
            if answer not in self._waiting:  # failed with another that wanted the same adapter
                continue
            readiness = self._acquire(answer)
            if readiness is Readiness.READY:
                self._waiting.remove(answer)
                self._may_admit = True
                return answer
            if readiness is Readiness.NO_ROOM:
                return None
        return None

    def _acquire(self, answer: Answer) -> Readiness | None:
        """Whether its adapter is ready; if that failed, so do all that wait for it, and None comes back."""
        if answer.adapter is None:
            return Readiness.READY
        try:
            return self._adapters.acquire(answer.adapter)
        except Exception as error:
            for same in [other for other in self._waiting if other.adapter == answer.adapter]:
                self._waiting.remove(same)
                _fail(same.stream, error)
            return None

    def _prefill(self, answer: Answer) -> None:
        """Read the prompt of an admitted answer into a new row, and give it its first token."""
        try:
            digest = None if answer.adapter is None else self._adapters.digest(answer.adapter)
            answer.begin(fingerprint(self._base.digest, digest))
            logits_V = self._forward.prefill(answer.prompt.ids, answer.adapter)
        except Exception as error:
            _fail(answer.stream, error)
            self._release(answer)
            return
        self._rows.append(answer)
        [token_id] = choose_all(logits_V[None], [answer.sampler])
        self._emit(len(self._rows) - 1, token_id)

    def _decode(self) -> None:
        """Give every row its next token; if the step fails, so do its rows."""
        if not self._rows:
            return
        try:
            last = [answer.token_ids[-1] for answer in self._rows]
            logits_BV = self._forward.decode(last, [answer.adapter for answer in self._rows])
            token_ids = choose_all(logits_BV, [answer.sampler for answer in self._rows])
        except Exception as error:
            for row in reversed(range(len(self._rows))):
                _fail(self._rows[row].stream, error)
                self._leave(row)
            return
        for row in reversed(range(len(self._rows))):
            self._emit(row, token_ids[row])

    def _emit(self, row: int, token_id: int | None) -> None:
        """Hand a row its token; a row that has ended leaves. Rows before it keep their numbers."""
        answer = self._rows[row]
        try:
            if token_id is None:
                raise LoradError("the model's output is not a finite number", code="internal_error")
            ended = answer.take(token_id)
        except Exception as error:
            _fail(answer.stream, error)
            ended = True
        if ended:
            self._leave(row)

    def _leave(self, row: int) -> None:
        """Free a row and unpin its adapter; the last row takes its number."""
        answer, last = self._rows[row], self._rows.pop()
        if answer is not last:
            self._rows[row] = last
        self._forward.remove(row)
        self._release(answer)
        self._may_admit = True

    def _release(self, answer: Answer) -> None:
        if answer.adapter is not None:
            self._adapters.release(answer.adapter)

    def _end_all(self, error: Exception) -> None:
        """End every open answer with an error, and free what they held."""
        while self._waiting:
            _fail(self._waiting.pop().stream, error)
        for row in reversed(range(len(self._rows))):
            _fail(self._rows[row].stream, error)
            self._leave(row)

    def _shut(self) -> None:
        """Take no more answers and end the open ones; also when this thread breaks, so that nobody waits forever."""
        with self._door:
            self._closing.set()
        self._may_admit = True
        self._receive()
        self._end_all(Unavailable("the inference engine has closed; try again"))
        self._adapters.close()

    def _seconds_to_next_deadline(self) -> float | None:
        """None: nothing waits. At most a minute, since a deadline may lie further off than a lock can wait."""
        if not self._waiting:
            return None
        return min(60.0, max(0.0, min(answer.deadline_unix_s for answer in self._waiting) - time.time()))

    def _wake(self) -> None:
        self._inbox.put(None)


def _is_gone(answer: Answer) -> bool:
    """True if nobody waits for this answer any more; one past its deadline is told so."""
    if answer.stream.is_cancelled:
        return True
    if answer.is_late:
        answer.stream.fail(GenerationTimeout())
        return True
    return False


def _fail(stream: ChunkStream, error: Exception) -> None:
    """End one answer with an error; what is no domain error is logged too, since the stream does not show it."""
    if not isinstance(error, LoradError):
        log.error("a generation request failed", exc_info=error)
    stream.fail(error)
