"""The life of a job: states, arcs, claim, report, finish, sweep. All SQL on jobs is in this package.

The database is the ledger. Whoever holds a job's current fence owns it; every arc is one compare-and-swap on the row.
"""

from shared.jobs.arcs import ARCS, Arc, diagram
from shared.jobs.asked import request_cancel, request_pause, resume, submit
from shared.jobs.claim import Claim, claim_next, take_back
from shared.jobs.owner import (
    NewEvent,
    add_event,
    add_events,
    fail,
    give_back,
    give_back_for_storage,
    heartbeat,
    published_version,
    record_checkpoint,
    stop_cancelled,
    stop_paused,
    succeed,
)
from shared.jobs.queries import (
    NewJob,
    checkpoints_page,
    events_page,
    get,
    list_page,
    newest_checkpoints,
    queue_position,
    recent_tokens_per_second,
    step_metrics,
)
from shared.jobs.restored import put_back_restored
from shared.jobs.sweep import Swept, mark_rung, sweep

__all__ = [
    "ARCS",
    "Arc",
    "Claim",
    "NewEvent",
    "NewJob",
    "Swept",
    "add_event",
    "add_events",
    "checkpoints_page",
    "claim_next",
    "diagram",
    "events_page",
    "fail",
    "get",
    "give_back",
    "give_back_for_storage",
    "heartbeat",
    "list_page",
    "mark_rung",
    "newest_checkpoints",
    "published_version",
    "put_back_restored",
    "queue_position",
    "recent_tokens_per_second",
    "record_checkpoint",
    "request_cancel",
    "request_pause",
    "resume",
    "step_metrics",
    "stop_cancelled",
    "stop_paused",
    "submit",
    "succeed",
    "sweep",
    "take_back",
]
