"""/v1/fine_tuning/jobs: ask for a training, watch it, steer it."""

from flask import Request, Response

from api import follow, sse
from api.call import Call
from api.endpoint import endpoint
from api.idempotency import Attempt
from api.inspection import estimate
from api.schemas.estimates import JobEstimate
from api.schemas.job_views import CheckpointObject, FineTuningJob, JobEventObject
from api.schemas.jobs import CheckpointQuery, EventQuery, JobListQuery, JobRequest, WaitQuery
from api.schemas.wire import Listed
from api.submission import new_job
from shared import failpoints, jobs
from shared.db import Tx
from shared.store import base_models
from shared.tables import Job, JobState


@endpoint("POST /v1/fine_tuning/jobs", scope="jobs:write")
def create(call: Call, body: JobRequest, attempt: Attempt) -> FineTuningJob | JobEstimate | Response:
    """Queue a training job. It is kept before anyone is told of it, so it survives whatever is down.
    With `dry_run` nothing is queued: a trainer reads the data, and the answer says what the job would be."""
    if body.dry_run:
        return estimate(call, body)

    def submit(tx: Tx) -> FineTuningJob:
        job = jobs.submit(tx, new_job(tx, call.tenant, body), max_queued=call.services.max_queued_jobs)
        answer = _view(tx, job, with_position=True)
        failpoints.hit("submit.before_commit")
        return answer

    answer = attempt.once(call, body.model_dump(mode="json", exclude_unset=True), submit)
    failpoints.hit("submit.after_commit")
    call.queue.ring_trainers()
    return answer


@endpoint("GET /v1/fine_tuning/jobs", scope="jobs:read")
def list_(call: Call, query: JobListQuery) -> Listed[FineTuningJob]:
    """Jobs, newest first."""
    with call.read() as tx:
        page = jobs.list_page(tx, call.tenant, limit=query.limit, after=query.after, metadata=query.metadata)
        return Listed[FineTuningJob].of([_view(tx, job) for job in page.items], has_more=page.has_more)


@endpoint("GET /v1/fine_tuning/jobs/<job_id>", scope="jobs:read")
def retrieve(call: Call, job_id: str, query: WaitQuery) -> FineTuningJob:
    """One job, at once or when its status changes."""
    follow.wait_for_change(call, job_id, query.wait)
    with call.read() as tx:
        return _view(tx, jobs.get(tx, call.tenant, job_id), with_position=True)


@endpoint("POST /v1/fine_tuning/jobs/<job_id>/cancel", scope="jobs:write")
def cancel(call: Call, job_id: str) -> FineTuningJob:
    """Stop a job for good; a running one stops within a heartbeat. Twice is once; a conflict if it has ended."""
    with call.write() as tx:
        return _view(tx, jobs.request_cancel(tx, call.tenant, job_id), with_position=True)


@endpoint("POST /v1/fine_tuning/jobs/<job_id>/pause", scope="jobs:write")
def pause(call: Call, job_id: str) -> FineTuningJob:
    """Stop a job for now; a running one writes a checkpoint first."""
    with call.write() as tx:
        return _view(tx, jobs.request_pause(tx, call.tenant, job_id), with_position=True)


@endpoint("POST /v1/fine_tuning/jobs/<job_id>/resume", scope="jobs:write")
def resume(call: Call, job_id: str) -> FineTuningJob:
    """Queue a paused job again; it goes on from its checkpoint."""
    with call.write() as tx:
        answer = _view(tx, jobs.resume(tx, call.tenant, job_id), with_position=True)
    call.queue.ring_trainers()
    return answer


@endpoint(
    "GET /v1/fine_tuning/jobs/<job_id>/events",
    scope="jobs:read",
    media={sse.CONTENT_TYPE: "events, oldest first, as they happen; Last-Event-ID goes on where a stream broke"},
)
def events(call: Call, job_id: str, query: EventQuery, request: Request) -> Listed[JobEventObject] | Response:
    """What happened to a job, newest first; or, as a stream, from its beginning to its end."""
    if query.stream or request.accept_mimetypes.best == sse.CONTENT_TYPE:
        return follow.event_stream(call, job_id, request.headers.get("Last-Event-ID") or query.after)
    with call.read() as tx:
        page = jobs.events_page(tx, call.tenant, job_id, limit=query.limit, after=query.after)
    return Listed[JobEventObject].of([JobEventObject.of(row) for row in page.items], has_more=page.has_more)


@endpoint("GET /v1/fine_tuning/jobs/<job_id>/checkpoints", scope="jobs:read")
def checkpoints(call: Call, job_id: str, query: CheckpointQuery) -> Listed[CheckpointObject]:
    """Checkpoints that are still kept, newest first."""
    with call.read() as tx:
        name = jobs.get(tx, call.tenant, job_id).adapter_name
        page = jobs.checkpoints_page(tx, call.tenant, job_id, limit=query.limit, after=query.after)
    return Listed[CheckpointObject].of([CheckpointObject.of(row, name) for row in page.items], has_more=page.has_more)


def _view(tx: Tx, job: Job, *, with_position: bool = False) -> FineTuningJob:
    version = jobs.published_version(tx, job.id) if job.state == JobState.SUCCEEDED else None
    return FineTuningJob.of(
        job,
        base=base_models.get(tx, job.base_model_id).name,
        fine_tuned_model=f"{job.adapter_name}@{version.version}" if version else None,
        queue_position=jobs.queue_position(tx, job) if with_position else None,
    )
