"""What must hold of the ledger's rows after every step, whatever happened."""

from typing import Any

from tests.shared.ledger_calls import Ledger, Snapshot, comparable, sha256
from tests.shared.ledger_model import LedgerModel
from tests.shared.ledger_rows import ENDED, MAX_ATTEMPTS, ModelAttempt


class Facts:
    """The facts that need no model. It remembers rows of ended jobs and fences, to see that they stay and grow."""

    def __init__(self) -> None:
        self._ended: dict[str, dict[str, Any]] = {}
        self._fences: dict[str, int] = {}

    def check(self, seen: Snapshot, ledger: Ledger) -> None:
        """AssertionError if a row breaks one."""
        published = [row["job_id"] for row in seen.versions.values()]
        for job_id, row in seen.jobs.items():
            is_running = row["state"] == "running"
            assert is_running == (row["lease_owner"] is not None) == (row["lease_expires_at"] is not None)
            assert 0 <= row["attempt"] <= row["max_attempts"] == MAX_ATTEMPTS
            assert row["attempt"] < MAX_ATTEMPTS or row["state"] not in ("queued", "paused"), "nobody may claim it"
            assert row["fence"] >= self._fences.get(job_id, 0)
            assert published.count(job_id) == (row["state"] == "succeeded")
            assert self._ended.get(job_id, row) == row
            _check_attempts(row, seen.attempts.get(job_id, []))
            numbers = [number for number, _ in seen.events[job_id]]
            assert numbers == list(range(1, len(numbers) + 1))
            self._fences[job_id] = row["fence"]
            if row["state"] in ENDED:
                self._ended[job_id] = row
        for version_id, row in seen.versions.items():
            assert row["state"] in ("ready", "deleted")
            if row["state"] == "ready":
                assert sha256(ledger.weights(version_id).read_bytes()) == row["sha256"]


def _check_attempts(job: dict[str, Any], attempts: list[dict[str, Any]]) -> None:
    """One attempt for each fence, and only that of the running claim is open."""
    assert [attempt["fence"] for attempt in attempts] == list(range(1, job["fence"] + 1))
    still_open = [attempt["fence"] for attempt in attempts if attempt["ended_at"] is None]
    assert still_open == ([job["fence"]] if job["state"] == "running" else [])


def check_agreement(model: LedgerModel, seen: Snapshot) -> None:
    """AssertionError if the rows are not what the model says."""
    rows = {job_id: comparable(row) for job_id, row in seen.jobs.items()}
    assert rows == {job_id: job.row() for job_id, job in model.jobs.items()}
    for job_id, job in model.jobs.items():
        attempts = [ModelAttempt(row["started_at"], row["ended_at"], row["outcome"])
                    for row in seen.attempts.get(job_id, [])]  # fmt: skip
        assert attempts == job.attempts
        assert [text for _, text in seen.events[job_id] if text.startswith("note")] == job.notes
        assert seen.checkpoints.get(job_id, []) == job.checkpoints
    versions = {key: (row["job_id"], row["version"], row["sha256"], row["deleted_at"])
                for key, row in seen.versions.items()}  # fmt: skip
    assert versions == {v.id: (v.job_id, v.number, v.sha256, v.deleted_at) for v in model.versions.values()}
    live = {(v.tenant, v.name) for v in model.versions.values() if v.deleted_at is None}
    assert {name for name, lives in seen.adapters.items() if lives} == live
