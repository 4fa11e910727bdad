"""What the user of a job sees that the service has stopped."""

from sqlalchemy import text

from shared import jobs
from shared.db import write
from tests.api.conftest import Api


def test_a_job_over_the_time_limit_says_why(api: Api) -> None:
    """It is cancelled, has no adapter, and its error holds the code and the numbers; the stock client reads it."""
    job_id = api.job()["id"]
    claim = api.claim()
    with write(api.engine) as tx:
        tx.execute(text("UPDATE job_attempts SET started_at = started_at - 7200000"))
        jobs.sweep(tx, may_expire=True, max_job_s=3600.0)
    asked = api.sdk().fine_tuning.jobs.retrieve(job_id)
    with write(api.engine) as tx:
        jobs.stop_cancelled(tx, claim)
    ended = api.sdk().fine_tuning.jobs.retrieve(job_id)
    events = [event.message for event in api.sdk().fine_tuning.jobs.list_events(job_id)]

    assert (asked.status, ended.status, ended.fine_tuned_model) == ("running", "cancelled", None)
    assert ended.error is not None
    assert ended.error.code == "time_limit"
    assert "7200 s" in ended.error.message
    assert "3600 s are allowed" in ended.error.message
    assert any("Cancellation was requested: the job has run for 7200 s" in message for message in events)


def test_a_job_that_its_user_cancels_has_no_error(api: Api) -> None:
    """Nothing went wrong there."""
    job_id = api.job()["id"]
    api.sdk().fine_tuning.jobs.cancel(job_id)

    assert api.http.get(f"/v1/fine_tuning/jobs/{job_id}").json()["error"] is None
