"""The server commands: what they refuse before they start, and what they become."""

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from shared import db, keys
from shared.cli.servers import CODE_DIR, api_command
from shared.cli.startup import is_loopback, refuse_open_door
from shared.config import Settings
from shared.errors import StartupError
from tests.shared.conftest import Lorad


@pytest.fixture
def settings(fresh_sqlite_url: str, tmp_path: Path) -> Settings:
    return Settings.from_env({"LORAD_DATA_DIR": str(tmp_path), "LORAD_DATABASE_URL": fresh_sqlite_url})


@pytest.mark.parametrize("command", ["api", "trainer", "generator", "sweeper", "migrate", "up", "doctor"])
def test_a_wrong_setting_is_one_line_and_exit_code_two(lorad: Lorad, command: str):
    """Whatever is started, the line names the variable, and nothing else is printed."""
    ended = lorad(command, LORAD_PORT="http")

    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("lorad: LORAD_PORT='http'")
    assert ended.stderr.count("\n") == 1


def test_migrate_makes_the_database_and_twice_is_once(lorad: Lorad, tmp_path: Path):
    """From nothing to a private data directory with a current schema; a second run changes nothing."""
    assert [lorad("migrate").returncode for _ in range(2)] == [0, 0]

    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
    engine = db.open_engine(f"sqlite:///{tmp_path}/data/lorad.db")
    db.check_schema(engine)
    engine.dispose()


def test_a_program_does_not_start_on_a_missing_schema(lorad: Lorad, tmp_path: Path):
    """Only `lorad migrate` and `lorad up` change a schema; the others say what to do."""
    ended = lorad("sweeper")

    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "lorad migrate" in ended.stderr


def test_an_open_door_is_refused_until_a_key_exists(settings: Settings):
    """Other machines may reach an API only if it asks for a key."""
    everywhere = replace(settings, host="0.0.0.0")
    refuse_open_door(settings)
    with pytest.raises(StartupError, match="lorad keys create"):
        refuse_open_door(everywhere)

    engine = db.open_engine(settings.database_url)
    with db.write(engine) as tx:
        keys.create(tx)
    engine.dispose()

    refuse_open_door(everywhere)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_is_recognised(host: str):
    """Every spelling of this machine and only this machine."""
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.example", "127.0.0.1.example", ""])
def test_other_hosts_are_not_loopback(host: str):
    """What others can reach, or a name that only looks like this machine."""
    assert not is_loopback(host)


def test_gunicorn_accepts_the_command_line(settings: Settings, free_port: int):
    """gunicorn itself checks the options; an IPv6 address is written as it wants it."""
    ours = replace(settings, host="::1", port=free_port)
    command = api_command(ours)
    check = [*command[:-1], "--check-config", "wsgiref.simple_server:demo_app"]

    done = subprocess.run(check, cwd=CODE_DIR, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stderr) == (0, "")
    assert command[command.index("--bind") + 1] == f"[::1]:{free_port}"


@pytest.mark.parametrize(("options", "workers"), [([], "1"), (["--workers", "3"], "3")])
def test_the_api_is_one_process_whatever_the_environment_wants(settings: Settings, options: list[str], workers: str):
    """Rates and figures are counted in it, so gunicorn's own variable does not count; its last option would."""
    command = [*api_command(settings)[:-1], *options, "--print-config", "wsgiref.simple_server:demo_app"]
    env = dict(os.environ) | {"WEB_CONCURRENCY": "4"}

    done = subprocess.run(command, cwd=CODE_DIR, env=env, capture_output=True, text=True, timeout=60)

    assert re.search(r"^workers\s*= (\d+)$", done.stdout, re.MULTILINE)[1] == workers, done.stderr  # type: ignore[index]  # None fails as well


@pytest.fixture
def free_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener.getsockname()[1]
