"""Settings: what the environment says, what is refused, and that children read the same."""

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from shared.config import Settings, environment_for
from shared.errors import SettingsError


def test_defaults_need_no_environment():
    """Without any variable: loopback, SQLite in ~/.lorad, the embedded broker."""
    settings = Settings.from_env({"HOME": "/nowhere"})

    assert settings.host == "127.0.0.1"
    assert settings.database_url == f"sqlite:///{settings.data_dir}/lorad.db"
    assert settings.resolved_broker_url == f"unix://{settings.data_dir}/broker/valkey.sock"


def test_every_problem_is_named_at_once():
    """Three mistakes give one error that names all three."""
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({"LORAD_PORT": "http", "LORAD_DEVICE": "tpu", "LORAD_SPEED": "fast"})

    assert all(name in caught.value.message for name in ("LORAD_PORT", "LORAD_DEVICE", "LORAD_SPEED"))


@pytest.mark.parametrize("port", ["0", "65536", "-1", "8e3", "８３２１", "8321 ", "9" * 30])
def test_a_port_is_a_number_in_range(port: str):
    """Anything else is refused, also digits of other scripts that int() would take."""
    with pytest.raises(SettingsError, match="LORAD_PORT"):
        Settings.from_env({"LORAD_PORT": port})


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_time_is_a_positive_number(seconds: str):
    """No time is zero, negative, infinite or not a number."""
    with pytest.raises(SettingsError, match="LORAD_SWEEP_S"):
        Settings.from_env({"LORAD_SWEEP_S": seconds})


def test_a_lease_outlives_a_heartbeat():
    """A lease that one late heartbeat would lose is refused, one that survives it is not."""
    with pytest.raises(SettingsError, match="LORAD_LEASE_S"):
        Settings.from_env({"LORAD_HEARTBEAT_S": "3", "LORAD_LEASE_S": "5"})

    assert Settings.from_env({"LORAD_HEARTBEAT_S": "3", "LORAD_LEASE_S": "6"}).lease_s == 6


@pytest.mark.parametrize("url", ["sqlite:///lorad.db", "sqlite://", "mysql://u:geheim@h/d", "lorad.db"])
def test_a_database_is_an_absolute_sqlite_path_or_postgres(url: str):
    """Programs start in different directories, so a relative path would be another database in each.

    The message names the setting and shows no password.
    """
    with pytest.raises(SettingsError, match="LORAD_DATABASE_URL") as caught:
        Settings.from_env({"LORAD_DATABASE_URL": url})

    assert "geheim" not in caught.value.message
    assert Settings.from_env({"LORAD_DATABASE_URL": "sqlite:////tmp/lorad.db"}).database_url.endswith("/tmp/lorad.db")


@pytest.mark.parametrize("url", ["amqp://host", "unix://relative.sock", "localhost:6379"])
def test_a_broker_is_redis_by_tcp_or_socket(url: str):
    """Other brokers lack the streams that answers travel on."""
    with pytest.raises(SettingsError, match="LORAD_BROKER_URL"):
        Settings.from_env({"LORAD_BROKER_URL": url})


def test_a_relative_data_dir_becomes_absolute():
    """So that programs started elsewhere find the same one."""
    assert Settings.from_env({"LORAD_DATA_DIR": "here"}).data_dir == Path.cwd() / "here"


def test_empty_means_not_set():
    """A variable set to nothing, as compose files leave them, counts as absent."""
    assert Settings.from_env({"LORAD_BROKER_URL": "", "LORAD_API_KEY": ""}).broker_url is None


@pytest.mark.parametrize("broker_url", [None, "redis://127.0.0.1:6379/0"])
def test_a_child_reads_the_same_settings(broker_url: str | None):
    """What environment_for writes, from_env reads; variables that are no settings of ours pass through."""
    settings = replace(
        Settings.from_env({"LORAD_DATA_DIR": "/data", "LORAD_LEASE_S": "7.5", "LORAD_HEARTBEAT_S": "0.25"}),
        broker_url=broker_url,
        train_slots=3,
        dtype="bfloat16",
    )

    env = environment_for(settings, {"PATH": "/bin", "LORAD_PORT": "1", "LORAD_FAILPOINT": "x"})

    assert Settings.from_env(env) == settings
    assert (env["PATH"], env["LORAD_FAILPOINT"]) == ("/bin", "x")


