"""InferenceEngine: many requests, one model, one thread that owns it."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from shared.errors import InvalidRequest, LoradError, Unavailable
from shared.specs import GenerationRequest
from worker.base_model import BaseModel
from worker.inference.adapters import Locate, Readiness, ResidentAdapters
from worker.inference.answer import Answer, Choice, fingerprint
from worker.inference.fairness import FairQueue
from worker.inference.forward import Piece, RowForward
from worker.inference.meter import Meter
from worker.inference.prompt import PromptReader
from worker.inference.rows import PromptBudget, Row, plan
from worker.inference.sampling import choose_all
from worker.inference.stream import ChunkStream

log = logging.getLogger("lorad.inference")


@dataclass(frozen=True)
class EngineState:
    """An engine at one moment. Tokens of the cache count as used from when a row is promised them."""

    running: int
    waiting: int
    max_rows: int
    kv_tokens_used: int
    kv_tokens_total: int
    resident: tuple[str, ...]
    resident_bytes: int
    adapter_cache_bytes: int


class InferenceEngine:
    """Answers requests over one base model and any number of its adapters, `max_rows` sequences at a time.

    Continuous batching: a choice that waits gets a row as soon as one is free, the cache has room for all it may grow
    to, and its adapters are in memory; whose turn it is, is decided by tokens, fairly over tenants and their adapters.
    Each step computes one token of every row that decodes and, beside them, pieces of the prompts of new rows. What
    goes wrong with one row ends that row's request and no other.

    `locate(version_id)` says where an adapter's files are; what it raises is that request's answer. If `compiles`, a
    CPU gets C kernels where there is a compiler. The engine is the only user of the model until `close`, which gives
    the model back as it was.
    """

    def __init__(self, base: BaseModel, *, locate: Locate, adapter_cache_bytes: int, max_rows: int,
                 kv_cache_bytes: int = 2 << 30, compiles: bool = True, meter: Meter | None = None) -> None:  # fmt: skip
        self._base = base
        self._max_rows = max_rows
        self._adapter_cache_bytes = adapter_cache_bytes
        self._prompts = PromptReader(base)
        self.meter = meter or Meter()
        self._inbox: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._waiting: FairQueue[Choice] = FairQueue()
        self._rows: list[Row] = []
        self._num_admitted = 0
        self._budget = PromptBudget(on_gpu=base.device.type == "cuda")
        self._may_admit = False
        self._turn_began_s: float | None = None
        self._closing = threading.Event()
        self._door = threading.Lock()
        made: Future[None] = Future()

        def make() -> tuple[RowForward, ResidentAdapters]:
            forward = RowForward(base, max_rows=max_rows, cache_bytes=kv_cache_bytes, compiles=compiles)
            return forward, ResidentAdapters(
                forward.bank, locate=locate, budget_bytes=adapter_cache_bytes, on_read=self._wake, meter=self.meter
            )

        def run() -> None:
            try:
                # On this thread, since no other may compute on several cores (see `one_core`).
                self._forward, self._adapters = make()
            except BaseException as error:
                made.set_exception(error)
            else:
                made.set_result(None)
                self._run()

        self._thread = threading.Thread(target=run, name=f"inference-{base.name}", daemon=True)
        self._thread.start()
        made.result()

    def submit(self, request: GenerationRequest) -> ChunkStream:
        """The answer as it comes. Whatever is wrong with the request is said by the stream; Unavailable once closed."""
        stream = ChunkStream(self._wake)
        try:
            prompt = self._prompts.read(request)
            self._must_fit(len(prompt.ids) + prompt.max_new_tokens)
            answer = Answer(
                request,
                prompt=prompt,
                stream=stream,
                tokenizer=self._base.tokenizer,
                eos_token_ids=self._base.eos_token_ids,
            )
        except Exception as error:
            if not isinstance(error, LoradError):
                log.error("a generation request failed", exc_info=error)
            stream.fail(error)
            return stream
        with self._door:
            if self._closing.is_set():
                raise Unavailable("the inference engine is closed")
            for choice in answer.choices:
                self.meter.arrived(choice)
            self._inbox.put(answer)
        return stream

    def close(self) -> None:
        """Finish the step that runs, end every open answer with an error, and give the model back."""
        with self._door:
            self._closing.set()
        self._wake()
        self._thread.join()

    def state(self) -> EngineState:
        """How full it is; any thread may ask, the figures are those of the last turn or of the one that runs."""
        cache = self._forward.cache
        return EngineState(
            running=len(self._rows),
            waiting=len(self._waiting),
            max_rows=self._max_rows,
            kv_tokens_used=cache.num_promised,
            kv_tokens_total=cache.num_tokens,
            resident=self._adapters.resident,
            resident_bytes=self._adapters.size_bytes,
            adapter_cache_bytes=self._adapter_cache_bytes,
        )

    def seconds_since_turn(self) -> float:
        """How long the turn of the loop that runs has lasted; 0 while the engine waits for work."""
        began_s = self._turn_began_s
        return 0.0 if began_s is None else time.monotonic() - began_s

    def check(self) -> None:
        """Raise AssertionError if an engine that has nothing to do still holds something; for tests and operators."""
        assert not self._rows, f"{len(self._rows)} rows are open"
        assert not len(self._waiting), f"{len(self._waiting)} choices wait"
        assert not self._adapters.num_pins, f"{self._adapters.num_pins} pins are left"
        assert not self._forward.cache.lengths, f"the cache has rows of {self._forward.cache.lengths} tokens"
        assert self._forward.cache.is_zero(), "the cache is not zero where no row is"

    # -- the engine's thread

    def _run(self) -> None:
        try:
            while self._receive():
                self._turn_began_s = time.monotonic()
                try:
                    self._drop_the_gone()
                    self._admit()
                    self._step()
                except Exception as error:
                    self._end_all(error)
                self._turn_began_s = None
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
                for choice in arrived.choices if arrived is not None else ():
                    self._waiting.add(choice)
        return not self._closing.is_set()

    def _drop_the_gone(self) -> None:
        """Free the places of choices nobody waits for: cancelled or failed ones, and those past their deadline."""
        for number in reversed(range(len(self._rows))):
            if self._rows[number].choice.is_gone:
                self._leave(number, "cancelled")
        for choice in [choice for choice in self._waiting.everyone() if choice.is_gone]:
            self._waiting.remove(choice)
            self.meter.ended(choice, "cancelled")

    def _admit(self) -> None:
        """Give rows to those that wait, in turn, as long as there is room.

        One whose adapter is still being read lets others pass. One that lacks only room does not: what is in use would
        otherwise stay in use, and a long request would wait forever.
        """
        self._may_admit = False
        for choice in self._waiting:
            if len(self._rows) == self._max_rows or not self._take_in(choice):
                break
        self._adapters.prefetch(choice.adapters for choice in self._waiting if choice.adapters)

    def _take_in(self, choice: Choice) -> bool:
        """Give a choice a row if it can have one; False if it waits for room."""
        try:
            readiness = self._adapters.acquire(choice.adapters) if choice.adapters else Readiness.READY
        except Exception as error:
            for other in [other for other in self._waiting.everyone() if other.adapters == choice.adapters]:
                other.fail(error)
                self._waiting.remove(other)
                self.meter.ended(other, "failed")
            return True
        if readiness is not Readiness.READY:
            return readiness is Readiness.LOADING
        number = None
        try:
            number = self._forward.add_row(len(choice.prompt.ids) + choice.prompt.max_new_tokens)
        finally:
            if number is None:
                self._adapters.release(choice.adapters)
        if number is None:
            return False
        assert number == len(self._rows)
        self._waiting.remove(choice)
        self._num_admitted += 1
        self._rows.append(Row(choice, self._num_admitted))
        choice.begin(fingerprint(self._base.digest, self._adapters.digests(choice.adapters)))
        self.meter.admitted(choice)
        return True

    def _step(self) -> None:
        """Compute the next token of every row that decodes, and read on in the prompts of the others."""
        pieces = plan(self._rows, self._budget)
        if not pieces:
            return
        began_s = time.monotonic()
        read = [piece for piece in pieces if not self._rows[piece.row].decodes]
        num_decoding, num_prompt_tokens = len(pieces) - len(read), sum(len(piece.token_ids) for piece in read)
        for piece in read:
            self._rows[piece.row].num_read += len(piece.token_ids)
            self._waiting.charge(self._rows[piece.row].choice, num_input_tokens=len(piece.token_ids))
        self._compute(pieces)
        seconds = time.monotonic() - began_s
        self._budget.learn(seconds, num_decoding=num_decoding, num_prompt_tokens=num_prompt_tokens)
        self.meter.step(seconds, num_decoding, num_prompt_tokens)

    def _compute(self, pieces: Sequence[Piece]) -> None:
        """Run the pieces as one forward and hand out what follows; if that fails, each by itself, to find out whose
        fault it is."""
        try:
            logits_WV = self._forward.step(pieces)
        except Exception as error:
            if len(pieces) == 1:
                self._fail(pieces[0].row, error)
                return
            log.warning("a step of %d rows failed: each is tried alone", len(pieces), exc_info=error)
            for piece in sorted(pieces, key=lambda piece: piece.row, reverse=True):
                self._compute([piece])
        else:
            self._hand_out(pieces, logits_WV)

    def _hand_out(self, pieces: Sequence[Piece], logits_WV: Tensor) -> None:
        """Give each row whose next token was wanted that token; those that have ended leave.

        From the last row to the first: a row that leaves gives its number to one that is done with already.
        """
        wanted = [piece.row for piece in pieces if piece.wants_next]
        chosen = choose_all(logits_WV, [self._rows[row].choice for row in wanted]) if wanted else []
        for row, one in sorted(zip(wanted, chosen, strict=True), key=lambda pair: pair[0], reverse=True):
            choice = self._rows[row].choice
            try:
                if one is None:
                    raise LoradError("the model's output is not a finite number", code="internal_error")
                if isinstance(one, Exception):
                    raise one
                has_ended = choice.take(one)
            except Exception as error:
                self._fail(row, error)
                continue
            self._waiting.charge(choice, num_output_tokens=1)
            self.meter.emitted(choice, is_first=len(choice.token_ids) == 1)
            if has_ended:
                self._leave(row, "finished")

    def _fail(self, row: int, error: Exception) -> None:
        self._rows[row].choice.fail(error)
        self._leave(row, "failed")

    def _leave(self, row: int, reason: str) -> None:
        """Free a row and unpin its adapters; the last row takes its number."""
        choice, last = self._rows[row].choice, self._rows.pop()
        if choice is not last.choice:
            self._rows[row] = last
        self._forward.remove_row(row)
        self._adapters.release(choice.adapters)
        self.meter.ended(choice, reason)
        self._may_admit = True

    def _end_all(self, error: Exception) -> None:
        """End every open answer with an error, and free what they held; raises if not all of it can be freed.

        All are told before anything is freed: with a device that is lost, that fails too.
        """
        for choice in [*self._waiting.everyone(), *(row.choice for row in self._rows)]:
            choice.fail(error)
        for choice in self._waiting.everyone():
            self._waiting.remove(choice)
            self.meter.ended(choice, "failed")
        for row in reversed(range(len(self._rows))):
            self._leave(row, "failed")
        if self._forward.cache.lengths:
            raise RuntimeError("the cache has rows that nobody has") from error

    def _shut(self) -> None:
        """Take no more answers and end the open ones; also when this thread breaks, so that nobody waits forever."""
        with self._door:
            self._closing.set()
        self._may_admit = True
        self._receive()
        self._end_all(Unavailable("the inference engine has closed; try again"))
        self._adapters.close()
        self._forward.close()

    def _must_fit(self, num_tokens: int) -> None:
        """Raises InvalidRequest if no cache of this engine will ever hold so many tokens."""
        most = self._forward.cache.most_positions
        if num_tokens > most:
            raise InvalidRequest(
                f"prompt and answer may have {num_tokens} tokens; the key-value cache of this server holds {most}",
                param="max_tokens",
                code="context_length_exceeded",
            )

    def _seconds_to_next_deadline(self) -> float | None:
        """None: nothing waits. At most a minute, since a deadline may lie further off than a lock can wait."""
        if not len(self._waiting):
            return None
        earliest = min(choice.request.deadline_unix_s for choice in self._waiting.everyone())
        return min(60.0, max(0.0, earliest - time.time()))

    def _wake(self) -> None:
        self._inbox.put(None)
