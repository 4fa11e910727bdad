"""Inspections: what training would see of a data set, told by a trainer, since the API has no tokenizer.

Needs a base model's tokenizer and configuration, never its weights, so that it answers while training runs.
"""

import copy
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from sqlalchemy import Engine

from shared import db
from shared.answers import AnswerWriter
from shared.config import Settings
from shared.errors import InvalidRequest, LoradError, QueueFull, Unavailable
from shared.queue import Queue, received_inspection
from shared.specs import ChunkError, Foreseen, Inspection, InspectionRequest, TrainSpec
from shared.store import base_models, files
from shared.store.layout import Layout
from shared.tables import BaseModelRow, File
from worker.base_model import choose_device, choose_dtype, context_length, hollow_model, load_tokenizer, read_config
from worker.training import memory
from worker.training.dataset import TokenisedDataset, Tokeniser
from worker.training.forecast import forecast
from worker.training.preparation import train_and_valid

log = logging.getLogger("lorad.inspector")

AT_ONCE: Final = 1
"""Inspections that run at the same time: they take their processor time from the training beside them."""
PATIENCE_S: Final = 5.0
"""How long an inspection waits for its turn; longer, and it is refused, so that it does not hold a thread."""
LISTENS_S: Final = 1.0
"""How often a running inspection looks whether anybody still listens."""
KEPT_BYTES: Final = 128 << 20
"""Tokenised files that are kept for the next question about them."""


@dataclass(frozen=True)
class _Base:
    """A base model without its weights. `hollow` has its modules and shapes."""

    tokenizer: Any
    eos_token_ids: frozenset[int]
    context_length: int
    hollow: torch.nn.Module
    sizes: memory.ModelSizes


