"""API keys: what is stored, and which are accepted."""

import hashlib

import pytest
from sqlalchemy import Engine, event, text

from shared import keys
from shared.db import read, write
from shared.errors import InvalidRequest, NotFound, Unauthenticated
from shared.tables import ApiKey


def test_a_new_key_is_accepted(engine: Engine) -> None:
    """The key that was shown brings back its tenant and scopes."""
    with write(engine) as tx:
        row, key = keys.create(tx, tenant="acme", scopes=["jobs:read", "jobs:read"], label="ci")

    with read(engine) as tx:
        found = keys.authenticate(tx, key)
    assert (found.id, found.tenant, found.scopes, found.label) == (row.id, "acme", ["jobs:read"], "ci")


def test_default_scopes_lack_admin(engine: Engine) -> None:
    """A key can do everything but administrate unless told otherwise."""
    with write(engine) as tx:
        row, _ = keys.create(tx)

    assert set(row.scopes) == set(keys.SCOPES) - {"admin"}
    assert row.tenant == "default"


def test_the_secret_is_not_stored(engine: Engine) -> None:
    """The row holds a SHA-256, and no column holds the secret."""
    with write(engine) as tx:
        row, key = keys.create(tx)
        secret = key.rsplit("_", 1)[1]
        stored = tx.execute(text("SELECT * FROM api_keys")).one()

    assert row.secret_sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert not any(secret in str(value) for value in stored)


def test_wrong_keys_are_refused_alike(engine: Engine) -> None:
    """Malformed, unknown, wrong, expired and revoked keys get one and the same answer."""
    with write(engine) as tx:
        _, good = keys.create(tx)
        revoked_row, revoked = keys.create(tx)
        keys.revoke(tx, revoked_row.id)
        expired_row, expired = keys.create(tx, expires_s=60)
        tx.get_one(ApiKey, expired_row.id).expires_at = expired_row.created_at
    prefix, key_id, secret = good.split("_")
    wrong = ["", "x", good + "\n", good.upper(), f"{prefix}_{key_id}_{'0' * 64}", f"{prefix}_{'0' * 16}_{secret}",
             revoked, expired]  # fmt: skip

    messages = set()
    with read(engine) as tx:
        assert keys.authenticate(tx, good)
        for key in wrong:
            with pytest.raises(Unauthenticated) as caught:
                keys.authenticate(tx, key)
            messages.add(caught.value.message)
    assert len(messages) == 1


def test_a_key_lives_until_it_expires(engine: Engine) -> None:
    """A key with time left is accepted."""
    with write(engine) as tx:
        row, key = keys.create(tx, expires_s=60)

    assert row.expires_at == row.created_at + 60_000
    with read(engine) as tx:
        assert keys.authenticate(tx, key).id == row.id


def test_revoking_counts_at_once_and_once(engine: Engine) -> None:
    """The next look refuses the key; revoking again keeps the first time."""
    with write(engine) as tx:
        row, key = keys.create(tx)
        first = keys.revoke(tx, row.id).revoked_at
        assert keys.revoke(tx, row.id).revoked_at == first
        with pytest.raises(NotFound):
            keys.revoke(tx, "nobody")

    with read(engine) as tx, pytest.raises(Unauthenticated):
        keys.authenticate(tx, key)


def test_a_revoked_key_still_closes_the_door(engine: Engine) -> None:
    """Once a key was made the service never falls back to needing none."""
    with write(engine) as tx:
        before = keys.any_exist(tx)
        row, _ = keys.create(tx)
        keys.revoke(tx, row.id)

    with read(engine) as tx:
        assert (before, keys.any_exist(tx)) == (False, True)
        assert [key.id for key in keys.list_all(tx)] == [row.id]


@pytest.mark.parametrize(
    "options", [{"scopes": ["root"]}, {"tenant": "../x"}, {"tenant": ""}, {"expires_s": 0}, {"expires_s": -1}]
)
def test_bad_keys_are_not_made(engine: Engine, options: dict[str, object]) -> None:
    """A wrong scope, tenant or expiry makes no key."""
    with write(engine) as tx, pytest.raises(InvalidRequest):
        keys.create(tx, **options)  # type: ignore[arg-type]  # one of several

    with read(engine) as tx:
        assert not keys.any_exist(tx)


def test_no_wrong_key_is_refused_sooner_than_another(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown id costs the statements and the comparison of whole digests that a wrong secret costs."""
    compared: list[tuple[int, int]] = []
    sent: list[str] = []
    compare = keys.hmac.compare_digest

    def note(one: str, other: str) -> bool:
        compared.append((len(one), len(other)))
        return compare(one, other)

    monkeypatch.setattr(keys.hmac, "compare_digest", note)
    event.listen(engine, "before_cursor_execute", lambda _c, _cursor, statement, *_: sent.append(statement))
    with write(engine) as tx:
        _, good = keys.create(tx)
    prefix, key_id, secret = good.split("_")
    wrong = (f"{prefix}_{key_id}_{'0' * 64}", f"{prefix}_{'0' * 16}_{secret}", "nonsense")
    sent.clear()

    work = []
    for key in wrong:
        with read(engine) as tx, pytest.raises(Unauthenticated):
            keys.authenticate(tx, key)
        work.append((list(sent), list(compared)))
        sent.clear()
        compared.clear()

    assert work[0] == work[1] == work[2]
    assert work[0][1] == [(64, 64)]


def test_rotation_leaves_two_live_keys_for_a_while(engine: Engine) -> None:
    """The new key has all that the old one had; the old one ends after the grace, or sooner if it would have anyway."""
    with write(engine) as tx:
        old, old_key = keys.create(tx, tenant="acme", scopes=["generate"], label="ci")
        brief, _ = keys.create(tx, expires_s=60)
        new, new_key = keys.rotate(tx, old.id, grace_s=3600)
        keys.rotate(tx, brief.id, grace_s=3600)

    with read(engine) as tx:
        assert (new.tenant, new.scopes, new.label, new.expires_at) == ("acme", ["generate"], "ci", None)
        assert [keys.authenticate(tx, key).id for key in (old_key, new_key)] == [old.id, new.id]
        assert tx.get_one(ApiKey, old.id).expires_at == new.created_at + 3_600_000
        assert tx.get_one(ApiKey, brief.id).expires_at == brief.created_at + 60_000


def test_a_dead_key_is_not_rotated(engine: Engine) -> None:
    """Neither a revoked nor an expired nor an absent one comes back to life under another number."""
    with write(engine) as tx:
        revoked, _ = keys.create(tx)
        keys.revoke(tx, revoked.id)
        expired, _ = keys.create(tx, expires_s=60)
        tx.get_one(ApiKey, expired.id).expires_at = expired.created_at
        tx.flush()
        for key_id in (revoked.id, expired.id):
            with pytest.raises(InvalidRequest, match=key_id):
                keys.rotate(tx, key_id, grace_s=60)
        with pytest.raises(NotFound):
            keys.rotate(tx, "nobody", grace_s=60)

    with read(engine) as tx:
        assert len(keys.list_all(tx)) == 2
