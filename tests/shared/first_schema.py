"""A database as the first release wrote it: a row of every kind, in the columns that it knew. Frozen: never change it.

Values that must be young or old when a test runs are written as `Ago(seconds)`.
"""

import json
import time
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, text


@dataclass(frozen=True)
class Ago:
    """A time, in milliseconds since 1970, this many seconds before the rows are written."""

    seconds: float


REVISION: Final = "0001"
KEY: Final = "lorad_00112233445566aa_" + "ab" * 32
SPEC: Final[dict[str, Any]] = {
    "lora": {
        "r": 8, "alpha": 16.0, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "use_rslora": False,
        "rank_pattern": {}, "alpha_pattern": {},
    },
    "seed": 7, "n_epochs": 3, "batch_size": 8, "max_steps": None, "learning_rate": 0.0002, "lr_schedule": "linear",
    "lora_plus_ratio": 1.0, "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0, "max_seq_len": 1024,
    "train_on": "completion", "checkpoint_every": None, "max_seconds": None, "validation_split": None,
    "eval_every": None, "early_stopping_patience": None, "publish": "last", "init_from": None,
}  # fmt: skip

BASE: Final = "base-" + "1" * 32
FILE: Final = "file-" + "2" * 32
RESULT: Final = "file-" + "3" * 32
ADAPTER: Final = "adapter-" + "4" * 32
VERSION: Final = "adv-" + "5" * 32
QUEUED, RUNNING, PAUSED, SUCCEEDED, FAILED, CANCELLED = (f"ftjob-{digit * 32}" for digit in "6789ab")
CHECKPOINT: Final = "ftckpt-" + "c" * 32
ANSWER: Final = {"body": '{"object":"fine_tuning.job"}', "retry_count": None}
MANIFEST: Final = {"files": {"state.json": {"size_bytes": 1, "sha256": "d" * 64}}}

_JOB: Final[dict[str, Any]] = {
    "tenant": "acme", "fence": 0, "attempt": 0, "max_attempts": 3, "priority": 0, "base_model_id": BASE,
    "training_file_id": FILE, "validation_file_id": None, "adapter_name": "math", "suffix": "math", "spec": SPEC,
    "tags": {"team": "a"}, "step": 0, "total_steps": 30, "trained_tokens": None, "estimated_finish_at": None,
    "error": None, "result_file_ids": [], "lease_owner": None, "lease_expires_at": None, "heartbeat_at": None,
    "not_before": 0, "runs_alone": False, "cancel_requested_at": None, "pause_requested_at": None, "rung_at": None,
    "started_at": None, "finished_at": None,
}  # fmt: skip
_ENDED: Final[dict[str, Any]] = {"fence": 1, "attempt": 1, "started_at": Ago(500), "finished_at": Ago(300)}

ROWS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("api_keys", {"id": "00112233445566aa", "tenant": "acme", "label": "laptop", "scopes": ["jobs:read", "generate"],
                  "secret_sha256": "271a413bd339c5709fdceaec41f14f11e9fbfb5042d72d331c65f32b284cd09a",
                  "created_at": Ago(9000), "expires_at": None, "revoked_at": None}),
    ("base_models", {"id": BASE, "name": "small", "digest": "e" * 64, "config": {"architecture": "opt"},
                     "created_at": Ago(9000), "deleted_at": None}),
    ("files", {"id": FILE, "tenant": "acme", "purpose": "fine-tune", "filename": "d.jsonl", "size_bytes": 3,
               "sha256": "f" * 64, "status": "processed", "status_details": None, "report": {"lines": 1},
               "created_at": Ago(8000), "deleted_at": None}),
    ("files", {"id": RESULT, "tenant": "acme", "purpose": "fine-tune-results", "filename": "step_metrics.csv",
               "size_bytes": 5, "sha256": "0" * 64, "status": "processed", "status_details": None, "report": None,
               "created_at": Ago(300), "deleted_at": None}),
    ("jobs", {**_JOB, "id": QUEUED, "state": "queued", "created_at": Ago(900), "rung_at": Ago(800)}),
    ("jobs", {**_JOB, "id": RUNNING, "state": "running", "fence": 2, "attempt": 2, "lease_owner": "host-1-aa",
              "lease_expires_at": Ago(100), "heartbeat_at": Ago(160), "step": 12, "created_at": Ago(1000),
              "started_at": Ago(990), "estimated_finish_at": Ago(-60), "runs_alone": True}),
    ("jobs", {**_JOB, "id": PAUSED, "state": "paused", "fence": 1, "created_at": Ago(1100), "started_at": Ago(1000),
              "pause_requested_at": Ago(950)}),
    ("jobs", {**_JOB, **_ENDED, "id": SUCCEEDED, "state": "succeeded", "created_at": Ago(1200), "step": 30,
              "trained_tokens": 4096, "result_file_ids": [RESULT]}),
    ("jobs", {**_JOB, **_ENDED, "id": FAILED, "state": "failed", "created_at": Ago(1300),
              "error": {"code": "diverged", "message": "the loss is not finite", "param": None}}),
    ("jobs", {**_JOB, **_ENDED, "id": CANCELLED, "state": "cancelled", "created_at": Ago(1400),
              "cancel_requested_at": Ago(310)}),
    ("job_attempts", {"job_id": RUNNING, "fence": 1, "trainer": "host-1-99", "started_at": Ago(990),
                      "ended_at": Ago(600), "outcome": "lost"}),
    ("job_attempts", {"job_id": RUNNING, "fence": 2, "trainer": "host-1-aa", "started_at": Ago(500),
                      "ended_at": None, "outcome": None}),
    ("job_events", {"id": "ftevent-" + "1" * 32, "job_id": SUCCEEDED, "seq": 1, "created_at": Ago(500),
                    "level": "info", "type": "message", "message": "Training started.", "data": None}),
    ("job_events", {"id": "ftevent-" + "2" * 32, "job_id": SUCCEEDED, "seq": 2, "created_at": Ago(400),
                    "level": "info", "type": "metrics", "message": "Step 1/30",
                    "data": {"step": 1, "train_loss": 2.5, "tokens_per_second": 100.0}}),
    ("checkpoints", {"id": CHECKPOINT, "job_id": RUNNING, "step": 10, "fence": 2, "manifest": MANIFEST,
                     "metrics": {"step": 10}, "created_at": Ago(170), "deleted_at": None}),
    ("adapters", {"id": ADAPTER, "tenant": "acme", "name": "math", "description": "sums", "tags": {"stage": "prod"},
                  "last_version": 3, "created_at": Ago(400), "updated_at": Ago(300), "deleted_at": None}),
    ("adapter_versions", {"id": VERSION, "adapter_id": ADAPTER, "version": 3, "state": "ready", "job_id": SUCCEEDED,
                          "base_model_id": BASE, "manifest": MANIFEST, "size_bytes": 1, "sha256": "d" * 64,
                          "created_at": Ago(300), "deleted_at": None}),
    ("adapter_aliases", {"adapter_id": ADAPTER, "alias": "prod", "version_id": VERSION}),
    ("idempotency_keys", {"tenant": "acme", "key": "k", "request_sha256": "x", "status": 200, "response": ANSWER,
                          "created_at": Ago(60)}),
)  # fmt: skip

