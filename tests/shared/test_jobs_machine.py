"""The whole ledger against its model, in orders of events that nobody would write down.

`make test` runs the same few hundred steps each time, and shows a failing run as it was found.
`--hypothesis-profile=campaign` runs many more, new ones each time, and makes a failing run small.
"""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy import ColumnElement

from shared import jobs
from shared.db import Tx
from shared.jobs import Claim, arcs
from shared.tables import Job
from tests.shared.ledger_calls import Ledger, open_ledger
from tests.shared.ledger_machine import LedgerMachine

IS_CAMPAIGN: Final = settings.get_current_profile_name() == "campaign"
BOUNDS: Final = settings(
    max_examples=settings.default.max_examples if IS_CAMPAIGN else 32,
    derandomize=not IS_CAMPAIGN,
    phases=settings.default.phases if IS_CAMPAIGN else [Phase.generate],
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


@pytest.fixture
def ledger(database_url: str, tmp_path: Path) -> Iterator[Ledger]:
    """An empty ledger whose clock the machine moves, on each database."""
    with open_ledger(database_url, tmp_path / "data") as ledger:
        yield ledger


@pytest.fixture
def sqlite_ledger(fresh_sqlite_url: str, tmp_path: Path) -> Iterator[Ledger]:
    """The same on SQLite only, where it is quickest."""
    with open_ledger(fresh_sqlite_url, tmp_path / "data") as ledger:
        yield ledger


@pytest.mark.timeout(1500 if IS_CAMPAIGN else 240)
def test_ledger_answers_as_its_model(ledger: Ledger) -> None:
    """Every call answers and every row is as promised, nothing gets stuck, and every arc of a job's life was seen."""
    followed: set[str] = set()

    run_state_machine_as_test(lambda: LedgerMachine(ledger, followed), settings=BOUNDS)

    assert followed == set(jobs.ARCS)


def _owned_whatever_fence(claim: Claim) -> tuple[ColumnElement[bool], ...]:
    return Job.id == claim.job_id, Job.state == "running"


def _follow_publish_unguarded(tx: Tx, name: str, job_id: str, **options: Any) -> Job | None:
    return arcs.follow(tx, name, job_id, **(options | {"guards": ()} if name == "publish" else options))


def _follow_claim_uncharged(tx: Tx, name: str, job_id: str, **options: Any) -> Job | None:
    if name == "claim":
        options["values"] = {key: value for key, value in options["values"].items() if key != "attempt"}
    return arcs.follow(tx, name, job_id, **options)


FAULTS: Final[dict[str, tuple[str, str, Callable[..., Any]]]] = {
    "a trainer's writes need no fence": ("owner", "_owned", _owned_whatever_fence),
    "a version is published although a cancel was accepted": ("owner", "follow", _follow_publish_unguarded),
    "a claim costs no attempt": ("claim", "follow", _follow_claim_uncharged),
    "a lost job waits for nothing": ("sweep", "backoff_s", lambda attempt, lease_s: 0.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_ledger_is_found(sqlite_ledger: Ledger, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine can fail: it finds each of these."""
    module, name, faulty = FAULTS[fault]
    monkeypatch.setattr(importlib.import_module(f"shared.jobs.{module}"), name, faulty)

    with pytest.raises(AssertionError):
        run_state_machine_as_test(lambda: LedgerMachine(sqlite_ledger, set()), settings=BOUNDS)
