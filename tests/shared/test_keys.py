"""API keys: what is stored, and which are accepted."""

import hashlib

import pytest
from sqlalchemy import Engine, text

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