NEW_JOB: Final[dict[str, Any]] = {**_JOB, "id": "ftjob-" + "e" * 32, "state": "queued", "created_at": Ago(5)}

# What the first release wrote while a job ran: its claim, a heartbeat, its checkpoint's event, its end.
UPDATES: Final = (
    "UPDATE jobs SET state = 'running', fence = fence + 1, attempt = attempt + 1, lease_owner = 'old', "
    "lease_expires_at = :now + 60000, heartbeat_at = :now, started_at = :now WHERE id = :id AND state = 'queued'",
    "INSERT INTO job_attempts (job_id, fence, trainer, started_at) VALUES (:id, 1, 'old', :now)",
    "UPDATE jobs SET heartbeat_at = :now, lease_expires_at = :now + 60000, step = 3, total_steps = 30, "
    "estimated_finish_at = :now + 1000 WHERE id = :id AND state = 'running' AND fence = 1",
    "INSERT INTO job_events (id, job_id, seq, created_at, level, type, message) "
    "VALUES ('ftevent-eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee', :id, 1, :now, 'info', 'message', 'Checkpoint saved.')",
    "UPDATE jobs SET state = 'queued', attempt = attempt - 1, lease_owner = NULL, lease_expires_at = NULL, "
    "estimated_finish_at = NULL, rung_at = NULL WHERE id = :id AND state = 'running' AND fence = 1",
    "UPDATE job_attempts SET ended_at = :now, outcome = 'given back' WHERE job_id = :id AND fence = 1",
)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def insert(connection: Connection, table: str, row: dict[str, Any], now: int) -> None:
    """Write one row as plain SQL that names the columns of the first schema and no others."""
    names, values = ", ".join(row), ", ".join(f":{name}" for name in row)
    connection.execute(
        text(f"INSERT INTO {table} ({names}) VALUES ({values})"), {k: _written(v, now) for k, v in row.items()}
    )


def stored(connection: Connection, table: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Those rows of a table that agree with `row` in what the first schema calls its key, in the columns of `row`."""
    keys = {
        "job_attempts": ("job_id", "fence"), "adapter_aliases": ("adapter_id", "alias"),
        "idempotency_keys": ("tenant", "key"),
    }.get(table, ("id",))  # fmt: skip
    condition = " AND ".join(f"{key} = :{key}" for key in keys)
    found = connection.execute(
        text(f"SELECT {', '.join(row)} FROM {table} WHERE {condition}"), {key: row[key] for key in keys}
    )
    return [{name: _read(value, row[name]) for name, value in one.items()} for one in found.mappings()]


def expected(row: dict[str, Any], now: int) -> dict[str, Any]:
    """The row with its times as they were written."""
    return {name: now - int(value.seconds * 1000) if isinstance(value, Ago) else value for name, value in row.items()}


def _written(value: Any, now: int) -> Any:
    if isinstance(value, Ago):
        return now - int(value.seconds * 1000)
    return json.dumps(value) if isinstance(value, dict | list) else value


def _read(value: Any, like: Any) -> Any:
    """SQLite gives JSON as text and booleans as numbers."""
    if isinstance(value, str) and isinstance(like, dict | list):
        return json.loads(value)
    return bool(value) if isinstance(like, bool) else value