class Inspector:
    """Answers inspections. Any thread may call it."""

    def __init__(self, settings: Settings, database: Engine, layout: Layout) -> None:
        self._settings = settings
        self._database = database
        self._layout = layout
        self._queue = Queue(settings.resolved_broker_url)
        self._stopping = threading.Event()
        self._turn = threading.Semaphore(AT_ONCE)
        self._lock = threading.Lock()
        self._bases: dict[str, _Base] = {}
        self._read: OrderedDict[tuple[str | int, ...], TokenisedDataset] = OrderedDict()

    def stop(self) -> None:
        """End what runs, and whatever comes yet, with an answer that says to ask again."""
        self._stopping.set()

    def answer(self, payload: object) -> None:
        """Inspect for one message and write the answer where the API reads it; never raises for a bad request."""
        try:
            request = received_inspection(payload)
        except InvalidRequest as error:
            log.warning("discarded a message: %s", error.message)
            return
        writer = self._queue.inspection_writer(request.request_id)
        try:
            self._answer(request, writer)
        except _NobodyListens:
            log.info("inspection %s ended early: nobody listens", request.request_id)
        except Unavailable as error:
            log.warning("inspection %s was not answered: %s", request.request_id, error.message)

    def _answer(self, request: InspectionRequest, writer: AnswerWriter[Inspection]) -> None:
        listens = _Listener(request.deadline_unix_s, writer, self._stopping)
        try:
            listens.check()
            if not self._turn.acquire(timeout=PATIENCE_S):
                raise QueueFull("this trainer is busy with other data sets; try again later")
            try:
                listens.check()
                writer.write(Inspection())
                found = self.foresee(request, between_samples=listens.check_now_and_then)
            finally:
                self._turn.release()
            writer.write(Inspection(found=found))
        except (_NobodyListens, Unavailable):
            raise
        except LoradError as error:
            failure = ChunkError(code=error.error_code, message=error.message, param=error.param)
            writer.write(Inspection(error=failure))
        except Exception:
            log.exception("inspection %s failed", request.request_id)
            failure = ChunkError(code="internal_error", message="The trainer failed on this request.")
            writer.write(Inspection(error=failure))

    def foresee(self, request: InspectionRequest, *, between_samples: Callable[[], None] = lambda: None) -> Foreseen:
        """What training would see and need; `between_samples` may raise to end the reading.

        Raises InvalidTrainingFile, UnknownTarget, NotFound.
        """
        with db.read(self._database) as tx:
            row = base_models.get(tx, request.base_model_id)
            train_file = files.get(tx, request.tenant, request.training_file_id)
            valid_id = request.validation_file_id
            valid_file = None if valid_id is None else files.get(tx, request.tenant, valid_id)
        base, spec = self._base(row), request.spec
        adapter = memory.AdapterSizes.of(base.hollow, spec.lora)
        train, valid = train_and_valid(
            lambda: self._tokens(row, base, train_file, spec, between_samples),
            None if valid_file is None else lambda: self._tokens(row, base, valid_file, spec, between_samples),
            spec,
        )
        ahead = forecast(train, spec)
        settings = self._settings
        return Foreseen(
            training=_json(train),
            validation=None if valid is None else _json(valid),
            steps_per_epoch=ahead.steps_per_epoch,
            total_steps=ahead.total_steps,
            num_tokens_per_epoch=train.report.num_tokens,
            num_label_tokens_per_epoch=train.report.num_label_tokens,
            num_tokens=ahead.num_tokens,
            num_label_tokens=ahead.num_label_tokens,
            trainable_parameters=adapter.num_parameters,
            memory_bytes=memory.training_bytes(
                base.sizes,
                adapter,
                dtype=choose_dtype(choose_device(settings.device), settings.dtype),
                longest=train.report.longest,
                batch_size=min(spec.batch_size, len(train)),
                max_tokens=settings.train_tokens,
            ),
        )

    def _base(self, row: BaseModelRow) -> _Base:
        with self._lock:
            if row.id not in self._bases:
                directory = self._layout.model(row.id)
                config = read_config(directory)
                tokenizer, eos_token_ids = load_tokenizer(directory, config)
                hollow = hollow_model(config)
                sizes = memory.ModelSizes.of(hollow)
                self._bases[row.id] = _Base(tokenizer, eos_token_ids, context_length(config), hollow, sizes)
            return self._bases[row.id]

    def _tokens(
        self, row: BaseModelRow, base: _Base, file: File, spec: TrainSpec, between_samples: Callable[[], None]
    ) -> TokenisedDataset:
        """The file as tokens, from the last time if nothing that matters has changed since."""
        key = (file.sha256, row.digest, spec.max_seq_len, spec.train_on)
        with self._lock:
            if key in self._read:
                self._read.move_to_end(key)
                return self._read[key]
        # A tokenizer must not be used by two threads.
        tokenizer = copy.deepcopy(base.tokenizer)
        tokeniser = Tokeniser(tokenizer, base.eos_token_ids, spec, longest=base.context_length)
        data = tokeniser.read(self._path(file), between_samples=between_samples)
        with self._lock:
            self._read[key] = data
            while self._read and sum(map(_size_bytes, self._read.values())) > KEPT_BYTES:
                self._read.popitem(last=False)
        return data

    def _path(self, file: File) -> Path:
        return self._layout.files(file.id)


class _NobodyListens(Exception):
    """The deadline is over, or whoever asked has gone."""


class _ShuttingDown(LoradError):
    """The trainer that read the data set is shutting down; try again."""

    code = Unavailable.code


class _Listener:
    """Whether anybody still waits for the answer, and whether it may still come."""

    def __init__(self, deadline_unix_s: float, writer: AnswerWriter[Inspection], stopping: threading.Event) -> None:
        self._stopping = stopping
        self._deadline_unix_s = deadline_unix_s
        self._writer = writer
        self._looked_at = 0.0

    def check(self) -> None:
        """Raises _NobodyListens, _ShuttingDown."""
        if self._stopping.is_set():
            raise _ShuttingDown
        self._looked_at = time.time()
        if self._looked_at > self._deadline_unix_s or self._writer.is_cancelled():
            raise _NobodyListens

    def check_now_and_then(self) -> None:
        """`check`, if the last one was LISTENS_S ago."""
        if self._stopping.is_set() or time.time() - self._looked_at >= LISTENS_S:
            self.check()


def _size_bytes(data: TokenisedDataset) -> int:
    return data.tokens.nbytes + data.is_label.nbytes + 8 * len(data)


def _json(data: TokenisedDataset) -> dict[str, Any]:
    """The data report as it looks after a way through JSON: lists for tuples, texts for keys."""
    report: dict[str, Any] = json.loads(json.dumps(data.report.to_json()))
    return report
