"""The audit log's table: what is written, in which order it is read, and that it stays as it was."""

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import DBAPIError

from shared import audit
from shared.audit import Deed
from shared.db import now_ms, read, write
from shared.errors import InvalidRequest
from shared.store.layout import Layout
from shared.sweeper import Sweeper
from shared.tables import AuditEvent


def write_down(engine: Engine, *deeds: Deed) -> None:
    """Each in a transaction and a millisecond of its own."""
    for deed in deeds:
        with write(engine) as tx:
            audit.record(tx, deed)
            began = tx.scalar(select(now_ms(tx)))
            while tx.scalar(select(now_ms(tx))) == began:
                pass


def objects(engine: Engine, **wanted: str | None) -> list[str | None]:
    with read(engine) as tx:
        return [row.object_id for row in audit.page(tx, limit=100, **({"tenant": None} | wanted)).items]  # type: ignore[arg-type]  # filters by name


def test_events_are_read_newest_first_and_by_what_they_are_about(engine: Engine) -> None:
    """All of them, one tenant's, one action's, one object's."""
    write_down(
        engine,
        Deed(actor="k1", action="jobs_create", tenant="a", object_id="1"),
        Deed(actor="k2", action="jobs_create", tenant="b", object_id="2"),
        Deed(actor="k1", action="jobs_cancel", tenant="a", object_id="1"),
        Deed(actor="unknown", action="jobs_list", object_id="3"),
    )

    assert objects(engine) == ["3", "1", "2", "1"]
    assert objects(engine, tenant="a") == ["1", "1"]
    assert objects(engine, action="jobs_create") == ["2", "1"]
    assert objects(engine, tenant="a", object_id="2") == []


def test_a_transaction_that_fails_leaves_no_event(engine: Engine) -> None:
    """What did not happen is not on record."""

    def fail() -> None:
        with write(engine) as tx:
            audit.record(tx, Deed(actor="k1", action="jobs_create"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()

    assert objects(engine) == []


def test_an_event_is_never_changed(engine: Engine) -> None:
    """The database itself refuses, whoever asks."""
    write_down(engine, Deed(actor="k1", action="jobs_create"))

    with pytest.raises(DBAPIError, match="never changed"), write(engine) as tx:
        tx.execute(text("UPDATE audit_events SET actor = 'k2'"))

    with read(engine) as tx:
        assert tx.scalars(select(AuditEvent.actor)).all() == ["k1"]


def test_old_events_are_forgotten_and_others_are_not(engine: Engine, layout: Layout) -> None:
    """By the sweeper and the database's clock, after as many days as they are kept."""
    write_down(engine, Deed(actor="k1", action="jobs_create", object_id="kept"))
    with write(engine) as tx:
        row = tx.scalars(select(AuditEvent)).one()
        old = {c.key: getattr(row, c.key) for c in AuditEvent.__table__.columns} | {
            "id": "audit-old",
            "object_id": "old",
            "created_at": row.created_at - 90 * 86_400_000 - 60_000,
        }
        tx.add(AuditEvent(**old))

    assert objects(engine) == ["kept", "old"]
    Sweeper(lease_s=60.0, sweep_s=10.0).clean_if_due(engine, layout)

    assert objects(engine) == ["kept"]


def test_a_cursor_is_an_event_that_the_reader_may_see(engine: Engine) -> None:
    """Another tenant's event is no place to go on from."""
    write_down(engine, Deed(actor="k1", action="jobs_create", tenant="a"))
    with read(engine) as tx:
        event_id = tx.scalars(select(AuditEvent.id)).one()

        assert audit.page(tx, tenant="a", limit=1, after=event_id).items == []
        with pytest.raises(InvalidRequest, match="after"):
            audit.page(tx, tenant="b", limit=1, after=event_id)


def test_the_command_line_is_known_by_its_account() -> None:
    """The user of the process, not what a variable says."""
    deed = audit.by_command("keys_create", "1", "acme")

    assert deed.actor.startswith("cli:")
    assert (deed.action, deed.object_id, deed.tenant, deed.status) == ("keys_create", "1", "acme", None)