def test_only_what_downloads_gets_the_hub_s_token():
    """A trainer needs none, and what it has not it cannot show; `lorad base add` has it, and other variables pass."""
    settings, outside = Settings.from_env({}), {"HF_TOKEN": "t", "HUGGING_FACE_HUB_TOKEN": "t", "HF_HOME": "h"}

    for program in ("server", "api", "trainer", "generator"):
        assert {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HOME"} & set(
            environment_for(settings, outside, program=program)
        ) == {"HF_HOME"}
    assert environment_for(settings, outside, program="importer")["HF_TOKEN"] == "t"


def test_limits_by_the_minute_can_be_off():
    """Zero is any number; guessing is limited unless somebody says otherwise, requests are not."""
    off = Settings.from_env({"LORAD_FAILED_LOGINS_PER_MINUTE": "0", "LORAD_REQUESTS_PER_MINUTE": "600"})

    assert (off.failed_logins_per_minute, off.requests_per_minute) == (0, 600)
    default = Settings.from_env({})
    assert (default.failed_logins_per_minute, default.requests_per_minute) == (10, 0)
    with pytest.raises(SettingsError, match="LORAD_REQUESTS_PER_MINUTE"):
        Settings.from_env({"LORAD_REQUESTS_PER_MINUTE": "-1"})


def test_compute_threads_wait_as_is_best_unless_somebody_says_otherwise():
    """All wait passively, a generator after a short spin; what the environment says already is left alone."""
    settings = Settings.from_env({})

    assert environment_for(settings, {})["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "GOMP_SPINCOUNT" not in environment_for(settings, {}, program="trainer")
    assert "GOMP_SPINCOUNT" in environment_for(settings, {}, program="generator")
    assert environment_for(settings, {"GOMP_SPINCOUNT": "7"}, program="generator")["GOMP_SPINCOUNT"] == "7"


def test_the_broker_socket_fits_the_kernel_however_long_the_data_dir():
    """A path too long for a socket is replaced by one that can be bound, a different one for each data directory."""
    short = Settings.from_env({"LORAD_DATA_DIR": "/d"})
    long_one, other = (Settings.from_env({"LORAD_DATA_DIR": f"/d/{'x' * 200}{n}"}) for n in (1, 2))

    assert short.embedded_broker_socket == Path("/d/broker/valkey.sock")
    assert long_one.embedded_broker_socket != other.embedded_broker_socket
    directory = long_one.embedded_broker_socket.parent
    directory.mkdir(mode=0o700)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fspath(long_one.embedded_broker_socket))
            long_one.embedded_broker_socket.unlink()
    finally:
        directory.rmdir()


@pytest.mark.parametrize("name", ["MAX_RUNNING_JOBS", "MIN_FREE_BYTES"])
def test_some_bounds_can_be_turned_off(name: str):
    """0 means no bound there, and nothing else does; what a program must have some of cannot be 0."""
    for text in ("-1", "1.5", "none"):
        with pytest.raises(SettingsError, match=f"LORAD_{name}"):
            Settings.from_env({f"LORAD_{name}": text})
    with pytest.raises(SettingsError, match="LORAD_TRAIN_SLOTS"):
        Settings.from_env({"LORAD_TRAIN_SLOTS": "0"})

    assert getattr(Settings.from_env({f"LORAD_{name}": "0"}), name.lower()) == 0


def test_a_job_may_run_for_ever_unless_limited():
    """No time limit by default, in a child's environment neither; one that is set is kept."""
    free, bounded = Settings.from_env({}), Settings.from_env({"LORAD_MAX_JOB_S": "3600"})

    assert (free.max_job_s, Settings.from_env(environment_for(free, {})).max_job_s) == (None, None)
    assert Settings.from_env(environment_for(bounded, {})).max_job_s == 3600.0
