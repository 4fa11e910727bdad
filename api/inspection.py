"""What training would see, before it starts. The API has no tokenizer: it asks a trainer and waits for the answer."""

import time
from typing import Final

from api.call import Call
from api.errors import from_code
from api.schemas.estimates import JobEstimate, ReportQuery, TokenReport
from api.schemas.jobs import JobRequest
from api.submission import new_job
from shared import ids, jobs
from shared.db import Tx
from shared.errors import InvalidRequest, ModelNotFound, QueueFull
from shared.specs import Foreseen, InspectionRequest, LoraSpec, TrainSpec
from shared.store import base_models
from shared.tables import BaseModelRow, File

INSPECT_S: Final = 45.0
"""How long an answer may take; clients give up after 60 s."""


def estimate(call: Call, body: JobRequest) -> JobEstimate:
    """What the job would be; creates nothing.

    Raises InvalidRequest with `param`, also where there is nothing to learn; Unavailable, QueueFull, DeadlineExceeded.
    """
    with call.read() as tx:
        job = new_job(tx, call.tenant, body)
        base = base_models.get(tx, job.base_model_id)
        speed = jobs.recent_tokens_per_second(tx, job.base_model_id)
    found = _inspect(
        call,
        base_model_id=job.base_model_id,
        training_file_id=job.training_file_id,
        validation_file_id=job.validation_file_id,
        spec=job.spec,
    )
    return JobEstimate.of(job, found, base=base.name, tokens_per_second=speed)


def named_base(tx: Tx, name: str) -> BaseModelRow:
    """The base model that a query names; raises InvalidRequest, since 404 is for what the path names."""
    try:
        return base_models.by_name(tx, name)
    except ModelNotFound as error:
        raise InvalidRequest(f"'model': {error.message}", param="model", code=error.error_code) from None


def token_report(call: Call, file: File, base: BaseModelRow, query: ReportQuery) -> TokenReport | None:
    """The file as this base model sees it; None for a file that cannot be trained on.

    Raises as `estimate` does.
    """
    if file.report is None or file.status == "error":
        return None
    spec = _reading_spec(query, base)
    found = _inspect(call, base_model_id=base.id, training_file_id=file.id, validation_file_id=None, spec=spec)
    return TokenReport(model=base.name, max_seq_len=spec.max_seq_len, train_on=spec.train_on, data=found.training)


def _reading_spec(query: ReportQuery, base: BaseModelRow) -> TrainSpec:
    """What matters for reading is asked for; the targets are those that every model has."""
    context: int = base.config["context_length"]
    if query.max_seq_len is not None and query.max_seq_len > context:
        raise InvalidRequest(
            f"'max_seq_len' may be at most {context}, the context of {base.name!r} (given: {query.max_seq_len}).",
            param="max_seq_len",
        )
    longest = query.max_seq_len or min(TrainSpec().max_seq_len, context)
    return TrainSpec(lora=LoraSpec(target_modules="all-linear"), max_seq_len=longest, train_on=query.train_on)


def _inspect(
    call: Call, *, base_model_id: str, training_file_id: str, validation_file_id: str | None, spec: TrainSpec
) -> Foreseen:
    request = InspectionRequest(
        request_id=ids.new_id(ids.REQUEST),
        tenant=call.tenant,
        base_model_id=base_model_id,
        training_file_id=training_file_id,
        validation_file_id=validation_file_id,
        spec=spec,
        deadline_unix_s=time.time() + INSPECT_S,
    )
    with call.services.waiters.taken() as seated:
        if not seated:
            raise QueueFull
        answer = call.queue.inspect(request)
    if answer.error is not None:
        raise from_code(answer.error.code, answer.error.message, answer.error.param)
    assert answer.found is not None
    return answer.found
