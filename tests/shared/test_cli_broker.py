"""The embedded broker: the real server, as `lorad up` starts it."""

import os
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import redis

from shared.cli import broker
from shared.config import Settings
from shared.errors import StartupError


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "broker").mkdir()
    return Settings.from_env({"LORAD_DATA_DIR": str(tmp_path)})


@contextmanager
def running(settings: Settings) -> Iterator[tuple[psutil.Process, redis.Redis]]:
    """A started server and a client of it; the server is killed at the end, as by a power cut."""
    path = settings.embedded_broker_socket
    broker.prepare_socket(path)
    with subprocess.Popen(broker.broker_command(settings), stdout=subprocess.DEVNULL) as server:
        try:
            until = time.monotonic() + 20
            while not broker.answers(path):
                assert time.monotonic() < until
                time.sleep(0.02)
            with redis.Redis.from_url(settings.resolved_broker_url) as client:
                yield psutil.Process(server.pid), client
        finally:
            server.kill()


def test_only_this_user_can_reach_it(settings: Settings):
    """It listens on no port, and its socket lies behind permissions of the owner alone."""
    with running(settings) as (server, _):
        assert server.net_connections("inet") == []
        path = settings.embedded_broker_socket
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_messages_survive_kill_nine(settings: Settings):
    """What was pushed is there after the server was killed and started again over the socket left behind."""
    with running(settings) as (_, client):
        client.rpush("queue", "doorbell")
    with running(settings) as (_, client):
        assert client.lrange("queue", 0, -1) == [b"doorbell"]


def test_it_never_drops_keys_to_make_room(settings: Settings):
    """Under a memory limit a write fails; nothing that was taken is evicted."""
    with running(settings) as (_, client):
        client.rpush("queue", "doorbell")
        client.config_set("maxmemory", 1)

        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.rpush("queue", "another")
        assert client.lrange("queue", 0, -1) == [b"doorbell"]


def test_a_long_data_dir_works_too(tmp_path: Path):
    """The socket moves to a short private directory, which is removed with it."""
    deep = tmp_path / ("d" * 120)
    (deep / "broker").mkdir(parents=True)
    settings = Settings.from_env({"LORAD_DATA_DIR": str(deep)})
    with running(settings) as (_, client):
        assert client.ping()
        assert stat.S_IMODE(settings.embedded_broker_socket.parent.stat().st_mode) == 0o700

    broker.remove_socket(settings)

    assert not settings.embedded_broker_socket.parent.exists()


def test_another_users_directory_is_not_trusted(tmp_path: Path):
    """A symbolic link waiting where the socket's directory should be is refused: others could own what it points to."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "ours").symlink_to(tmp_path / "theirs")

    with pytest.raises(StartupError, match="not a directory of this user"):
        broker.prepare_socket(tmp_path / "ours" / "valkey.sock")
    assert os.listdir(tmp_path / "theirs") == []


def test_nobody_answers_where_nothing_listens(tmp_path: Path):
    """No socket, or one whose server is gone, is a plain no."""
    assert not broker.answers(tmp_path / "none.sock")
