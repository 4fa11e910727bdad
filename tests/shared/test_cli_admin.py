"""Administration commands, over a real data directory."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from shared import db, ids, keys
from shared.cli import lorad as lorad_command
from shared.config import Settings
from shared.errors import LoradError, Unauthenticated
from shared.tables import BaseModelRow
from tests.servers import Broker

Lorad = Callable[..., Result]


@pytest.fixture
def lorad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lorad:
    """Runs `lorad ARGUMENTS` on a data directory of its own."""
    for name in [name for name in os.environ if name.startswith("LORAD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LORAD_DATA_DIR", str(tmp_path / "data"))

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(lorad_command, arguments, prog_name="lorad")

    return run


def authenticate(key: str) -> keys.ApiKey:
    """What the API would make of this key."""
    engine = db.open_engine(Settings.from_env().database_url)
    try:
        with db.read(engine) as tx:
            return keys.authenticate(tx, key)
    finally:
        engine.dispose()


def test_a_created_key_opens_the_api(lorad: Lorad):
    """Standard output is the key and nothing else, so that a script can keep it; it may do all but administrate."""
    result = lorad("keys", "create", "--tenant", "acme", "--label", "laptop", "--expires", "30d")

    row = authenticate(result.stdout.removesuffix("\n"))
    assert (row.tenant, row.label, set(row.scopes)) == ("acme", "laptop", set(keys.DEFAULT_SCOPES))
    assert row.expires_at is not None
    assert row.expires_at - row.created_at == 30 * 86400 * 1000


def test_a_key_has_only_the_scopes_asked_for(lorad: Lorad):
    """--scope may be repeated and replaces the default."""
    created = json.loads(lorad("keys", "create", "--scope", "generate", "--scope", "jobs:read", "--json").stdout)

    assert sorted(authenticate(created["key"]).scopes) == ["generate", "jobs:read"]


def test_a_revoked_key_opens_nothing(lorad: Lorad):
    """Revoking names the key by the id that `keys list` shows."""
    key = lorad("keys", "create").stdout.strip()
    listed = json.loads(lorad("keys", "list", "--json").stdout)

    assert lorad("keys", "revoke", listed["id"]).exit_code == 0

    with pytest.raises(Unauthenticated):
        authenticate(key)


def test_listing_shows_no_secret(lorad: Lorad):
    """Neither the key nor its hash can be read back."""
    created = json.loads(lorad("keys", "create", "--json").stdout)
    secret = created["key"].rsplit("_", 1)[1]

    shown = lorad("keys", "list").stdout + lorad("keys", "list", "--json").stdout

    assert created["id"] in shown
    assert secret not in shown
    assert "sha256" not in shown


@pytest.mark.parametrize("expires", ["0d", "-1d", "30", "d", "1.5h", "9999999d", "30 d", "3０d"])
def test_an_expiry_is_a_number_and_a_unit(lorad: Lorad, expires: str):
    """Anything else is wrong usage, and no key is made."""
    result = lorad("keys", "create", "--expires", expires)

    assert result.exit_code == 2
    assert lorad("keys", "list", "--json").stdout == ""


def test_revoking_an_unknown_key_is_an_error(lorad: Lorad):
    """It is told apart from revoking a key twice."""
    assert isinstance(lorad("keys", "revoke", "0" * 16).exception, LoradError)


def register(name: str) -> None:
    """A base model's row as the importer writes it."""
    engine = db.open_engine(Settings.from_env().database_url)
    config = {"architecture": "opt", "context_length": 2048, "num_parameters": 125_534_208}
    row = BaseModelRow(id=ids.new_id(ids.BASE_MODEL), name=name, digest="d" * 64, config=config, created_at=1000)
    with db.write(engine) as tx:
        tx.add(row)
    engine.dispose()


def test_base_models_are_listed_and_removed(lorad: Lorad):
    """A removed model is no longer listed, and cannot be removed twice."""
    assert lorad("base", "list", "--json").stdout == ""
    register("tiny")

    assert json.loads(lorad("base", "list", "--json").stdout)["name"] == "tiny"
    assert lorad("base", "remove", "tiny").exit_code == 0
    assert lorad("base", "list", "--json").stdout == ""
    assert isinstance(lorad("base", "remove", "tiny").exception, LoradError)


@pytest.mark.parametrize("sources", [[], ["--bundled", "--hub", "a/b"], ["--hub", "a/b", "--path", "."]])
def test_a_base_model_has_exactly_one_source(lorad: Lorad, sources: list[str]):
    """None or two are wrong usage, before anything is loaded."""
    result = lorad("base", "add", "tiny", *sources)

    assert result.exit_code == 2
    assert "exactly one" in result.stderr


def test_doctor_finds_what_is_missing_and_what_is_there(lorad: Lorad, broker: Broker, monkeypatch: pytest.MonkeyPatch):
    """Without a broker and a schema its exit status is 1 and it names them; with both it is 0."""
    before = lorad("doctor", "--json")
    findings = {f["subject"]: f["ok"] for f in map(json.loads, before.stdout.splitlines())}
    assert (before.exit_code, findings) == (1, {"data directory": True, "database": False, "broker": False})

    assert lorad("migrate").exit_code == 0
    monkeypatch.setenv("LORAD_BROKER_URL", broker.url)

    assert lorad("doctor").exit_code == 0


def test_what_is_done_by_command_is_on_record(lorad: Lorad):
    """Keys made, replaced and revoked, without their secrets; a listing is not."""
    made = json.loads(lorad("keys", "create", "--tenant", "acme", "--json").stdout)
    replaced = json.loads(lorad("keys", "rotate", made["id"], "--grace", "1h", "--json").stdout)
    lorad("keys", "revoke", made["id"])
    lorad("keys", "list")

    shown = lorad("audit", "--json").stdout

    events = [json.loads(line) for line in shown.splitlines()]
    assert sorted((one["action"], one["object_id"], one["tenant"]) for one in events) == [
        *sorted(("keys_create", one["id"], "acme") for one in (made, replaced)),
        ("keys_expire", made["id"], "acme"),
        ("keys_revoke", made["id"], "acme"),
    ]
    assert events[0]["action"] == "keys_revoke"
    assert all(one["actor"].startswith("cli:") for one in events)
    assert not any(secret in shown for secret in (made["key"], replaced["key"], made["key"].rsplit("_", 1)[1]))
    assert len(lorad("audit", "--action", "keys_create", "--json").stdout.splitlines()) == 2
    assert "acme" in lorad("audit", "--object", made["id"]).stdout
    assert "Nothing" in lorad("audit", "--tenant", "other").stdout


def test_a_rotated_key_works_beside_the_new_one(lorad: Lorad):
    """Standard output is the new key alone; both open the API until the grace is over."""
    old = lorad("keys", "create", "--scope", "generate").stdout.strip()

    new = lorad("keys", "rotate", old.split("_")[1], "--grace", "30d").stdout.removesuffix("\n")

    assert authenticate(old).scopes == authenticate(new).scopes == ["generate"]
    assert authenticate(old).expires_at is not None
    assert lorad("keys", "rotate", old.split("_")[1], "--grace", "soon").exit_code == 2
